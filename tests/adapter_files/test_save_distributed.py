"""Saving from several processes: whole tensors of the base and the adapter, one writer, one outcome
on every rank."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.support.extras import needs
from tests.support.processes import done_by_two
from tests.support.tiny import tiny_model
from tests.support.toys import error, randomise
from torch import nn

import veneer
from veneer import distributed
from veneer.distributed import full_tensor
from veneer.errors import (
    AdapterError,
    CheckError,
    MergeError,
    OutputExistsError,
    SelectionError,
    TargetError,
)

# the ranks are processes of their own, of which no ImportError tells
pytestmark = [pytest.mark.filterwarnings("ignore"), needs("transformers", "peft")]

IDS = torch.arange(4 * 6).view(4, 6) % 250 + 3
STEPS = 3
CONFIGS = {
    "lora": {"rank": 4, "targets": "all-linear"},
    "dora": {"rank": 3, "targets": ["q_proj", "down_proj"], "variant": "dora"},
    "pissa": {"rank": 3, "targets": ["q_proj", "down_proj"], "variant": "pissa"},
    "in full": {"rank": 2, "targets": ["q_proj"], "train_also": ["lm_head", "norm"]},
    "parts": {
        "rank": 2,
        "targets": ["q_proj"],
        "slices": {"q_proj": [True, False]},
        "variant": "dora",
    },
}


def attached(config: str = "lora") -> tuple[Any, veneer.Handle]:
    torch.manual_seed(0)
    model = tiny_model(tie_word_embeddings=False).train()
    handle = veneer.attach(model, veneer.LoraConfig(**CONFIGS[config]))
    torch.manual_seed(1)
    randomise(handle, 0.1)
    return model, handle


def shard(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model


def train(run: nn.Module, handle: veneer.Handle, rows: slice) -> None:
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    for _ in range(STEPS):
        run(input_ids=IDS[rows]).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def fails(kind: type[Exception], text: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=text):
        call()


# ------------------------------------------------------------------------------------------ what
# the ranks do


def fsdp_trains_and_saves(rank: int, folder: Path) -> None:
    for config in CONFIGS:
        model, handle = attached(config)
        shard(model)
        train(model, handle, slice(2 * rank, 2 * rank + 2))
        assert handle.save(folder / config) == folder / config
        with torch.no_grad():
            model(
                input_ids=IDS
            )  # after which the root holds gathered copies, which no step reaches
        ours, whole = handle.summary(), attached(config)[1].summary()
        assert (ours.trainable, ours.total, ours.bytes) == (
            whole.trainable,
            whole.total,
            whole.bytes,
        )
        assert handle.save(folder / f"{config} again", base_name="x").is_dir()


def a_stale_copy_is_not_saved(rank: int, folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    model, handle = attached()
    fully_shard(model)
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    model(input_ids=IDS).logits.square().mean().backward()
    with torch.no_grad():
        model(input_ids=IDS)
    optimizer.step()
    handle.save(folder / "adapter")


def save_pretrained_beside_other_files(rank: int, folder: Path) -> None:
    model, handle = attached()
    shard(model)
    handle.save(folder / "alone")
    for way, options in (("every rank", {}), ("main process", {"is_main_process": rank == 0})):
        (folder / way).mkdir(
            exist_ok=True
        )  # as a trainer's checkpoint, which holds the optimiser already
        (folder / way / "optimizer.pt").write_bytes(b"state")
        dist.barrier()
        model.save_pretrained(folder / way, **options)
    # as accelerate's `get_state_dict`, of which torch gives the other processes an empty dict
    state = {name: full_tensor(value) for name, value in model.state_dict().items()}
    options = {"is_main_process": rank == 0, "state_dict": state if rank == 0 else {}}
    model.save_pretrained(folder / "gathered", **options)


def ddp_saves_on_every_rank(rank: int, folder: Path) -> None:
    model, handle = attached()
    run = nn.parallel.DistributedDataParallel(model)
    train(run, handle, slice(2 * rank, 2 * rank + 2))
    assert veneer.save(run, folder / "adapter") == folder / "adapter"
    assert (folder / "adapter" / "adapter_config.json").exists()
    fails(OutputExistsError, "which exists", lambda: handle.save(folder / "adapter"))
    handle.save(folder / "adapter", overwrite=True)
    if rank == 0:
        handle.save(folder / "one", alone=True)
    handle.save(folder / f"own-{rank}")  # each to a path of its own: nobody has to be waited for


def ranks_that_differ_keep_the_old_folder(rank: int, folder: Path) -> None:
    _, handle = attached()
    handle.save(folder / "adapter")
    old = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(
                rank
            )  # values that differ by rank: one of them saved would be zeroed on the other
    text = "differs by rank .* on rank 0 and .* on rank 1"
    fails(AdapterError, text, lambda: handle.save(folder / "adapter", overwrite=True))
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == old
    _, handle = attached()
    with torch.no_grad():
        handle.model.model.layers[0].self_attn.q_proj.weight.add_(rank)  # another base
    fails(AdapterError, "differs by rank", lambda: handle.save(folder / "adapter", overwrite=True))
    _, handle = attached("lora" if rank else "dora")  # other adapters
    fails(
        AdapterError,
        "an adapter that differs by rank",
        lambda: handle.save(folder / "adapter", overwrite=True),
    )
    _, handle = attached()
    if rank == 1:
        next(iter(handle.parameters())).data.fill_(float("nan"))
    fails(AdapterError, "differs by rank", lambda: handle.save(folder / "adapter", overwrite=True))
    for parameter in handle.parameters():
        parameter.data.fill_(float("nan"))
    fails(AdapterError, "not finite", lambda: handle.save(folder / "adapter", overwrite=True))
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == old
    assert sorted(path.name for path in folder.iterdir()) == ["adapter"]


def a_rank_that_fails_or_stays_away_is_an_error(rank: int, folder: Path) -> None:
    distributed.PATIENCE = distributed.SOLO_PATIENCE = 2.0
    model, handle = attached()
    dist.barrier()
    if rank == 0:  # the idiom of DDP: it works, and says what it could not do
        with pytest.warns(distributed.SavedAlone, match="saved by rank 0 of 2 alone, after 2 s"):
            handle.save(folder / "alone")
    dist.barrier()
    handle.save(
        folder / "together"
    )  # on every rank: they meet although one of them has had a save more
    shard(model)
    if rank == 0:
        fails(AdapterError, "rank 0 of 2 alone", lambda: handle.save(folder / "adapter"))
    dist.barrier()
    fails(
        AdapterError,
        "alone=True of a model whose weights",
        lambda: handle.save(folder / "adapter", alone=True),
    )
    fails(
        AdapterError, "other paths on other ranks", lambda: handle.save(folder / f"adapter-{rank}")
    )
    if rank == 1:

        def broken(*_: Any) -> Any:
            raise RuntimeError("on purpose")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("veneer.adapter_files.save_load.peft_entries", broken)
            fails(RuntimeError, "^on purpose", lambda: handle.save(folder / "adapter"))
    else:
        fails(AdapterError, "On rank 1: on purpose", lambda: handle.save(folder / "adapter"))
    assert sorted(path.name for path in folder.iterdir()) == ["alone", "together"]
    dist.barrier()
    distributed.PATIENCE, distributed.SOLO_PATIENCE = 300.0, 30.0


def trainers_let_rank_0_save(rank: int, folder: Path) -> None:
    model, handle = attached()
    run = nn.parallel.DistributedDataParallel(model)
    train(run, handle, slice(2 * rank, 2 * rank + 2))
    if rank == 0:
        started = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("error", distributed.SavedAlone)
            model.save_pretrained(folder / "new")
            model.save_pretrained(folder / "new")  # among the files that are there
        assert time.monotonic() - started < distributed.SOLO_PATIENCE
    dist.barrier()
    handle.save(folder / "together")
    shard(model)
    state = {key: full_tensor(value) for key, value in model.state_dict().items()}
    if rank == 0:  # as Trainer does under FSDP
        model.save_pretrained(folder / "whole state", state_dict=state)


def what_needs_whole_weights_is_refused(rank: int, folder: Path) -> None:
    model, handle = attached()
    handle.save(folder / "adapter")
    shard(model)
    for _ in range(2):
        fails(MergeError, "a merge of a model whose weights are spread", handle.merge)
        fails(
            CheckError,
            "a check of a model whose weights are spread",
            lambda: veneer.check(model, IDS),
        )
        fails(veneer.VeneerError, "weights are spread", lambda: veneer.attach(model, name="other"))
        fails(
            AdapterError,
            "weights are spread",
            lambda: veneer.load(model, folder / "adapter", name="other"),
        )
        fails(
            SelectionError, "a bank of a model whose weights are spread", lambda: veneer.Bank(model)
        )
        with torch.no_grad():
            model(
                input_ids=IDS
            )  # the root's parameters are plain tensors from here on, and no less spread


def fsdp1_saves_what_it_has_gathered(rank: int, folder: Path) -> None:
    """And is refused by name elsewhere, with nothing written."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model, handle = attached("dora")
    cpu = torch.device("cpu")
    wrapped: Any = FullyShardedDataParallel(model, use_orig_params=True, device_id=cpu)
    train(wrapped, handle, slice(rank * 2, rank * 2 + 2))
    fails(AdapterError, "FSDP1", lambda: handle.save(folder / "adapter"))
    fails(MergeError, "FSDP1", handle.merge)
    fails(TargetError, "FSDP1", lambda: veneer.attach(wrapped, veneer.LoraConfig(), "b"))
    assert not (folder / "adapter").exists()
    for name in (
        "adapter",
        "again",
    ):  # what was gathered is let go of, so that it can be gathered once more
        with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
            handle.save(folder / name)
    train(wrapped, handle, slice(rank * 2, rank * 2 + 2))
    inner, handle = attached("dora")
    inner.model.layers[0] = FullyShardedDataParallel(
        inner.model.layers[0], use_orig_params=True, device_id=cpu
    )
    with FullyShardedDataParallel.summon_full_params(inner, writeback=False):
        fails(AdapterError, "FSDP1", lambda: handle.save(folder / "inner"))


