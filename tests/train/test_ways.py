"""1, 2, 3 and 4 processes, by each way to share the work, give the losses and the adapter folder of
one process, and send what can be foretold. Each number of processes starts once, and trains every
kind of adapter.

A balance of experts is a mean over forward passes, and not linear in their rows: of one batch it is
another number than the mean of its parts. So a run with that loss is compared with one process that
takes the same passes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from tests.support.launched import code, wait_for_all
from tests.support.tasks import rows_of, write_vit
from tests.support.tiny import sums, tiny_config, tiny_tokenizer, write_rows, write_tiny
from tests.train.conftest import config_of
from tests.train.test_distributed import equals

from veneer.models.meta import meta_model
from veneer.train import checkpoint

STEPS = 50
HIDDEN, BLOCKS = 32, 2
EXPERTS = r"re:.*\.(experts\.(gate_up|down)_proj|[qkvo]_proj)"
#: whose loss depends on which rows share a pass
BALANCED = "balanced experts"
#: name → (base, settings)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {}),
    "dora": ("llama", {"variant": "dora"}),
    "in full": ("llama", {"train_also": ["norm", "lm_head"]}),
    "experts": ("mixtral", {"targets": EXPERTS}),
    BALANCED: ("balanced", {"targets": EXPERTS}),
    "convolutions": (
        "vit",
        {"task": "classify", "targets": ["all-linear", "re:.*patch_embeddings.projection"]},
    ),
}
WAYS = [
    ("ddp", 2),
    ("ddp", 3),
    ("ddp", 4),
    ("fsdp", 2),
    ("fsdp", 3),
    ("fsdp", 4),
    ("hsdp", 4),
    ("tp", 2),
]

# : trains with each configuration, and counts what is sent: bytes by operation, and tokens of each
# training step
PROGRAM = """
import json, os
from pathlib import Path
import torch.distributed as dist
from transformers import Trainer
from veneer.train.config import load_config
from veneer.train.processes import leave
from veneer.train.run import fit
sent, tokens, kept = [], [], {{name: getattr(dist, name) for name in ("all_reduce", "all_gather_single", "broadcast")}}
def counting(name):
    def counted(tensor, *args, **kwargs):
        sent.append([name, tensor.numel() * tensor.element_size()])
        return kept[name](tensor, *args, **kwargs)
    return counted
for name in kept:
    setattr(dist, name, counting(name))
step = Trainer.training_step
def stepping(self, model, inputs, *args, **kwargs):
    if not tokens:  # what was gathered before the first step, for the check, is no step's
        sent[:] = [one for one in sent if one[0] != "all_gather_single"]
    tokens.append(next(iter(inputs.values())).shape[:2].numel())
    return step(self, model, inputs, *args, **kwargs)
Trainer.training_step = stepping
for file in {files!r}:
    config = load_config(Path(file))
    sent.clear(), tokens.clear()
    fit(config, quiet=True)
    if os.environ.get("RANK", "0") == "0":
        (config.output / "sent.json").write_text(json.dumps([sent, tokens]))
