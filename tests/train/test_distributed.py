"""`veneer train` in several processes: the losses and the adapter of one, one writer, one
outcome."""

from __future__ import annotations

import itertools
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.support.launched import train, wait_for_all
from tests.support.tasks import rows_of, write_vit
from tests.support.tiny import write_rows
from tests.train.conftest import config_of

from veneer.errors import ConfigError
from veneer.train import checkpoint
from veneer.train.config import make_config
from veneer.train.order import EpochSampler, ShareSampler
from veneer.train.processes import check_divided_settings, share_config
from veneer.train.run import fit, prepare_data
from veneer.train.tasks import TASKS as ALL_TASKS

Make = Callable[..., Any]

# : without dropout, which each process draws for itself; 30 rows leave a process without any at an
# epoch's end
CHANGES = {"dropout": 0.0, "batch_size": 4, "eval_fraction": 0.25}
#: over the end of an epoch, with one evaluation and one checkpoint on the way
SHORT = {"max_steps": 11, "eval_every": 6, "save_every": 6}


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in checkpoint.read_log(output) if "loss" in line]


def evaluations(output: Path) -> list[float]:
    return [line["eval_loss"] for line in checkpoint.read_log(output) if "eval_loss" in line]


def equals(output: Path, whole: Path, tolerance: float = 1e-5) -> None:
    """The same losses, and the same folder up to the last digits of its numbers."""
    assert losses(output) == pytest.approx(losses(whole), abs=tolerance)
    assert evaluations(output) == pytest.approx(evaluations(whole), abs=tolerance)
    tokens = [
        [line.get("tokens") for line in checkpoint.read_log(folder)] for folder in (output, whole)
    ]
    assert tokens[0] == tokens[1]
    first, second = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (output, whole)
    )
    assert first.keys() == second.keys()
    for name, value in second.items():
        assert (value.dtype, value.shape) == (first[name].dtype, first[name].shape)
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-4)
    configs = [
        (folder / "adapter" / "adapter_config.json").read_text() for folder in (output, whole)
    ]
    assert configs[0] == configs[1]


#: counts what is sent, into the file `sent`
COUNTED = """
import atexit, json, torch.distributed as dist
sent, kept = [], {name: getattr(dist, name) for name in ("all_reduce", "broadcast")}
for name in kept:
    def counted(tensor, *args, name=name, **kwargs):
        sent.append([name, tensor.numel() * tensor.element_size()])
        return kept[name](tensor, *args, **kwargs)
    setattr(dist, name, counted)
import veneer.train.processes as processes
end = processes.leave
def ends(output):
    if rank == 1:
        print("sent", json.dumps(sent))
    end(output)
processes.leave = ends
"""


