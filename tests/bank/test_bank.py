"""Many adapters on one base: each row of a batch equals the same row under its own adapter
alone."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading

import pytest
import torch
from tests.support.cells import pairwise
from tests.support.models import IDS, Stack, TinyLM
from tests.support.tiny import tiny_model
from tests.support.toys import adapt, calibration, error, example, flat
from torch.utils import _pytree as pytree

import veneer
from veneer.errors import AdapterError, BankFullError, BaseMismatchError, SelectionError
from veneer.layers import LAYERS, Layer
from veneer.variants import VARIANTS

# transformers' Conv1D is a kind only once transformers has been imported
import transformers.pytorch_utils  # noqa: F401  # isort: skip

from tests.support.rows import ROWS, rows_of  # isort: skip
from tests.support.banks import Linears, alone, save_adapters

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

STORED = [name for name in VARIANTS.names() if VARIANTS[name].peft is not None]


def first(y):
    return next(leaf for leaf in pytree.tree_leaves(y) if isinstance(leaf, torch.Tensor))


# every option of a kind with one variant, every variant on one example of each kind;
# docs/support.md has all of them
CASES = [(case, "lora") for case in ROWS]
CASES += [(case, name) for case in ROWS if case[1] == 0 for name in STORED if name != "lora"]
CASES = [
    case
    for case in CASES
    if not ("inputs" in VARIANTS[case[1]].needs and type(LAYERS[case[0][0]]).inputs is Layer.inputs)
]


@pytest.mark.parametrize(("kind", "number", "variant"), pairwise(CASES))
def test_mixed_rows_equal_each_adapter_alone(kind, number, variant, tmp_path):
    module, args = example(kind, number)
    module(*args)  # an embedding's max_norm writes into its rows when they are first read
    config = veneer.LoraConfig(rank=2, targets="all", variant=variant)
    save_adapters(module, tmp_path, "a", "b", config=config, **calibration(module, variant, args))
    count, axis = rows_of(module, args)
    names = list(itertools.islice(itertools.cycle(["a", None, "b"]), count))
    whole = {name: alone(module, tmp_path, name, *args) for name in set(names)}
    bank = veneer.Bank(module)
    bank.add(tmp_path / "a")
    bank.add(tmp_path / "b")
    with bank.rows(names), torch.no_grad():
        mixed = module(*args)
    for row, name in enumerate(names):
        expected = first(whole[name]).select(axis, row)
        assert error(first(mixed).select(axis, row), expected) < 1e-5
    bank.close()
    assert type(module).__name__ == type(example(kind, number)[0]).__name__
    assert not any("veneer" in key for key in module.state_dict())


@pytest.mark.parametrize(
    ("variant", "tokens"),
    pairwise(
        itertools.product(["lora", "rslora", "dora", "pissa", "loha", "vera"], [None, 1, 3, 400])
    ),
)
def test_ranks_scales_and_blends_in_one_batch(variant, tokens, tmp_path):
    torch.manual_seed(1)
    model = Linears()
    for name, rank in (("a", 2), ("b", 5), ("c", 1)):
        targets = "all" if name != "c" else ["two", "last"]
        bias = "targets" if name == "b" else "none"
        config = veneer.LoraConfig(rank=rank, targets=targets, variant=variant, bias=bias)
        save_adapters(model, tmp_path, name, config=config)
    x = torch.randn(6, 12) if tokens is None else torch.randn(6, tokens, 12)
    bank = veneer.Bank(model)
    for name in "abc":
        bank.add(tmp_path / name)
    rows = ["a", {"a": 0.7, "b": -0.3}, None, "c", {"c": 1.0}, {"a": 0.0}]
    with bank.rows(rows), torch.no_grad():
        mixed = model(x)
    # the definition: each weight W + Σ wᵢ (W'ᵢ - W)
    base = {key: value.detach().double() for key, value in model.state_dict().items()}
    merged = {}
    for name in "abc":
        own = Linears()
        own.load_state_dict({key: value.float() for key, value in base.items()})
        veneer.load(own, tmp_path / name).merge(keep=False)
        veneer.detach(own, keep_merged=True)
        merged[name] = {key: value.double() for key, value in own.state_dict().items()}
    for row, choice in enumerate(rows):
        mix = {} if choice is None else choice if isinstance(choice, dict) else {choice: 1.0}
        weights = {
            key: value + sum(weight * (merged[name][key] - value) for name, weight in mix.items())
            for key, value in base.items()
        }
        expected = torch.func.functional_call(
            Linears().double(), weights, (x[row : row + 1].double(),)
        )[0]
        assert error(mixed[row].double(), expected) < 1e-5, choice
    bank.close()


@pytest.mark.parametrize("make_model", [TinyLM, lambda: TinyLM(tied=True), Stack, tiny_model],
                         ids=["lm", "tied", "stack", "llama"])  # fmt: skip
@pytest.mark.parametrize("inference", [False, True])
def test_whole_models(make_model, inference, tmp_path):
    model = make_model().eval()
    save_adapters(model, tmp_path, "a", "b", "c")
    ids = torch.randint(3, 17, (7, 6))
    rows = ["a", None, "b", {"a": 0.5, "c": 0.5}, "b", "a", None]
    bank = veneer.Bank(model)
    for name in "abc":
        bank.register(name, tmp_path / name)
    with bank.rows(rows), torch.inference_mode(inference), torch.no_grad():
        mixed = first(model(ids))
    for row, choice in enumerate(rows):
        with bank.rows([choice]), torch.no_grad():
            assert error(mixed[row], first(model(ids[row : row + 1]))[0]) < 1e-5
    for row in (0, 1, 2):
        bank_free = alone(model, tmp_path, rows[row], ids[row : row + 1])
        assert error(mixed[row], first(bank_free)[0]) < 1e-5
    bank.close()


def test_generation_with_an_adapter_for_each_row(tmp_path):
    model = save_adapters(tiny_model(), tmp_path, "a", "b", size=1.0)
    ids = torch.randint(3, 200, (3, 5))
    bank = veneer.Bank(model)
    bank.add(tmp_path / "a")
    bank.add(tmp_path / "b")
    kwargs = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    mixed = bank.generate(ids, adapters=["a", None, "b"], **kwargs)
    beams = bank.generate(
        ids, adapters=["a", None, "b"], num_beams=3, num_return_sequences=2, **kwargs
    )
    for row, name in enumerate(["a", None, "b"]):
        with bank.rows([name]):
            assert torch.equal(mixed[row], model.generate(ids[row : row + 1], **kwargs)[0])
        with bank.rows([name] * 3):
            own = model.generate(ids[row : row + 1], num_beams=3, num_return_sequences=2, **kwargs)
        assert torch.equal(beams[2 * row : 2 * row + 2], own)


def test_the_model_is_untouched_outside_of_a_block(tmp_path):
    model = save_adapters(TinyLM(), tmp_path, "a")
    before, keys = flat(model(IDS)), list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    bank = veneer.Bank(model)
    bank.add(tmp_path / "a")
    assert list(model.state_dict()) == keys
    assert torch.equal(flat(model(IDS)), before)
    rows = ["a"] * len(IDS)
    with pytest.raises(RuntimeError, match="on purpose"), bank.rows(rows):
        raise RuntimeError("on purpose")
    assert torch.equal(flat(model(IDS)), before)
    bank.close()
    assert [type(module) for module in model.modules()] == classes
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert veneer.attach(model, veneer.LoraConfig(rank=2)).summary().trainable > 0


def test_an_adapter_of_the_models_own_stands_beside_a_bank(tmp_path):
    model = save_adapters(TinyLM(), tmp_path, "a")
    adapt(model, "own")
    with torch.no_grad():
        own = flat(model(IDS))
    bank = veneer.Bank(model)
    bank.add(tmp_path / "a")
    rows = ["a"] * len(IDS)
    with bank.rows(rows), torch.no_grad():
        banked = flat(model(IDS))
    assert torch.equal(flat(model(IDS)), own)
    assert not torch.equal(banked, own)
    veneer.detach(model)
    with bank.rows(rows), torch.no_grad():
        assert torch.equal(flat(model(IDS)), banked)
    for call in (veneer.merge, veneer.summarise, veneer.save):
        with pytest.raises(SelectionError, match="no adapters but those of a bank"):
            call(model, *([tmp_path / "out"] if call is veneer.save else []))
    bank.close()


def test_gradients_autocast_and_odd_calls_take_the_general_way(tmp_path):
    model = save_adapters(Linears(), tmp_path, "a", "b")
    x = torch.randn(4, 3, 12)
    bank = veneer.Bank(model)
    bank.add(tmp_path / "a")
    bank.add(tmp_path / "b")
    rows = ["a", "b", None, {"a": 2.0, "b": 1.0}]
    with bank.rows(rows):
        expected = model(x)
        seen = x.clone().requires_grad_()
        y = model(seen)
        y.square().sum().backward()
        with torch.autocast("cpu", torch.bfloat16):
            low = model(x)
        assert error(model(x=x), expected) < 1e-6
    assert error(y, expected) < 1e-5
    assert error(low.float(), expected) < 3e-2
    for row, choice in enumerate(rows):
        own = x[row : row + 1].clone().requires_grad_()
        with bank.rows([choice]):
            model(own).square().sum().backward()
        assert error(seen.grad[row], own.grad[0]) < 1e-5
    with bank.rows(["a", "b"]), pytest.raises(SelectionError, match="do not hold the 2 rows"):
        model(x)


def test_threads_and_tasks_mix_nothing_up(tmp_path):
    model = save_adapters(Linears(), tmp_path, *"abcd")
    bank = veneer.Bank(model)
    for name in "abcd":
        bank.register(name, tmp_path / name)
    x = torch.randn(4, 2, 12)
    choices = [list(rows) for rows in itertools.permutations("abcd")][:8]
    with torch.no_grad():
        expected = []
        for rows in choices:
            with bank.rows(rows):
                expected.append(model(x))
    wrong = []

    def call(number):
        for _ in range(40):
            with bank.rows(choices[number]), torch.no_grad():
                if error(model(x), expected[number]) > 1e-6:
                    wrong.append(number)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

    async def task(number):
        for _ in range(10):
            with bank.rows(choices[number]):
                await asyncio.sleep(0)
                with (
                    torch.no_grad()
                ):  # which belongs to the thread, and may not be held while others run
                    assert error(model(x), expected[number]) < 1e-6

    async def all_of_them():
        await asyncio.gather(*map(task, range(8)))

    asyncio.run(all_of_them())


def test_a_budget_of_bytes_decides_what_stays(tmp_path):
    model = save_adapters(Linears(), tmp_path, *"abcd")
    size = veneer.Bank(model)
    size.add(tmp_path / "a")
    one = size.nbytes
    size.close()
    bank = veneer.Bank(model, capacity_bytes=2 * one)
    events = []
    bank.on_event = lambda kind, name, seconds: events.append((kind, name))
    for name in "abcd":
        bank.register(name, tmp_path / name)
    x = torch.randn(1, 12)

    def use(*names):
        with bank.rows(list(names)), torch.no_grad():
            return model(x.expand(len(names), -1))

    def resident():
        return [one.name for one in bank.status() if one.resident]

    first_a = use("a")
    use("b")
    use("a")
    use("c")  # b was used longest ago
    assert resident() == ["a", "c"]
    assert events == [("load", "a"), ("load", "b"), ("evict", "b"), ("load", "c")]
    bank.pin("a")
    use("c")
    use("d")
    assert resident() == ["a", "d"]
    with pytest.raises(BankFullError, match="pinned or asked for"):
        use("b", "c")
    assert bank.nbytes <= 2 * one
    assert all(not status.users for status in bank.status())
    assert torch.equal(use("a"), first_a)
    bank.unpin("a")
    lease = bank.acquire({"a": 1.0}).result(10)
    use("b")
    assert "a" in resident()
    lease.release()
    lease.release()  # again does nothing
    with pytest.raises(SelectionError, match="released"), bank.rows([lease]):
        pass
    assert bank.prefetch("d").result(10) is not None
    assert "d" in resident()


def test_what_waits_to_be_loaded_holds_nothing(tmp_path):
    """A blend that waits behind a load must not keep in memory what that load has to evict."""
    model = save_adapters(Linears(), tmp_path, *"abc")
    size = veneer.Bank(model)
    one = size.add(tmp_path / "a") and size.nbytes
    size.close()
    bank = veneer.Bank(model, capacity_bytes=2 * one)
    for name in "abc":
        bank.register(name, tmp_path / name)
    lease = bank.acquire({"a": 1.0}).result(10)
    with bank._loading:  # a load that takes long
        first, second = bank.acquire({"b": 1.0}), bank.acquire({"a": 0.5, "c": 0.5})
        lease.release()
    first.result(10).release()
    second.result(10).release()
    bank.close()


def removed_and_added(bank, path):
    bank.remove("x")
    bank.add(path, "x")


def registered_anew(bank, path):
    bank.register("x", path, replace=True)


@pytest.mark.parametrize("change", [removed_and_added, registered_anew])
def test_a_name_that_comes_again_is_another_adapter(tmp_path, change):
    model = save_adapters(Linears(), tmp_path, "a", "b")
    expected = {name: alone(model, tmp_path, name, torch.ones(1, 12)) for name in "ab"}
    bank = veneer.Bank(model)
    bank.add(tmp_path / "a", "x")
    lease = bank.acquire({"x": 1.0}).result()
    with bank.rows(["x"]), torch.no_grad():
        assert error(model(torch.ones(1, 12)), expected["a"]) < 1e-6
        change(bank, tmp_path / "b")
        assert error(model(torch.ones(1, 12)), expected["a"]) < 1e-6  # the call goes on as it began
    with bank.rows(["x"]), torch.no_grad():
        assert error(model(torch.ones(1, 12)), expected["b"]) < 1e-6
    with bank.rows([lease]), torch.no_grad():
        assert error(model(torch.ones(1, 12)), expected["a"]) < 1e-6
    size = bank.nbytes
    lease.release()
    assert bank.nbytes == size // 2


def test_removed_adapters_leave_no_memory(tmp_path):
    import weakref

    model = save_adapters(Linears(), tmp_path, "a", "b")
    bank = veneer.Bank(model)
    bank.add(tmp_path / "a")
    bank.add(tmp_path / "b")
    with bank.rows(["a", "b"]), torch.no_grad():
        model(torch.randn(2, 12))
    held = weakref.ref(bank._entries["a"].resident)
    bank.remove("a")
    gc.collect()
    assert held() is None
    with bank.rows(["b"]), torch.no_grad():
        model(torch.randn(1, 12))
    with pytest.raises(SelectionError, match="no adapter named 'a'"), bank.rows(["a"]):
        pass


def test_what_cannot_be_used_is_refused(tmp_path):
    model = save_adapters(Linears(), tmp_path, "a")
    other = save_adapters(Linears(), tmp_path / "of", "another")
    assert other is not model
    bank = veneer.Bank(model)
    with pytest.raises(AdapterError, match="no folder"):
        bank.register("x", tmp_path / "nothing")
    with pytest.raises(BaseMismatchError):
        bank.add(tmp_path / "of" / "another")
    assert bank.names == ()
    bank.add(tmp_path / "a")
    with pytest.raises(SelectionError, match="taken"):
        bank.register("a", tmp_path / "a")
    for rows in ([], "a", {"a": 1.0}):
        with pytest.raises(SelectionError, match="one choice for each row"), bank.rows(rows):
            pass
    for row in ({"a": float("nan")}, {"a": True}, 3, {"b": 1.0}):
        with pytest.raises(SelectionError), bank.rows([row]):
            pass
    with bank.rows(["a"]), pytest.raises(SelectionError, match="in use"):
        bank.close()
    bank.register("broken", tmp_path / "of" / "another")
    future = bank.acquire({"broken": 1.0})
    with pytest.raises(BaseMismatchError):
        future.result(10)
    assert all(not status.users for status in bank.status())
    bank.close()
    with pytest.raises(SelectionError, match="closed"), bank.rows(["a"]):
        pass


def test_mixed_batches_in_bfloat16(tmp_path):
    """16-bit rows are as near to float32 as those of one adapter alone are."""
    model, ids = TinyLM().eval(), torch.randint(3, 17, (4, 9))
    save_adapters(model, tmp_path, "a", "b")
    names = ["a", "b", None, "a"]
    whole = {name: alone(model, tmp_path, name, ids) for name in ("a", "b", None)}
    model.bfloat16()
    low = {name: alone(model, tmp_path, name, ids) for name in ("a", "b", None)}
    bank = veneer.Bank(model)  # the base is recognised in bfloat16 too
    bank.register("a", tmp_path / "a")
    bank.register("b", tmp_path / "b")
    with bank.rows(names), torch.no_grad():
        mixed = model(ids)
    for row, name in enumerate(names):
        assert error(mixed[row], whole[name][row]) < 2 * error(low[name][row], whole[name][row])


def test_kinds_are_all_here():
    assert {kind for kind, _ in ROWS} | {"parameter"} == {kind.name for kind in LAYERS}


@pytest.mark.parametrize("variant", ["lora", "dora", "pissa", "lokr", "eva"])
def test_a_second_adapter_of_the_same_plan_is_as_exact_as_the_first(variant, tmp_path):
    model, x = Linears(), torch.randn(2, 12)
    config = veneer.LoraConfig(rank=2, targets="all", variant=variant)
    save_adapters(model, tmp_path, *"abc", config=config, **calibration(model, variant, (x,)))
    bank = veneer.Bank(model)
    for name in "abc":
        bank.add(tmp_path / name)
    for name in "abc":
        with bank.rows([name, name]), torch.no_grad():
            assert error(model(x), alone(model, tmp_path, name, x)) < 1e-6
    with (tmp_path / "c" / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(AdapterError):
        bank.add(tmp_path / "c", "altered")
