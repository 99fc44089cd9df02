"""The case of accelerate #4206: values that differ by rank are saved, zeroed and loaded by another
number of processes, bit-equal, for the adapter and its optimiser. Adapters that their user has
spread with ``fully_shard``, or copied by DDP; the adapter folder is Veneer's, the optimiser's state
torch's own (``torch.distributed.checkpoint``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.support.extras import needs
from tests.support.processes import together
from tests.support.tiny import tiny_model
from torch import Tensor, nn

import veneer
from veneer.distributed import full_tensor, is_sharded

# the ranks are processes of their own, of which no ImportError tells
pytestmark = [pytest.mark.filterwarnings("ignore"), needs("transformers")]

CONFIG = {"rank": 3, "targets": ["q_proj", "down_proj"], "variant": "dora", "train_also": ["norm"]}


def held(way: str, model: nn.Module) -> tuple[nn.Module, Any]:
    """The model as its ranks hold it, and Adam with a state."""
    run = model
    if way == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for block in model.model.layers:  # pyright: ignore[reportGeneralTypeIssues, reportAttributeAccessIssue]
            fully_shard(block)
        fully_shard(model)
        assert all(map(is_sharded, trained(model)))
    elif dist.get_world_size() > 1:
        run = nn.parallel.DistributedDataParallel(model)
    optimiser = torch.optim.Adam(trained(model), lr=0.1)
    for parameter in trained(model):
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()  # makes the state, and moves nothing
    return run, optimiser


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def tensors(model: nn.Module, optimiser: Any) -> dict[str, Tensor]:
    """What is trained, and what the optimiser knows of it."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[name] = parameter.data
            found |= {f"{name} {key}": value for key, value in optimiser.state[parameter].items()}
    return found


def numbers(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: full_tensor(value).detach().clone() for name, value in values.items()}


def same(values: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert values.keys() == others.keys()
    assert [name for name, value in values.items() if not torch.equal(value, others[name])] == []


def parts(values: dict[str, Tensor]) -> list[Any]:
    here: list[Any] = [*values.values()]
    return [value.to_local() if is_sharded(value) else value for value in here]


def one_number_of_processes(rank: int, way: str, folder: Path, number: int) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    before, after = folder / str(number - 1), folder / str(number)
    model = tiny_model(tie_word_embeddings=False).train()
    if number == 0:
        veneer.attach(model, veneer.LoraConfig(**CONFIG))
    else:
        veneer.load(model, before / "adapter", trainable=True)
    run, optimiser = held(way, model)

    def load(place: Path) -> None:
        state = get_optimizer_state_dict(run, optimiser)
        dcp.load({"optimiser": state}, checkpoint_id=place / "optimiser")
        set_optimizer_state_dict(run, optimiser, state)

    if number:  # what another number of processes has saved
        load(before)
        same(numbers(tensors(model, optimiser)), torch.load(before / "expected.pt"))

    # values of its own on each rank: of its shards, or, of copies, the same on all
    generator = torch.Generator().manual_seed(100 * number + (rank if way == "fsdp" else 0))
    for value in parts(tensors(model, optimiser)):
        if value.ndim:  # a step is a count
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    expected = numbers(tensors(model, optimiser))
    assert all(bool((value != 0).all()) for value in expected.values())
    veneer.save(run, after / "adapter")
    dcp.save(
        {"optimiser": get_optimizer_state_dict(run, optimiser)}, checkpoint_id=after / "optimiser"
    )
    if rank == 0:
        torch.save(expected, after / "expected.pt")
    for value in parts(tensors(model, optimiser)):
        value.zero_()
    assert not any(bool(value.any()) for value in numbers(tensors(model, optimiser)).values())
    again = tiny_model(tie_word_embeddings=False).train()
    veneer.load(again, after / "adapter", trainable=True)
    load(after)
    states = {
        name: value for name, value in numbers(tensors(model, optimiser)).items() if " " in name
    }
    values = {
        name: parameter.data
        for name, parameter in again.named_parameters()
        if parameter.requires_grad
    }
    same({**values, **states}, expected)


@pytest.mark.parametrize(
    ("way", "counts"),
    [
        ("fsdp", (2, 1)),
        pytest.param("fsdp", (4, 2, 1, 3), marks=pytest.mark.slow),
        pytest.param("ddp", (4, 2, 1, 3), marks=pytest.mark.slow),
    ],
)
def test_saved_zeroed_and_loaded_bit_for_bit(
    way: str, counts: tuple[int, ...], tmp_path: Path
) -> None:
    for number, count in enumerate(counts):
        together(one_number_of_processes, count, way, tmp_path, number)