@pytest.fixture(scope="module")
def finished(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """The configuration of a run that two processes have ended, and what they printed."""
    folder = tmp_path_factory.mktemp("finished")
    config = config_of(base, rows, folder / "two", **CHANGES, **SHORT)
    return config, wait_for_all(train(config, folder, 2, before=COUNTED))


def test_two_processes_train_what_one_does(make: Make, finished: tuple[Any, str]) -> None:
    (config, said), whole = finished, make("one", **CHANGES, **SHORT)
    fit(whole, quiet=True)
    equals(config.output, whole.output)
    assert said.count("Done") == 1
    assert re.search(r"\nMemory .* in each\n", said)
    assert "Steps    11 of 4 examples, 2 in each of 2 processes" in said
    assert said.split("--- rank 1")[1].strip().startswith("sent ")
    assert "\n" not in said.split("--- rank 1")[1].strip()


def test_gradients_of_the_adapter_travel_once_a_step(finished: tuple[Any, str]) -> None:
    """And at the start its values: no weight of the base, nothing for a forward pass. Counts travel
    once a step, and once an evaluation."""
    config, said = finished
    sent = json.loads(said.split("sent ")[-1])
    tensors = load_file(config.output / "adapter" / "adapter_model.safetensors")
    numbers = sum(value.numel() for value in tensors.values())
    assert sum(size for name, size in sent if name == "broadcast") == 4 * numbers
    summed = [size for name, size in sent if name == "all_reduce"]
    assert [size for size in summed if size > 64] == [
        4 * (numbers + len(tensors))
    ] * 11  # and whether there is one
    assert len([size for size in summed if size <= 64]) == 11 + len(evaluations(config.output))


#: what else decides which rows a step has, which parameters train, and what the loss is a mean of
VARIATIONS = {
    "accumulation": {"batch_size": 3, "grad_accum": 4, "epochs": 4},
    "packing": {"packing": True, "max_length": 64, "epochs": 12},
    "tokens": {"add_tokens": ["<|new|>"], "max_steps": 20},
    "cached": {"cache_lower": True, "layers": [1], "max_steps": 20},
    "checkpointing": {"activation_checkpointing": True, "max_steps": 20},
    "best": {"early_stopping": 2, "eval_every": 2, "save_every": 2, "epochs": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("changes", VARIATIONS.values(), ids=VARIATIONS.keys())
def test_any_number_of_processes_trains_what_one_does(
    make: Make, tmp_path: Path, changes: dict[str, Any], processes: int
) -> None:
    changes = {**CHANGES, "batch_size": 12, "learning_rate": 1e-3, **changes}
    config, whole = make("several", **changes), make("one", **changes)
    wait_for_all(train(config, tmp_path, processes))
    wait_for_all(train(whole, tmp_path, 1))
    equals(config.output, whole.output)


TASKS = {
    "dpo": lambda i: {"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": f" {i + 2}"},
    "classify": lambda i: {"text": f"{i} is a number", "label": "even" if i % 2 == 0 else "odd"},
}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_tasks(base: Path, tmp_path: Path, task: str) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [TASKS[task](i) for i in range(21)])
    fields = {
        "base": str(base),
        "data": str(data),
        "task": task,
        "precision": "fp32",
        "eval_fraction": 0.25,
    }
    configs = [
        make_config({**fields, "output": str(tmp_path / name), "epochs": 3})
        for name in ("two", "one")
    ]
    for config, processes in zip(configs, (2, 1), strict=True):
        wait_for_all(train(config, tmp_path, processes))
    equals(configs[0].output, configs[1].output)
    logs = [checkpoint.read_log(config.output) for config in configs]
    for first, second in zip(*logs, strict=True):
        assert first.get("eval_accuracy") == pytest.approx(second.get("eval_accuracy"))
        assert first.get("accuracy") == pytest.approx(second.get("accuracy"))


@pytest.mark.slow
def test_running_statistics_are_those_of_the_first_process(tmp_path: Path) -> None:
    """As torch's DDP has it. Each process counts its own rows."""
    import transformers

    base = write_vit(tmp_path / "vit").rename(tmp_path / "resnet")
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    config = transformers.ResNetConfig(**sizes, layer_type="basic")
    transformers.ResNetModel(config).save_pretrained(base)
    data = write_rows(tmp_path / "rows.jsonl", rows_of("image"))
    fields = {"base": str(base), "data": str(data), "task": "classify", "precision": "fp32"}
    run = {"targets": "all", "batch_size": 4, "max_steps": 4, "save_every": 2}
    config = make_config({**fields, **run, "output": str(tmp_path / "run")})
    wait_for_all(train(config, tmp_path, 2))
    tensors = load_file(config.output / "adapter" / "adapter_model.safetensors")
    counts = [value for name, value in tensors.items() if name.endswith("num_batches_tracked")]
    assert counts
    assert all(int(count) > 0 for count in counts)


def test_what_is_refused_is_refused_once(
    make: Make, tmp_path: Path, finished: tuple[Any, str]
) -> None:
    said = wait_for_all(train(finished[0], tmp_path, 2), 2)
    assert said.count("holds a finished run") == 1
    other = make("other", batch_size=3)
    said = wait_for_all(train(other, tmp_path, 2), 2)
    assert said.count("batch_size 3 × grad_accum 1 = 3 examples a step, over 2 processes") == 1
    assert not other.output.exists()


@pytest.mark.slow
def test_no_rehearsal_in_several_processes(make: Make, tmp_path: Path) -> None:
    said = wait_for_all(train(make("run"), tmp_path, 2, "--dry-run"), 2)
    assert said.count("run it without a launcher") == 1


#: one process alone meets an error
FAILS = {
    "data": "import veneer.train.data as data\nif rank == 1:\n    data.raw_rows = lambda *_: 1 / 0",
    "other data": (
        "import veneer.train.data as data\nraw = data.raw_rows\n"
        "if rank == 1:\n    data.raw_rows = lambda *a: (raw(*a)[0][1:], 'other')"
    ),
    "step": (
        "import veneer.train.sft_trainer as trainer\nloss = trainer.AdapterTrainer.compute_loss\n"
        "def fails(self, *args, **kwargs):\n"
        "    if rank == 1 and self.state.global_step == 3:\n        raise MemoryError('no room')\n"
        "    return loss(self, *args, **kwargs)\n"
        "trainer.AdapterTrainer.compute_loss = fails"
    ),
    "gone": (
        "import os, signal\nimport veneer.train.sft_trainer as trainer\nloss = trainer.AdapterTrainer.compute_loss\n"
        "def dies(self, *args, **kwargs):\n"
        "    if rank == 1 and self.state.global_step == 3:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return loss(self, *args, **kwargs)\n"
        "trainer.AdapterTrainer.compute_loss = dies"
    ),
    "disk": (
        "import veneer.train.sft_trainer as trainer\nsave = trainer.AdapterTrainer._save_optimizer_and_scheduler\n"
        "def fails(self, folder):\n"
        "    if rank == 0:\n        raise OSError(28, 'No space left on device', folder)\n"
        "    return save(self, folder)\n"
        "trainer.AdapterTrainer._save_optimizer_and_scheduler = fails"
    ),
}
TOLD = {
    "data": "division by zero", "other data": "data that differs by rank", "step": "no room", "disk": "no space",
    "gone": "is gone",
}  # fmt: skip


@pytest.mark.parametrize(
    "where", ["step", *(pytest.param(w, marks=pytest.mark.slow) for w in FAILS if w != "step")]
)
def test_an_error_of_one_process_ends_all(make: Make, tmp_path: Path, where: str) -> None:
    config = make("run", **{**CHANGES, "save_every": 2})
    programs = train(config, tmp_path, 2, before=FAILS[where])
    said = wait_for_all(programs, 1, 2, -signal.SIGKILL)
    assert TOLD[where] in said
    assert ("is gone" in said) == (where == "gone")
    assert not list(config.output.glob(".*.tmp"))
    assert not (config.output / "adapter").exists()


@pytest.mark.slow
def test_a_signal_to_one_stops_all_and_any_number_goes_on(make: Make, tmp_path: Path) -> None:
    changes = {
        **CHANGES,
        "max_steps": 12,
    }  # Adam's steps let a rounding grow: to 2e-4 of a loss by step 20
    config, whole = make("run", **changes, save_every=1000), make("whole", **changes)
    stop = "import os, signal\nfrom transformers import TrainerCallback\n"
    stop += "import veneer.train.callbacks as watch\nbegins = watch.StopOnNan.on_log\n"
    stop += "def on_log(self, args, state, *rest, **kwargs):\n"
    stop += "    if rank == 1 and state.global_step == 7:\n        os.kill(os.getpid(), signal.SIGTERM)\n"
    stop += "    return begins(self, args, state, *rest, **kwargs)\n"
    stop += "watch.StopOnNan.on_log = on_log"
    said = wait_for_all(train(config, tmp_path, 2, before=stop), 130)
    assert said.count("Stopped at step 8 with a checkpoint") == 1
    assert checkpoint.newest(config.output)[1] == 8
    wait_for_all(train(config, tmp_path, 1))
    fit(whole, quiet=True)
    equals(config.output, whole.output)


def test_shares() -> None:
    fields = {"base": "b", "data": "d", "output": "o"}

    def own(processes: int, **changes: Any) -> tuple[int, int]:
        config = share_config(make_config({**fields, **changes}), processes, compares_rows=False)
        return config.batch_size, config.grad_accum

    assert own(1, batch_size=7, grad_accum=3) == (7, 3)
    assert own(2, batch_size=8) == (4, 1)
    assert own(2, batch_size=8, grad_accum=4) == (8, 2)
    assert own(2, batch_size=8, grad_accum=3) == (6, 2)
    assert own(4, batch_size=5, grad_accum=4) == (5, 1)
    assert own(3, batch_size=7, grad_accum=3) == (7, 1)
    for number, batch, accumulated in itertools.product(range(2, 9), range(1, 9), range(1, 4)):
        config = make_config({**fields, "batch_size": batch, "grad_accum": number * accumulated})
        mine = share_config(
            config, number, compares_rows=True
        )  # what is advised where a step does not divide
        assert (mine.batch_size, mine.grad_accum) == (batch, accumulated)
    for changes in ({"batch_size": 3}, {"batch_size": 4}):
        with pytest.raises(ConfigError, match="set grad_accum to a multiple of 2"):
            share_config(make_config({**fields, **changes}), 2, compares_rows=True)


@pytest.mark.parametrize(("parallel", "own_batch"), [("ddp", 6), ("fsdp", 6), ("tp", 12)])
def test_an_epoch_has_the_steps_of_one_process(
    make: Make, parallel: str, own_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes that cut the matrices of the base all compute the rows of one."""

    def count_steps(batch_size: int) -> int:
        config = make(parallel=parallel, batch_size=batch_size, epochs=10, eval_fraction=0.0)
        return prepare_data(ALL_TASKS["sft"](config))[1].steps

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert count_steps(12) == 40
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert count_steps(own_batch) == 40


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("rows", [1, 5, 24, 47, 49])
def test_rows_of_a_step_are_those_of_one_process(rows: int, processes: int) -> None:
    batch, step = 2, 24
    sampler = EpochSampler([1 + i % 5 for i in range(rows)], step, seed=3)
    sampler.set_epoch(2)
    order = [*sampler]
    shares = [[*ShareSampler(sampler, batch, rank, processes)] for rank in range(processes)]
    assert {len(own) for own in shares} == {len(ShareSampler(sampler, batch, 0, processes))}
    passes = step // batch // processes
    seen = []
    for start in range(0, len(shares[0]), passes):
        rows_of_step = [
            row for own in shares for batch_of in own[start : start + passes] for row in batch_of
        ]
        real = [row for row in rows_of_step if row >= 0]
        assert {*real} == {*order[len(seen) : len(seen) + step]}
        seen += real
    assert sorted(seen) == [*range(rows)]


# : that the weights of the base are spread, all or those that are cut, and those of the adapter are
# not; and a run by
#: tensor parallelism before the one by FSDP2
SPREAD = """
from pathlib import Path
from torch.distributed.tensor import DTensor
import veneer.train.sft_trainer as trainer
from veneer.train.config import load_config
from veneer.train.run import fit
steps = trainer.AdapterTrainer.training_step
def step(self, model, *args, **kwargs):
    frozen = [p for p in model.parameters() if not p.requires_grad]
    spread = [p for p in frozen if isinstance(p, DTensor)]
    assert len(spread) == 14 if self.processes.share_count == 1 else spread == frozen
    assert not any(isinstance(p, DTensor) for p in model.parameters() if p.requires_grad)
    assert sum(p.to_local().numel() for p in spread) < 0.6 * sum(p.numel() for p in spread)
    return steps(self, model, *args, **kwargs)
trainer.AdapterTrainer.training_step = step
fit(load_config(Path({cut!r})), quiet=True)
"""
#: prints (tensor, bytes of it that are read, all of its bytes) of each read of a file
READ = """
import json
import veneer.train.processes as processes
from veneer.models.safetensors_dir import Checkpoint
read, seen, end = Checkpoint.read, [], processes.leave
def counted(self, name, rows=None):
    found = read(self, name, rows)
    seen.append([name, found.nbytes, self.bytes(name)])
    return found
def ends(output):
    print("read", json.dumps(seen))
    end(output)
Checkpoint.read, processes.leave = counted, ends
"""


def test_a_base_that_is_spread_or_cut_trains_what_one_process_does(
    make: Make, tmp_path: Path
) -> None:
    changes = {**CHANGES, **SHORT}
    spread, whole = make("spread", **changes, parallel="fsdp"), make("one", **changes)
    cut = make("cut", **changes, parallel="tp")
    (tmp_path / "cut.yaml").write_text(yaml.safe_dump(cut.content()))
    said = wait_for_all(
        train(spread, tmp_path, 2, before=SPREAD.format(cut=str(tmp_path / "cut.yaml")) + READ)
    )
    assert re.search(r"\nMemory .* in each\n", said)
    assert "does nothing" not in said
    shares = [json.loads(line[5:]) for line in said.splitlines() if line.startswith("read ")]
    for own, other in zip(
        *shares, strict=True
    ):  # of each tensor each process reads a part, both together all of it
        assert (own[0], own[2], own[1] + other[1]) == (other[0], other[2], own[2])
        assert 0 < own[1] < own[2]
    assert len(shares[0]) == len({name for name, *_ in shares[0]}) == 20
    assert "each process reads the whole base" not in said
    fit(whole, quiet=True)
    for config in (spread, cut):
        equals(config.output, whole.output)
        record = [
            (folder / "adapter" / "veneer.json").read_text()
            for folder in (config.output, whole.output)
        ]
        bases = [json.loads(text)["base"] for text in record]
        assert bases[0] == bases[1]  # fingerprints of whole weights


#: what reads weights before the first step, or cannot begin with shares of them
BEGINNINGS = {
    "dora": {"variant": "dora"},
    "svd": {"variant": "pissa"},
    "inputs": {"variant": "eva"},
    "gradients": {"variant": "lora_ga"},
    "in full": {"train_also": ["norm", "lm_head"]},
    "tokens": {"add_tokens": ["<|new|>"]},
    "checkpointing": {"activation_checkpointing": True},
}
WHOLE = ("gradients", "tokens")


@pytest.mark.slow
@pytest.mark.parametrize("name", BEGINNINGS)
def test_fsdp_begins_as_one_process_does(make: Make, tmp_path: Path, name: str) -> None:
    changes = {**CHANGES, **SHORT, "batch_size": 6, **BEGINNINGS[name]}
    config, whole = make("several", **changes, parallel="fsdp"), make("one", **changes)
    said = wait_for_all(train(config, tmp_path, 3))
    assert ("each process reads the whole base" in said) is (name in WHOLE)
    wait_for_all(train(whole, tmp_path, 1))
    equals(config.output, whole.output)


@pytest.mark.slow
def test_fsdp_with_a_new_head(base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [TASKS["classify"](i) for i in range(21)])
    fields = {
        "base": str(base),
        "data": str(data),
        "task": "classify",
        "precision": "fp32",
        "eval_fraction": 0.25,
    }
    both = [("fsdp", 2), ("ddp", 1)]
    configs = [
        make_config({**fields, "output": str(tmp_path / name), "parallel": name})
        for name, _ in both
    ]
    for config, (_, processes) in zip(configs, both, strict=True):
        wait_for_all(train(config, tmp_path, processes))
    equals(configs[0].output, configs[1].output)


@pytest.mark.slow
def test_checkpoints_are_whole_whoever_wrote_them(make: Make, tmp_path: Path) -> None:
    """4 processes spread, then 2, then 1, then 3 spread: each stops after some steps, and the next
    goes on."""
    changes = {**CHANGES, "batch_size": 12, "max_steps": 20, "save_every": 5}
    config, whole = make("run", **changes), make("whole", **changes)
    stop = "import os\nfrom transformers import Trainer\nstep, seen = Trainer.training_step, []\n"
    stop += "def stopping(self, *args, **kwargs):\n    seen.append(self)\n"
    stop += "    if len(seen) == 4:\n        self.stop.requested = True\n"
    stop += "        self.stop.stopped = self.stop.single_process\n"
    stop += "    return step(self, *args, **kwargs)\nTrainer.training_step = stopping"
    for processes, parallel in ((4, "fsdp"), (2, "ddp"), (1, "ddp")):
        wait_for_all(train(config, tmp_path, processes, "--parallel", parallel, before=stop), 130)
    wait_for_all(train(config, tmp_path, 3, "--parallel", "fsdp"))
    fit(whole, quiet=True)
    equals(config.output, whole.output)


def test_what_cannot_be_spread_is_refused(make: Make, tmp_path: Path) -> None:
    config = json.loads((Path(make().base) / "config.json").read_text())
    (tmp_path / "packed").mkdir()
    packed = {
        **config,
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    }
    (tmp_path / "packed" / "config.json").write_text(json.dumps(packed))
    cases = {
        "quantize": {"quantize": "nf4"},
        "a quantised base": {"base": str(tmp_path / "packed")},
        "cache_lower": {"cache_lower": True},
        "invocation": {"invocation": "<c>"},
    }
    for why, changes in cases.items():
        with pytest.raises(ConfigError, match=f"fsdp with {why}"):
            check_divided_settings(make(parallel="fsdp", **changes), 2)
    check_divided_settings(make(parallel="fsdp"), 2)
    check_divided_settings(make(parallel="fsdp", shard_size=2), 4)
    with pytest.raises(ConfigError, match="shard_size 4 of 6 processes"):
        check_divided_settings(make(parallel="fsdp", shard_size=4), 6)
    with pytest.raises(ConfigError, match="shard_size is for parallel fsdp; found parallel ddp"):
        make(shard_size=2)
