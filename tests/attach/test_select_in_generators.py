"""A selection in a generator holds while the generator runs: never for its caller, nor for another
generator."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager

import pytest
import torch
from tests.support.models import IDS, TinyLM
from tests.support.toys import error, randomise
from torch import nn

import veneer
from veneer import context
from veneer.errors import SelectionError

CHOICES = ["a", "b", None, {"a": 0.5, "b": 0.5}, ["a", "b"], [None, {"a": 0.5}]]


def two_adapters():
    """A model with the adapters a and b, and what it makes of each choice."""
    model, outputs = TinyLM(), {}
    for name in ("a", "b"):
        randomise(veneer.attach(model, veneer.LoraConfig(rank=2, targets="all"), name))
    for choice in CHOICES:
        with veneer.use(model, choice), torch.no_grad():
            outputs[repr(choice)] = model(IDS)
    return model, outputs


@pytest.fixture(scope="module")
def case():
    return two_adapters()


@pytest.fixture(autouse=True)
def nothing_stays_open():
    yield
    gc.collect()
    assert not context._OPEN_BLOCKS
    assert context.current is context._EMPTY_CONTEXT


def a_block_a_step(model, choice, steps=3):
    for _ in range(steps):
        with veneer.use(model, choice):
            yield model(IDS)


def held(model, choice, steps=3):
    with veneer.use(model, choice):
        for _ in range(steps):
            with torch.no_grad():
                y = model(IDS)
            yield y


def through_exit_stack(model, choice, steps=3):
    with ExitStack() as stack:
        stack.enter_context(veneer.use(model, choice))
        yield from plain_steps(model, steps)


def plain_steps(model, steps):
    for _ in range(steps):
        with torch.no_grad():
            y = model(IDS)
        yield y


@contextmanager
def selection_of(model, choice):
    with veneer.use(model, choice):
        yield


def through_context_manager(model, choice, steps=3):
    with selection_of(model, choice):
        yield from held(model, choice, 1)
        yield from plain_steps(model, steps - 1)


def nested(model, choice, steps=3):
    with veneer.use(model, "a" if choice == "b" else "b"), veneer.use(model, choice):
        yield from plain_steps(model, steps)


@pytest.mark.parametrize(
    "form", [a_block_a_step, held, through_exit_stack, through_context_manager, nested]
)
@pytest.mark.parametrize("choice", CHOICES, ids=repr)
def test_generators_that_are_advanced_in_turn_use_their_own_adapters(case, form, choice):
    model, outputs = case
    for first, second in [(choice, "b"), ("b", choice)]:
        pairs = zip(form(model, first), form(model, second), strict=True)
        for y, other in pairs:
            assert torch.equal(y, outputs[repr(first)])
            assert torch.equal(other, outputs[repr(second)])


def test_generators_may_be_left_closed_or_collected_in_any_order(case):
    model, outputs = case
    first, second, third, fourth = (held(model, name) for name in ("a", "b", None, "a"))
    for generator, name in ((first, "a"), (second, "b"), (third, None), (fourth, "a")):
        assert torch.equal(next(generator), outputs[repr(name)])
    first.close()
    assert torch.equal(next(second), outputs["'b'"])
    del fourth
    with pytest.raises(ZeroDivisionError):
        second.throw(ZeroDivisionError)
    assert torch.equal(next(third), outputs["None"])
    assert len([*third]) == 1
    with veneer.use(model, "b"), torch.no_grad():
        assert torch.equal(model(IDS), outputs["'b'"])


def test_a_generator_in_a_cycle_is_collected(case):
    model, _ = case

    class Streamer:
        def __init__(self):
            self.generator = self.steps()
            next(self.generator)

        def steps(self):
            with veneer.use(model, "a"):
                yield self

    Streamer()
    gc.collect()
    assert not context._OPEN_BLOCKS


def test_a_call_between_two_steps_is_an_error_unless_it_selects_for_itself(case):
    model, outputs = case
    generator = held(model, "a")
    next(generator)
    with pytest.raises(
        SelectionError, match=r"outside of a generator that is suspended inside of .* 'a'"
    ):
        model(IDS)
    for name in ("b", None):
        with veneer.use(model, name), torch.no_grad():
            assert torch.equal(model(IDS), outputs[repr(name)])
            assert torch.equal(next(generator), outputs["'a'"]), (
                "the generator's block is the inner one"
            )
    generator.close()
    with pytest.raises(SelectionError, match="2 adapters"):
        model(IDS)


def test_a_block_around_the_loop_over_a_generator_is_no_selection_between_its_steps(case):
    model, outputs = case
    with torch.no_grad(), veneer.use(model, "b"):
        for y in held(model, "a", 1):
            assert torch.equal(y, outputs["'a'"])
            with pytest.raises(SelectionError, match="outside of a generator"):
                model(IDS)
        assert torch.equal(model(IDS), outputs["'b'"])


def test_other_models_are_free_between_two_steps(case):
    model, outputs = case
    other, others = two_adapters()
    generator = held(model, "a")
    next(generator)
    with veneer.use(other, "b"), torch.no_grad():
        assert torch.equal(other(IDS), others["'b'"])
        assert torch.equal(next(generator), outputs["'a'"])
        with pytest.raises(SelectionError, match="outside of a generator"):
            model(IDS)
    generator.close()


@pytest.mark.filterwarnings("ignore")  # torch.compile's own deprecations
def test_compiled_models_follow_generators():
    model, x, outputs = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4), {}
    for name in ("a", "b"):
        randomise(veneer.attach(model, veneer.LoraConfig(rank=2), name))
        with veneer.use(model, name):
            outputs[name] = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")

    def steps(name):
        with veneer.use(model, name):
            yield compiled(x)
            yield compiled(x)

    for y, other in zip(steps("a"), steps("b"), strict=True):
        assert error(y, outputs["a"]) < 1e-5
        assert error(other, outputs["b"]) < 1e-5
    generator = steps("b")
    next(generator)
    with pytest.raises(SelectionError, match="outside of a generator"):
        compiled(x)
    with veneer.use(model, "a"):
        assert error(compiled(x), outputs["a"]) < 1e-5
    generator.close()


def test_path_belongs_to_the_steps_too(case):
    model, _ = case

    def paths():
        with veneer.use(model, "a", path="materialised"):
            yield context.current.path
            yield context.current.path

    generator = paths()
    assert next(generator) == "materialised"
    assert context.current.path is None
    with veneer.use(model, "a", path="factored"):
        assert next(generator) == "materialised"
    generator.close()


@pytest.mark.parametrize("copied", [False, True], ids=["bare threads", "copied contexts"])
def test_steps_may_run_in_other_threads(case, copied):
    """Web frameworks run each step of a generator in whichever thread is free, in a copy of their
    context."""
    model, outputs = case
    generators = [(held(model, name), name) for name in ("a", "b", None)]
    with ThreadPoolExecutor(2) as threads:
        for _ in range(3):
            for generator, name in generators:
                step = (contextvars.copy_context().run, next) if copied else (next,)
                assert torch.equal(threads.submit(*step, generator).result(), outputs[repr(name)])
        for generator, _ in generators:
            assert threads.submit(next, generator, "end").result() == "end"


def test_a_block_of_another_thread_is_not_touched_by_a_generator(case):
    model, outputs = case
    generator, wrong = held(model, "a", 50), []

    def steps():
        wrong.extend(not torch.equal(y, outputs["'a'"]) for y in generator)

    thread = threading.Thread(target=steps)
    with veneer.use(model, "b"), torch.no_grad():
        next(generator)
        thread.start()
        while thread.is_alive():
            with veneer.use(model, "b"):
                wrong.append(not torch.equal(model(IDS), outputs["'b'"]))
        thread.join()
        assert torch.equal(model(IDS), outputs["'b'"])
    assert not any(wrong)


async def async_held(model, choice, steps=3):
    with veneer.use(model, choice):
        for step in range(steps):
            await asyncio.sleep(0)
            if step % 2:
                y = await asyncio.to_thread(model, IDS)
            else:
                (y,) = await asyncio.gather(async_call(model))
            yield y


async def async_call(model):
    await asyncio.sleep(0)
    with torch.no_grad():
        return model(IDS)


def test_async_generators_use_their_own_adapters(case):
    model, outputs = case

    async def both():
        first, second = async_held(model, "a"), async_held(model, "b")
        for _ in range(3):
            assert torch.equal(await anext(first), outputs["'a'"])
            assert torch.equal(await anext(second), outputs["'b'"])
            for call in (
                async_call(model),
                asyncio.to_thread(model, IDS),
                asyncio.create_task(async_call(model)),
            ):
                with pytest.raises(SelectionError, match="outside of a generator"):
                    await call
            with veneer.use(model, None):
                assert torch.equal(await asyncio.to_thread(async_free, model), outputs["None"])
        await first.aclose()
        assert [y async for y in second] == []
        with pytest.raises(SelectionError, match="2 adapters"):
            await async_call(model)

    async def many():
        await asyncio.gather(*(both() for _ in range(3)))

    asyncio.run(many())


def async_free(model):
    with torch.no_grad():
        return model(IDS)


def test_a_task_that_outlives_the_step_it_was_made_in_is_told_so(case):
    model, _ = case

    async def run():
        tasks, leave = [], asyncio.Event()

        async def late():
            await leave.wait()
            return await async_call(model)

        async def steps():
            with veneer.use(model, "a"):
                tasks.append(asyncio.create_task(late()))
                yield
            yield

        generator = steps()
        await anext(generator)
        await anext(generator)
        leave.set()
        with pytest.raises(SelectionError, match="outside of a generator"):
            await tasks[0]
        await generator.aclose()

    asyncio.run(run())


@asynccontextmanager
async def async_selection_of(model, choice):
    with veneer.use(model, choice):
        yield


def test_a_context_manager_that_is_written_as_a_generator_holds_for_its_block(case):
    model, outputs = case
    with selection_of(model, "a"), torch.no_grad():
        assert torch.equal(model(IDS), outputs["'a'"])
        with selection_of(model, "b"), ExitStack() as stack:
            stack.enter_context(selection_of(model, None))
            assert torch.equal(model(IDS), outputs["None"])
        assert torch.equal(model(IDS), outputs["'a'"])

    async def run():
        async with async_selection_of(model, "b"):
            return await async_call(model)

    assert torch.equal(asyncio.run(run()), outputs["'b'"])


def test_a_fixture_that_yields_holds_for_its_test(case):
    """Driven as pytest drives one of a module."""
    from _pytest.fixtures import call_fixture_func

    model, outputs = case

    def fixture():
        with veneer.use(model, "b"):
            yield

    finalizers = []

    class Request:
        addfinalizer = staticmethod(finalizers.append)

    call_fixture_func(fixture, Request, {})  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        assert torch.equal(model(IDS), outputs["'b'"])
    finalizers[0]()


def test_a_decorated_generator_selects_in_its_steps_alone(case):
    model, outputs = case

    @veneer.use(model, "a")
    def steps(count):
        """Steps."""
        sent = []
        try:
            while len(sent) < count:
                sent.append((yield model(IDS)))
        except KeyError:
            yield "caught"
        finally:
            steps.last = model(IDS)
        return sent

    with torch.no_grad(), veneer.use(model, "b"):
        generator = steps(2)
        assert torch.equal(next(generator), outputs["'a'"])
        assert torch.equal(model(IDS), outputs["'b'"])
        assert torch.equal(generator.send(1), outputs["'a'"])
        with pytest.raises(StopIteration) as end:
            generator.send(2)
        assert end.value.value == [1, 2]
        generator = steps(2)
        next(generator)
        assert generator.throw(KeyError) == "caught"
        steps.last = None
        generator.close()
        assert torch.equal(steps.last, outputs["'a'"])
    assert steps.__name__ == "steps"
    assert steps.__doc__ == "Steps."


def test_functions_and_coroutines_are_decorated_alike(case):
    model, outputs = case
    with torch.no_grad():
        assert torch.equal(veneer.use(model, "a")(model)(IDS), outputs["'a'"])

    @veneer.use(model, "b")
    async def call():
        await asyncio.sleep(0)
        return await async_call(model)

    @veneer.use(model, "a")
    async def steps():
        try:
            while (yield await async_call(model)) is None:
                pass
        except KeyError:
            yield "caught"
        finally:
            steps.last = await async_call(model)

    async def run():
        generator = steps()
        assert torch.equal(await anext(generator), outputs["'a'"])
        assert torch.equal(await call(), outputs["'b'"])
        with pytest.raises(SelectionError, match="2 adapters"):
            await async_call(model)
        assert await generator.athrow(KeyError) == "caught"
        with pytest.raises(StopAsyncIteration):
            await generator.asend(1)
        assert torch.equal(steps.last, outputs["'a'"])

    asyncio.run(run())


def test_a_block_that_is_left_out_of_order_says_so(case):
    model, _ = case
    outer, inner = veneer.use(model, "a"), veneer.use(model, "b")
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(SelectionError, match="left out of order"):
        outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    outer.__exit__(None, None, None)
    with pytest.raises(SelectionError, match="left out of order"):
        outer.__exit__(None, None, None)


def test_rows_of_a_bank_belong_to_the_steps_too(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    x, expected = torch.randn(2, 4), {}
    for name in ("a", "b"):
        handle = veneer.attach(model, veneer.LoraConfig(rank=2), name)
        nn.init.normal_(handle.changes["0.weight"].B)  # pyright: ignore[reportArgumentType]
        with handle.use(), torch.no_grad():
            expected[name] = model(x)
        handle.save(tmp_path / name)
        handle.detach()
    bank = veneer.Bank(model, capacity_bytes=1 << 20)
    for name in expected:
        bank.register(name, tmp_path / name)

    def steps(name):
        with bank.rows([name, name]):
            for _ in range(3):
                yield model(x)

    for first, second in zip(steps("a"), steps("b"), strict=True):
        assert error(first, expected["a"]) < 1e-6
        assert error(second, expected["b"]) < 1e-6
    generator = steps("a")
    next(generator)
    with pytest.raises(SelectionError, match="outside of a generator"):
        model(x)
    generator.close()
