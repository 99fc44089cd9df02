"""The losses of the tasks are those of trl and sentence-transformers on the same numbers, in
float64."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from tests.support.tasks import config_of, rows_of, write_llama
from tests.support.tiny import write_tiny
from tests.support.toys import randomise
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import veneer
from veneer.train.config import TrainConfig
from veneer.train.loss import log_probabilities
from veneer.train.tasks import TASKS
from veneer.train.tasks.embed import ranking_losses
from veneer.train.tasks.grpo import advantages, losses
from veneer.train.tasks.orpo import log_sigmoid_odds_ratio

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers'
#: trl takes its log-probabilities in float32
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("losses")
    write_llama(folder / "llama")
    return folder


def ours(
    name: str, folder: Path, rows: list[dict[str, Any]], **changes: Any
) -> tuple[float, Any, Any]:
    """(mean loss, the model, its task): in float64, with an adapter that is no longer at its
    start."""
    task = TASKS[name](config_of(name, folder, **changes))
    task.open_base()
    records = task.read(task.config.data, "train")
    batch = task.collate(task.encode(records).rows[: len(rows)])
    model: Any = task.load().model
    model = model.double()
    torch.manual_seed(0)
    randomise(veneer.attach(model, veneer.LoraConfig(rank=4)), 0.1)
    found = task.loss(model, batch)
    assert found.items == task.count_items(batch)
    return float(found.total) / found.items, model, task


def plain_of(model: Any) -> Any:
    """A model without adapters that computes what the adapted one does."""
    veneer.merge(model)
    veneer.detach(model, keep_merged=True)
    return model


def peer_loss(trainer: Any) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = next(iter(trainer.get_train_dataloader()))
        return float(trainer.compute_loss(trainer.model, batch))


def arguments(kind: Any, folder: Path, rows: list[Any], **more: Any) -> Any:
    return kind(
        output_dir=str(folder / "trl"), per_device_train_batch_size=len(rows), report_to="none", bf16=False,
        use_cpu=True, gradient_checkpointing=False, disable_tqdm=True, train_sampling_strategy="sequential", **more,
    )  # fmt: skip


def test_log_probabilities_and_their_gradients(folder: Path) -> None:
    _, model, task = ours("dpo", folder, rows_of("pairs")[:3])
    batch = task.collate(task.encode(task.read(task.config.data, "train")).rows[:3])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    weights = torch.rand(len(batch["labels"]), batch["labels"].shape[1] - 1, dtype=torch.float64)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for temperature in (1.0, 0.7):
        found = log_probabilities(model, batch, temperature)
        target = batch["labels"][:, 1:]
        logits = model(**inputs).logits[:, :-1] / temperature
        expected = logits.log_softmax(-1).gather(2, target.clamp(min=0)[..., None])[..., 0] * (
            target != -100
        )
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        one = torch.autograd.grad((found * weights).sum(), parameters)
        other = torch.autograd.grad((expected * weights).sum(), parameters)
        for left, right in zip(one, other, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_dpo(folder: Path, beta: float) -> None:
    from trl import DPOConfig, DPOTrainer

    rows = rows_of("pairs")[:4]
    found, model, task = ours("dpo", folder, rows, beta=beta)
    base = AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.float64)
    trainer = DPOTrainer(
        plain_of(model), base, arguments(DPOConfig, folder, rows, beta=beta), train_dataset=Dataset.from_list(rows),
        processing_class=task.processor,
    )  # fmt: skip
    assert found == pytest.approx(peer_loss(trainer), rel=TOLERANCE)


def test_kto(folder: Path) -> None:
    from trl import KTOConfig, KTOTrainer

    rows = rows_of("judged")[:4]
    found, model, task = ours("kto", folder, rows, beta=0.3)
    base = AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.float64)
    trainer = KTOTrainer(
        plain_of(model), base, arguments(KTOConfig, folder, rows, beta=0.3), train_dataset=Dataset.from_list(rows),
        processing_class=task.processor,
    )  # fmt: skip
    assert found == pytest.approx(peer_loss(trainer), rel=TOLERANCE)


def test_kto_learns_what_the_assistant_wrote(tmp_path: Path) -> None:
    """Not the answers of tools and the turns of the user in between."""
    folder = write_tiny(tmp_path / "base")
    prompt = [{"role": "user", "content": "hi"}]
    completion = [
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "two"},
    ]
    rows = [{"prompt": prompt, "completion": completion, "label": label} for label in (True, False)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TASKS["kto"](
        TrainConfig(task="kto", base=str(folder), data=str(file), output=str(tmp_path))
    )
    task.open_base()
    encoded = task.encode(task.read(str(file), "train"))
    batch = task.collate(encoded.rows)
    for labels in batch["labels"]:
        learnt = task.processor.decode(labels[labels != -100])
        assert learnt == "one<|im_end|>\ntwo<|im_end|>\n"
    assert encoded.head_token_counts == [2 * int((batch["labels"][0] != -100).sum())] * 2


def test_orpo() -> None:
    from trl.experimental.orpo import ORPOTrainer

    generator = torch.Generator().manual_seed(0)
    chosen, rejected = -3 * torch.rand(2, 50, generator=generator)
    chosen[:4] = torch.tensor([-1e-6, -0.69, -0.7, -40.0])
    peer = SimpleNamespace(beta=0.25, accelerator=SimpleNamespace(device="cpu"))
    expected = ORPOTrainer.odds_ratio_loss(peer, chosen, rejected)[0]
    found = 0.25 * log_sigmoid_odds_ratio(chosen.double(), rejected.double())
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-6)
    exact = torch.tensor([-1e-12, -0.3, -50.0], dtype=torch.float64, requires_grad=True)
    log_sigmoid_odds_ratio(exact, exact.detach() - 0.1).sum().backward()
    assert bool(exact.grad.isfinite().all())  # at both ends


def test_reward(folder: Path) -> None:
    from trl import RewardConfig, RewardTrainer

    rows = rows_of("pairs")[:4]
    found, model, task = ours("reward", folder, rows)
    plain = plain_of(model)
    trainer = RewardTrainer(
        plain, arguments(RewardConfig, folder, rows), train_dataset=Dataset.from_list(rows),
        processing_class=task.processor,
    )  # fmt: skip
    assert isinstance(plain, AutoModelForSequenceClassification._model_mapping[type(plain.config)])
    assert found == pytest.approx(peer_loss(trainer), rel=TOLERANCE)


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_grpo(beta: float) -> None:
    """trl's `_compute_loss` on log-probabilities that are given; and its advantages, by their
    definition."""
    from trl import GRPOTrainer

    generator = torch.Generator().manual_seed(0)
    now, before = -3 * torch.rand(2, 8, 5, generator=generator, dtype=torch.float64)
    there = torch.arange(5) < torch.tensor([5, 3, 1, 2, 5, 4, 4, 3])[:, None]
    rewards = torch.rand(8, generator=generator, dtype=torch.float64)
    own = advantages(rewards, 4)
    for group in (slice(0, 4), slice(4, 8)):
        expected = (rewards[group] - rewards[group].mean()) / (rewards[group].std() + 1e-4)
        torch.testing.assert_close(own[group], expected)
    none = dict.fromkeys(("vllm", "off_policy_mask_threshold", "delta"))
    alike = {
        name: (lambda value, **_: value) for name in ("gather", "gather_for_metrics", "reduce")
    }
    accelerator = SimpleNamespace(**alike, device="cpu")
    peer: Any = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (now, torch.zeros_like(now), None), beta=beta,
        top_entropy_quantile=1.0, importance_sampling_level="token", loss_type="grpo", epsilon_low=0.2,
        epsilon_high=0.2, use_vllm=False, _entropy_bonus_enabled=False, aux_loss_enabled=False,
        model=torch.nn.Identity(),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False), current_gradient_accumulation_steps=1,
        accelerator=accelerator,
        _metrics={"train": _Lists(), "eval": _Lists()}, **none,
    )  # fmt: skip
    ids = torch.ones(8, 5, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": there.long(),
        "advantages": own, "ref_per_token_logps": before,
    }  # fmt: skip
    expected = float(GRPOTrainer._compute_loss(peer, None, inputs))
    assert float(losses(now, own, there, before if beta else None, beta).mean()) == pytest.approx(
        expected, rel=1e-12
    )


class _Lists(dict):
    def __missing__(self, key: str) -> list[float]:
        return self.setdefault(key, [])


@pytest.mark.parametrize("sides", [1, 2])
def test_ranking(sides: int) -> None:
    """sentence-transformers' loss, or its definition where that is not installed."""
    generator = torch.Generator().manual_seed(0)
    anchors, *others = torch.randn(1 + sides, 6, 16, generator=generator, dtype=torch.float64)
    found, nearest = ranking_losses(anchors, torch.cat(others))
    cosines = torch.nn.functional.cosine_similarity(
        anchors[:, None], torch.cat(others)[None], dim=-1
    )
    assert torch.equal(nearest, cosines.argmax(1))
    expected = -(20 * cosines).log_softmax(1).diagonal()
    torch.testing.assert_close(found, expected)


def test_ranking_beside_sentence_transformers() -> None:
    peers = pytest.importorskip("sentence_transformers.losses")
    generator = torch.Generator().manual_seed(0)
    parts = [*torch.randn(3, 6, 16, generator=generator, dtype=torch.float64)]
    model = torch.nn.Identity()
    expected = peers.MultipleNegativesRankingLoss(model, scale=20.0).compute_loss_from_embeddings(
        parts, None
    )
    found, _ = ranking_losses(parts[0], torch.cat(parts[1:]))
    torch.testing.assert_close(found.mean(), expected)
