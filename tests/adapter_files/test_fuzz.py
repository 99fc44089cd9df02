"""The fuzzer: some hundred mutants here, ten thousand by `make test-slow`; and that it sees what it
is made to see."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from scripts.fuzz import __main__ as fuzz
from scripts.fuzz import judge
from scripts.fuzz.mutations import MUTATIONS
from tests.support.processes import CONTEXT


def failures(outcomes) -> list:
    return [outcome for outcome in outcomes if outcome.kind == "failure"]


def test_some_mutants(monkeypatch):
    monkeypatch.setattr(fuzz.multiprocessing, "get_context", lambda _: CONTEXT)
    outcomes = fuzz.run(count=300, seed=7)
    assert [outcome.number for outcome in outcomes] == list(range(300))
    assert failures(outcomes) == []
    assert {outcome.mutation for outcome in outcomes} == set(MUTATIONS)
    assert {outcome.kind for outcome in outcomes} == {"refused", "harmless", "different"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_mutants():
    assert failures(fuzz.run(count=10_000, seed=1)) == []


@pytest.fixture(scope="module")
def stands():
    with tempfile.TemporaryDirectory() as folder:
        fuzz._write(Path(folder))
        yield judge.stands_in(Path(folder))


def some(stands, mutation, count=30) -> list:
    """The outcomes of mutants of one kind."""
    real = dict(MUTATIONS)
    MUTATIONS.clear()
    MUTATIONS[mutation] = real[mutation]
    try:
        return [judge.judge_mutant(number, 3, stands) for number in range(count)]
    finally:
        MUTATIONS.clear()
        MUTATIONS.update(real)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("mutation", "sabotage", "value", "words"),
    [
        (
            "flip_data", "veneer.adapter_files.folder.require_unchanged", lambda checks, path: None,
            "no hash was made|verify",
        ),
        (
            "put_number", "veneer.adapter_files.folder.number_problems", lambda tensors, do: iter(()),
            "verify|not finite",
        ),
        ("truncate", "veneer.adapter_files.folder.read_tensors", lambda path: 1 / 0, "ZeroDivisionError"),
        ("more_files", "scripts.fuzz.judge.BYTES", -(2**40), "MiB of memory"),
        ("more_files", "scripts.fuzz.judge._as_it_was", lambda stand, model: False, "not what it was"),
        ("truncate", "veneer.fileio.untrusted.sentence", lambda *words: "no", "does not say what was found"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_fuzzer_sees_a_reader_that_is_broken(
    stands, monkeypatch, mutation, sabotage, value, words
):
    monkeypatch.setattr(sabotage, value)
    found = failures(some(stands, mutation))
    assert found
    assert any(any(word in outcome.text for word in words.split("|")) for outcome in found), found[
        0
    ]


@pytest.mark.filterwarnings("ignore")
def test_a_pickle_that_ran_would_end_the_process(stands):
    """It is one that ends whoever reads it: torch.load would, without its weights_only."""
    assert failures(some(stands, "pickles")) == []


def dies(pipe, folder, seed, numbers):
    pipe.send(numbers[0])
    os._exit(99)


def hangs(pipe, folder, seed, numbers):
    pipe.send(numbers[0])
    while True:
        pass


@pytest.mark.parametrize(("target", "words"), [(dies, "exit code 99"), (hangs, "no end within")])
def test_a_process_that_dies_or_hangs_is_a_failure(tmp_path, monkeypatch, target, words):
    monkeypatch.setattr(fuzz, "SECONDS", 0.5)
    monkeypatch.setattr(fuzz.multiprocessing, "get_context", lambda _: CONTEXT)
    (outcome,) = fuzz._watch(tmp_path, 0, range(5, 9), target)
    assert (outcome.number, outcome.kind) == (5, "failure")
    assert words in outcome.text


def test_one_mutant_is_the_same_each_time(stands):
    first, again = (judge.judge_mutant(11, 5, stands) for _ in range(2))
    assert (first.mutation, first.notes, first.kind) == (again.mutation, again.notes, again.kind)
