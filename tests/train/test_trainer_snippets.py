"""The examples of docs/trainers.md run, one after the other's beginning."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.support.tiny import sums, write_tiny
from tests.support.trainers import batches

import veneer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "trainers.md"
BEGINNING, *EXAMPLES = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*workers.*"),
]


def lightning_module(model: Any) -> Any:
    import pytorch_lightning as lightning

    class Tuned(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model.train()

        def training_step(self, batch: Any, index: int) -> Any:
            return self.model(**batch).loss

        def validation_step(self, batch: Any, index: int) -> None:
            self.model(**batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])

    return Tuned()


@pytest.mark.parametrize(
    "number", range(len(EXAMPLES)), ids=lambda number: EXAMPLES[number].splitlines()[-1][:40]
)
@pytest.mark.filterwarnings("ignore:.*dirpath has changed.*", "ignore:.*val_dataloader.*")
def test_an_example_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from datasets import Dataset

    write_tiny(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    veneer.attach(base, veneer.LoraConfig(rank=2)).save(tmp_path / "sft")
    monkeypatch.chdir(tmp_path)
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " no"}
        for row in sums(24)
    ]
    names: dict[str, Any] = {
        "texts": Dataset.from_list([dict(row) for row in sums(24)]), "preferences": Dataset.from_list(pairs),
        "batches": batches(3), "Tuned": lightning_module, "again": False,
    }  # fmt: skip
    exec(BEGINNING, names)
    names["settings"] |= {
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    exec(EXAMPLES[number], names)


def test_each_is_short():
    assert len(EXAMPLES) >= 8
    assert all(
        len([line for line in example.splitlines() if line.strip()]) <= 13 for example in EXAMPLES
    )
