"""``veneer.set_default``: the adapter of calls that select none."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.tiny import tiny_model
from tests.support.toys import randomise
from torch import Tensor, nn

import veneer
from veneer.errors import MethodError, SelectionError

X = torch.randn(3, 8)


def two_adapters() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    for name in ("a", "b"):
        randomise(veneer.attach(model, veneer.LoraConfig(rank=2), name))
    return model


def output(model: nn.Module, name: str | None) -> Tensor:
    with veneer.use(model, name):
        return model(X)


def test_a_call_without_a_selection_uses_the_default_and_use_overrides_it() -> None:
    model = two_adapters()
    a, b, base = (output(model, name) for name in ("a", "b", None))
    with pytest.raises(SelectionError, match=r"set_default\(model, name\)"):
        model(X)
    veneer.set_default(model, "b")
    assert torch.equal(model(X), b)
    for name, expected in (("a", a), ("b", b), (None, base)):
        assert torch.equal(output(model, name), expected)
    with veneer.use(model, ["a", None, "b"]):
        assert torch.equal(model(X)[1], base[1])
    assert torch.equal(model(X), b)
    veneer.set_default(model, None)
    with pytest.raises(SelectionError, match="none selected"):
        model(X)
    with pytest.raises(SelectionError, match=r"named 'bb' \(nearest: 'b'\)"):
        veneer.set_default(model, "bb")


def test_the_default_holds_in_every_thread_in_copies_and_in_pickles() -> None:
    model = two_adapters()
    b = output(model, "b")
    veneer.set_default(model, "b")
    with ThreadPoolExecutor(2) as pool:
        assert all(torch.equal(result, b) for result in pool.map(model, [X, X]))
    duplicates = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for duplicate in duplicates:
        assert torch.equal(duplicate(X), b)
        veneer.set_default(duplicate, "a")
    assert torch.equal(model(X), b)


def test_a_detached_default_is_cleared_and_does_not_come_back() -> None:
    model = two_adapters()
    a = output(model, "a")
    veneer.set_default(model, "b")
    randomise(veneer.attach(model, veneer.LoraConfig(rank=2), "c"))
    veneer.detach(model, "c")
    assert torch.equal(model(X), output(model, "b"))
    veneer.detach(model, "b")
    assert torch.equal(model(X), a)
    randomise(veneer.attach(model, veneer.LoraConfig(rank=2), "b"))
    with pytest.raises(SelectionError, match="2 adapters"):
        model(X)


def test_the_default_is_meant_where_no_adapter_is_named(tmp_path: Path) -> None:
    model = two_adapters()
    with pytest.raises(SelectionError, match="no name"):
        veneer.summarise(model)
    veneer.set_default(model, "b")
    assert veneer.summarise(model).is_default
    assert str(veneer.summarise(model)).startswith("adapter 'b', the model's default\n")
    assert not veneer.summarise(model, "a").is_default
    veneer.check(model, X)
    report = veneer.merge(model)
    assert report is not None
    torch.testing.assert_close(model(X), output(model, "b"))
    veneer.unmerge(model)
    restored = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    restored.load_state_dict(two_bases(model))
    veneer.load(restored, veneer.save(model, tmp_path / "saved"))
    torch.testing.assert_close(restored(X), model(X))


def two_bases(model: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in model.state_dict().items() if "veneer" not in key}


def test_a_handle_is_one_line() -> None:
    model: Any = tiny_model()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2), "style")
    assert repr(handle) == "<Handle 'style' of LlamaForCausalLM: lora, rank 2>"
    veneer.set_default(model, "style")
    assert repr(handle) == "<Handle 'style' of LlamaForCausalLM: lora, rank 2, default>"
    handle.detach()
    assert repr(handle) == "<Handle 'style' of LlamaForCausalLM: detached>"
    with pytest.raises(SelectionError):
        veneer.set_default(model, "style")


@pytest.mark.filterwarnings("ignore::veneer.LoadedElsewhere")
def test_transformers_generates_and_saves_with_the_default(tmp_path: Path) -> None:
    model: Any = tiny_model()
    for name in ("a", "b"):
        randomise(veneer.attach(model, veneer.LoraConfig(rank=2), name))
    ids = torch.arange(5, 15)[None]
    with veneer.use(model, "b"):
        expected = model.generate(ids, max_new_tokens=4, do_sample=False)
        logits = model(ids).logits
    veneer.set_default(model, "b")
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
    model.save_pretrained(tmp_path / "saved")
    again: Any = tiny_model()
    veneer.load(again, tmp_path / "saved", "restored")
    torch.testing.assert_close(again(ids).logits, logits)


def test_a_compiled_model_follows_the_default() -> None:
    torch.compiler.reset()
    model = two_adapters().eval()
    a, b = output(model, "a"), output(model, "b")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for name, expected in (("a", a), ("b", b), ("a", a)):
        veneer.set_default(compiled, name)
        torch.testing.assert_close(compiled(X), expected)


def test_set_adapter_names_the_default() -> None:
    model = two_adapters()
    with pytest.raises(MethodError, match=r"veneer\.set_default\(model, name\)"):
        model.set_adapter("a")  # pyright: ignore[reportCallIssue]
