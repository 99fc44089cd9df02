"""The configurations of examples/ train: a few steps each, on the words that examples/words.py
writes."""

from __future__ import annotations

import json
import math
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from examples import words
from tests.support.tasks import BASES
from tests.support.tiny import write_tiny

from veneer.train.config import load_config, task_names
from veneer.train.run import fit
from veneer.train.sweep.search import Search
from veneer.train.sweep.sweep_run import sweep
from veneer.train.sweep.sweep_settings import load_sweep

ROOT = Path(__file__).resolve().parent.parent
# : but `pronounce.yaml`, that of the demo, on its data, which test_docs.py runs, and `sweep.yaml`,
# which is many runs
APART = ("pronounce", "sweep")
FILES = {
    file.stem: file for file in sorted((ROOT / "examples").glob("*.yaml")) if file.stem not in APART
}
#: what stands in for a file's base in the quick tests, where it is not the tiny Llama
TINY = {"classify": "bert", "embed": "bert", "seq2seq": "bart", "quantized": "wide"}
#: rows of 4-bit weights are multiples of 64
WIDE = partial(write_tiny, hidden_size=64, intermediate_size=128)
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
named = pytest.mark.parametrize("name", FILES)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder from which the examples run as from the repository."""
    folder = tmp_path_factory.mktemp("examples")
    words.write(folder / "out" / "words", 200)
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


def trained(name: str, place: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    monkeypatch.chdir(place)
    if name == "quantized":
        pytest.importorskip("bitsandbytes")
    config = load_config(
        FILES[name].relative_to(ROOT), max_steps=2, eval_every=2, overwrite=True, **changes
    )
    result = fit(config, quiet=True)
    assert len(result.losses) == 2
    assert all(map(math.isfinite, result.losses))
    record = json.loads((result.adapter / "veneer.json").read_text())["provenance"]
    assert record["task"]["name"] == config.task
    assert (result.prompt is None) == (name in ("classify", "embed", "reward", "seq2seq"))


def test_each_task_has_its_file_of_less_than_ten_lines() -> None:
    assert {*task_names()} <= FILES.keys()
    for name, file in FILES.items():
        assert len(file.read_text().splitlines()) < 10
        assert load_config(file).task == (name if name in task_names() else "sft")


@pytest.mark.slow
def test_the_sweep_finds_one_of_its_candidates(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    if not (place / "llama").exists():
        BASES["llama"](place / "llama")
    found = sweep(
        *load_sweep(ROOT / "examples" / "sweep.yaml", base=str(place / "llama"), max_steps=3),
        quiet=True,
    )
    assert len(found.facts["candidates"]) == 3 * 2 * 3
    assert load_config(found.best / "train.yaml").max_steps == 3


def test_the_sweep_is_one() -> None:
    config, section = load_sweep(ROOT / "examples" / "sweep.yaml")
    assert Search(section, config.max_steps or 0).count == 3 * 2 * 3
    assert len((ROOT / "examples" / "sweep.yaml").read_text().splitlines()) < 12


@named
def test_an_example_trains(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = TINY.get(name, "llama")
    base = place / kind
    if not base.exists():
        WIDE(base) if kind == "wide" else BASES[kind](base)
    trained(name, place, monkeypatch, base=str(base))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in FILES if name != "seq2seq"]
)  # its base lies on the hub
def test_an_example_trains_its_own_base(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_config(FILES[name]).base.removeprefix("package:")
    if find_spec(base) is None:
        pytest.skip(f"{base} is not installed")
    trained(name, place, monkeypatch)