TASKS = (
    fsdp_trains_and_saves,
    save_pretrained_beside_other_files,
    a_stale_copy_is_not_saved,
    ddp_saves_on_every_rank,
    ranks_that_differ_keep_the_old_folder,
    a_rank_that_fails_or_stays_away_is_an_error,
    trainers_let_rank_0_save,
    what_needs_whole_weights_is_refused,
    fsdp1_saves_what_it_has_gathered,
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    """`ran(task)`: the folder in which two processes did a task, once they have done all of
    them."""
    return done_by_two(TASKS, tmp_path_factory.mktemp("ranks"))


# ------------------------------------------------------------------------------------------ what
# comes of it


def same_folder(one: Path, other: Path) -> None:
    for file in ("adapter_model.safetensors", "veneer.safetensors"):
        assert (one / file).exists() == (other / file).exists()
        if (one / file).exists():
            ours, theirs = load_file(one / file), load_file(other / file)
            assert ours.keys() == theirs.keys()
            for key, value in ours.items():
                assert value.shape == theirs[key].shape
                assert error(value, theirs[key]) < 1e-5, key
    ours, theirs = veneer.adapter_files.read(one).record, veneer.adapter_files.read(other).record
    assert ours["base"]["weights"] == theirs["base"]["weights"]  # of whole weights: the very base


def test_fsdp2_saves_what_one_process_trains(ran: Any, tmp_path: Path) -> None:
    import peft

    fsdp = ran(fsdp_trains_and_saves)
    for config in CONFIGS:
        model, handle = attached(config)
        train(model, handle, slice(None))
        handle.save(tmp_path / "one" / config)
        same_folder(fsdp / config, tmp_path / "one" / config)
        same_folder(fsdp / f"{config} again", fsdp / config)
        plain = tiny_model(tie_word_embeddings=False)
        veneer.load(plain, fsdp / config)
        with torch.no_grad():
            expected = model.eval()(input_ids=IDS).logits
            assert error(plain(input_ids=IDS).logits, expected) < 1e-5
            if config in ("lora", "dora"):
                base = tiny_model(tie_word_embeddings=False)
                theirs = peft.PeftModel.from_pretrained(base, str(fsdp / config)).eval()
                assert error(theirs(input_ids=IDS).logits, expected) < 1e-5


def test_what_fsdp2_has_gathered_before_a_step_is_not_saved(ran: Any, tmp_path: Path) -> None:
    folder = ran(a_stale_copy_is_not_saved)
    model, handle = attached()
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    model(input_ids=IDS).logits.square().mean().backward()
    start = copy.deepcopy([p.detach() for p in handle.parameters()])
    optimizer.step()
    assert any(
        error(p, before) > 1e-4 for p, before in zip(handle.parameters(), start, strict=True)
    )
    handle.save(tmp_path / "one")
    same_folder(folder / "adapter", tmp_path / "one")


def test_save_pretrained_of_spread_weights_leaves_what_lies_in_the_folder(ran: Any) -> None:
    folder = ran(save_pretrained_beside_other_files)
    for way in ("every rank", "main process"):
        assert {path.name for path in (folder / way).iterdir()} >= {
            "optimizer.pt",
            "adapter_config.json",
        }
        assert (folder / way / "optimizer.pt").read_bytes() == b"state"
        assert not [path for path in (folder / way).iterdir() if path.is_dir()]
        (folder / way / "optimizer.pt").unlink()
        same_folder(folder / "alone", folder / way)
    same_folder(folder / "alone", folder / "gathered")


def test_ddp_saves_once_and_every_rank_returns_the_path(ran: Any, tmp_path: Path) -> None:
    folder = ran(ddp_saves_on_every_rank)
    model, handle = attached()
    train(model, handle, slice(None))
    handle.save(tmp_path / "single")
    for name in ("adapter", "one", "own-0", "own-1"):
        same_folder(folder / name, tmp_path / "single")


def test_ranks_that_differ_are_one_error_and_the_old_folder_stays(ran: Any) -> None:
    ran(ranks_that_differ_keep_the_old_folder)


def test_a_rank_that_fails_or_stays_away_is_an_error_on_the_others_before_long(ran: Any) -> None:
    ran(a_rank_that_fails_or_stays_away_is_an_error)


def test_what_needs_whole_weights_is_refused_of_spread_ones(ran: Any) -> None:
    ran(what_needs_whole_weights_is_refused)


def test_the_main_process_of_a_trainer_saves_without_the_others(ran: Any) -> None:
    folder = ran(trainers_let_rank_0_save)
    same_folder(folder / "new", folder / "together")
    same_folder(folder / "whole state", folder / "together")


def test_fsdp1_saves_what_it_has_gathered(ran: Any, tmp_path: Path) -> None:
    folder = ran(fsdp1_saves_what_it_has_gathered)
    model, handle = attached("dora")
    train(model, handle, slice(None))
    handle.save(tmp_path / "single")
    for name in ("adapter", "again"):
        same_folder(folder / name, tmp_path / "single")
