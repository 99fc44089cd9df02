"""A base that is read by shares: each process the rows that are its own, all others what
`from_pretrained` makes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from tests.support.real_models import REAL, transformers_models
from tests.support.tiny import write_tiny

from veneer.attach.layer.model_index import ModelIndex
from veneer.errors import ConfigError
from veneer.models import load_head
from veneer.models.safetensors_dir import Checkpoint
from veneer.train.sharding import shard

AUTO = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM", "AutoModelForImageClassification",
        "AutoModel")  # fmt: skip
# : processes, of which one is played (torch remembers which): neither rows nor experts divide by
# them
COUNT, RANK = 3, 2
CPU = torch.device("cpu")


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(tensor, bytes) of what is read of checkpoints."""
    seen, read = list[tuple[str, int]](), Checkpoint.read

    def counted(self: Checkpoint, name: str, rows: slice | None = None) -> torch.Tensor:
        found = read(self, name, rows)
        seen.append((name, found.nbytes))
        return found

    monkeypatch.setattr(Checkpoint, "read", counted)
    return seen


def shared(folder: Path, auto: str, **fields: Any) -> Any:
    """The model of a folder as a process of ``COUNT`` reads it, the others of which do not exist:
    torch's own stand-in for a group gathers nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=RANK, world_size=COUNT, store=FakeStore())
    try:
        return load_head(
            folder,
            auto,
            precision="stored",
            device="cpu",
            spread=partial(shard, device=CPU),
            **fields,
        )
    finally:
        dist.destroy_process_group()


def values(model: Any) -> dict[str, torch.Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def must_be_share(model: Any, whole: Any) -> None:
    """That ``model`` has the rows of ``whole`` that belong to a process, the same buffers, ties and
    marks."""
    ours, theirs = values(model), values(whole)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        here: Any = ours[name]
        if isinstance(value, torch.nn.Parameter):
            assert (here.shape, here.dtype, here.requires_grad) == (
                value.shape,
                value.dtype,
                False,
            ), name
            parts = value.detach().chunk(COUNT)
            expected = parts[RANK] if len(parts) > RANK else value.detach()[:0]
            torch.testing.assert_close(here.to_local(), expected, atol=0, rtol=0)
        else:
            torch.testing.assert_close(here, value, atol=0, rtol=0)
    tied = [
        [{name for name, one in own.items() if one is value} for value in own.values()]
        for own in (ours, theirs)
    ]
    assert tied[0] == tied[1]
    assert model.config.to_dict() == whole.config.to_dict()


@pytest.mark.parametrize("name", transformers_models())
def test_the_rows_of_a_process(name: str, tmp_path: Path) -> None:
    model: Any = REAL[name].build()[0]
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    mapping = {auto: getattr(transformers, auto)._model_mapping for auto in AUTO}
    auto = next(auto for auto in AUTO if type(model.config) in mapping[auto])
    models: list[Any] = []
    for load in (shared, partial(load_head, precision="stored", device="cpu")):
        torch.manual_seed(5)  # of what the files lack
        models.append(load(tmp_path, auto))
    must_be_share(*models)


def test_no_weight_is_read_whole(tmp_path: Path, sizes: list[tuple[str, int]]) -> None:
    write_tiny(tmp_path, tie_word_embeddings=False)
    shared(tmp_path, "AutoModelForCausalLM")
    whole = {
        name: value.nbytes for name, value in load_file(tmp_path / "model.safetensors").items()
    }
    assert len({name for name, _ in sizes}) == len(sizes) == len(whole)
    rows = dict.fromkeys(whole, 256 + COUNT)
    assert all(size <= whole[name] / COUNT + rows[name] for name, size in sizes)


def test_a_new_head_is_the_one_that_one_process_makes(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    models: list[Any] = []
    for load in (shared, partial(load_head, precision="stored", device="cpu")):
        torch.manual_seed(5)
        models.append(load(tmp_path, "AutoModelForSequenceClassification", num_labels=7))
    must_be_share(*models)
    assert [[*ModelIndex(model).fresh_parameters().values()] for model in models] == [
        [("score", "weight")]
    ] * 2


@pytest.mark.parametrize("differ", [False, True])
def test_ties_of_which_the_files_hold_both(differ: bool, tmp_path: Path) -> None:
    write_tiny(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + float(differ)
    save_file(tensors, file, metadata={"format": "pt"})
    whole = load_head(tmp_path, "AutoModelForCausalLM", precision="stored", device="cpu")
    assert (whole.lm_head.weight is whole.model.embed_tokens.weight) is not differ
    must_be_share(shared(tmp_path, "AutoModelForCausalLM"), whole)


def test_what_cannot_be_read_by_rows_is_told(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin alone: pickles"):
        shared(tmp_path, "AutoModelForCausalLM")