leave("")
"""


def write_mixtral(folder: Path, balance: float) -> Path:
    torch.manual_seed(0)
    fields = {
        **tiny_config().to_diff_dict(),
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 24,
    }
    config = transformers.MixtralConfig(
        **{**fields, "model_type": "mixtral", "router_aux_loss_coef": balance}
    )
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def parallel(way: str) -> dict[str, Any]:
    """hsdp: copies of the base, each on two processes."""
    return {"parallel": "fsdp", "shard_size": 2} if way == "hsdp" else {"parallel": way}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """`trained(way, processes)`: the configurations by kind, of runs that have ended. With `passes`
    in a step, of the kind whose loss depends on them."""
    folder = tmp_path_factory.mktemp("ways")
    bases = {"llama": write_tiny(folder / "llama"), "vit": write_vit(folder / "vit")}
    bases |= {
        name: write_mixtral(folder / name, balance)
        for name, balance in (("mixtral", 0.0), ("balanced", 0.1))
    }
    texts, images = (
        write_rows(folder / "sums.jsonl", sums(40)),
        write_rows(folder / "i.jsonl", rows_of("image", 40)),
    )
    known: dict[tuple[str, int, int], dict[str, Any]] = {}

    def of(way: str, processes: int, passes: int = 1) -> dict[str, Any]:
        if (way, processes, passes) in known:
            return known[way, processes, passes]
        configs, files = {}, []
        for kind, (base, changes) in KINDS.items():
            if (way == "tp" and base == "vit") or (passes > 1 and kind != BALANCED):
                continue
            output = folder / f"{way}-{processes}-{passes}" / kind
            fixed = {
                "dropout": 0.0,
                "max_steps": STEPS,
                "eval_fraction": 0.0,
                "eval_every": None,
                "save_every": STEPS,
            }
            fixed |= {
                "batch_size": 12 // passes,
                "grad_accum": passes,
                "learning_rate": 1e-3,
                **parallel(way),
            }
            data = images if base == "vit" else texts
            configs[kind] = config_of(bases[base], data, output, **fixed, **changes)
            files.append(folder / f"{way}-{processes}-{passes}-{kind}.yaml")
            files[-1].write_text(yaml.safe_dump(configs[kind].content()))
        known[way, processes, passes] = configs
        wait_for_all(code(PROGRAM.format(files=[*map(str, files)]), processes))
        return configs

    return of


@pytest.mark.slow
@pytest.mark.parametrize(("way", "processes"), WAYS)
def test_every_way_trains_what_one_process_does(trained: Any, way: str, processes: int) -> None:
    runs, whole = trained(way, processes), trained("ddp", 1)
    if way != "tp":  # whose processes all see the rows of one
        whole = whole | trained("ddp", 1, passes=processes)
    assert {*runs} == {*KINDS} - ({"convolutions"} if way == "tp" else set())
    for kind, config in runs.items():
        assert len([line for line in checkpoint.read_log(config.output) if "loss" in line]) == STEPS
        equals(config.output, whole[kind].output)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "processes"), WAYS)
def test_what_is_sent_is_what_was_foretold(trained: Any, way: str, processes: int) -> None:
    """In all steps, of numbers that grow with the model; what the processes count (tokens, labels)
    is below 64 bytes each time."""
    for kind, config in trained(way, processes).items():
        sent, tokens = json.loads((config.output / "sent.json").read_text())
        large = [(name, size) for name, size in sent if size > 64]
        sizes = [state["exp_avg"].numel() for state in optimiser(config.output)["state"].values()]
        numbers = sum(sizes)
        gradients = 4 * (numbers + len(sizes))  # and whether there is one
        starts = sum(size for name, size in large if name == "broadcast")
        assert starts <= 4 * numbers  # the values, once
        summed = sum(size for name, size in large if name == "all_reduce")
        assert summed == STEPS * gradients + (_sums(kind, tokens) if way == "tp" else 0), kind
        gathered = sum(size for name, size in large if name == "all_gather_single")
        among = {"fsdp": processes, "hsdp": 2}.get(way)
        assert gathered == (STEPS * _gathered(Path(config.base), among) if among else 0), kind


def optimiser(output: Path) -> Any:
    """Its state in the newest checkpoint."""
    found: Any = checkpoint.newest(output)
    return torch.load(found[0] / "optimizer.pt", weights_only=True)


def _sums(kind: str, tokens: list[int]) -> int:
    """Bytes of what a cut base sums: in forward, a block's two row-wise layers; in backward, the
    inputs of its column-wise ones, but for the first, if a frozen embedding gives it. Beside that
    DoRA's norms of row-wise layers, and the gradients of two routing weights a token."""
    passed = sum(tokens)
    bytes_ = 4 * HIDDEN * passed * (4 * BLOCKS - (kind != "in full"))  # whose head is the embedding
    if kind == "dora":
        bytes_ += 4 * HIDDEN * 2 * BLOCKS * len(tokens)
    if "experts" in kind:
        bytes_ += 4 * 2 * BLOCKS * passed
    return bytes_


def _gathered(base: Path, processes: int) -> int:
    """Bytes that FSDP2 gathers in a step: what lies in a module that is not split in forward and in
    backward, all else once; each parameter filled up to rows for every process: of a stack, which
    files hold as a tensor for each expert, to experts."""
    model = meta_model(base, "ViTForImageClassification" if base.name == "vit" else None)
    total = 0
    for name, parameter in model.named_parameters():
        rows, *rest = parameter.shape
        twice = any(part in name for part in (".layers.", ".layer.", ".embeddings."))
        total += 4 * math.ceil(rows / processes) * processes * math.prod(rest) * (2 if twice else 1)
    return total
