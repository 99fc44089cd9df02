"""The commands for a library and for remote places, and the three ways to name an adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from veneer.store.library import GRACE_SECONDS, INDEX, Library

Case = Callable[..., Any]


@pytest.fixture(autouse=True)
def _homes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VENEER_LIBRARY", str(tmp_path / "library"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def refused(found: Any, *parts: str) -> None:
    text = re.sub(r"\s+", " ", found.err)
    assert found.code == 2, found
    assert "Traceback" not in text
    for part in parts:
        assert re.search(part, text), f"{part!r} is not in: {text}"


def test_a_library_from_the_command_line(veneer: Case, adapter: Path, tmp_path: Path) -> None:
    found = veneer("add", adapter, "french", "--tag", "good", "--tag", "new")
    assert found.code == 0, found.err
    assert found.out.split() == ["french", str(Library(tmp_path / "library").get("french"))]
    assert veneer("add", adapter, "german").code == 0
    text = veneer("list").out
    for part in ("french", "german", "good, new", "lora", "KiB", "tiny"):
        assert part in text
    (entry,) = json.loads(veneer("list", "--tag", "good", "--json").out)
    assert (entry["name"], entry["rank"], entry["tags"]) == ("french", 4, ["good", "new"])
    assert veneer("tag", "french", "better", "--remove", "new").out == "french: good, better\n"
    assert veneer("rm", "german", "french").out == "removed german\nremoved french\n"
    assert json.loads(veneer("list", "--json").out) == []
    nothing = veneer("list")
    assert (nothing.code, nothing.out) == (0, "")
    assert "No such adapters" in nothing.err
    assert veneer("gc").out.startswith("deleted: adapters 0, leftovers 0, in all 0 B")
    assert veneer("gc", "--grace", 0).out.startswith("deleted: adapters 1, leftovers 0, in all ")
    other = tmp_path / "other"
    assert veneer("add", adapter, "x", "--library", other).code == 0
    assert [entry.name for entry in Library(other).list()] == ["x"]


def test_the_grace_of_the_command_is_that_of_the_library(veneer: Case) -> None:
    assert f"{GRACE_SECONDS}" in veneer("gc", "--help").out


def test_bad_names_are_one_message(veneer: Case, adapter: Path, tmp_path: Path) -> None:
    refused(veneer("add", adapter, "../x"), "letters, digits")
    refused(veneer("add", tmp_path / "none", "x"), "no folder")
    refused(veneer("rm", "x"), "no adapter 'x' in", "one that was added")
    refused(veneer("gc"), "no library in")
    refused(veneer("inspect", "library:x"), "no adapter 'x'")
    veneer("add", adapter, "x")
    refused(veneer("add", adapter, "x"), "a new name")
    assert veneer("add", adapter, "x", "--overwrite").code == 0
    refused(veneer("rm", "x", "y"), "no adapter 'y'")
    assert Library(tmp_path / "library").entry("x"), "all names or none"
    refused(veneer("tag", "x"), "no tag")


def test_a_damaged_index_is_mended_by_the_command_that_the_message_names(
    veneer: Case, adapter: Path, tmp_path: Path
) -> None:
    veneer("add", adapter, "x", "--tag", "t")
    (tmp_path / "library" / INDEX).write_text("{")
    refused(veneer("list"), "veneer gc --rebuild --library")
    refused(veneer("gc"), "veneer gc --rebuild --library")
    found = veneer("gc", "--rebuild", "--library", tmp_path / "library")
    assert found.out.startswith("kept 1 names, recovered none, lost none\n")
    assert Library(tmp_path / "library").entry("x").tags == ("t",)


def test_every_command_takes_a_name_of_the_library(
    veneer: Case, base: Path, data: Path, adapter: Path, tmp_path: Path
) -> None:
    veneer("add", adapter, "french")
    name = "library:french"
    assert json.loads(veneer("inspect", name, "--json").out)["verified"]
    one = veneer("generate", base, "--adapter", name, "--prompt", "1 + 2 =", "--max-new-tokens", 4)
    assert (one.code, one.out) == (
        0,
        veneer(
            "generate", base, "--adapter", adapter, "--prompt", "1 + 2 =", "--max-new-tokens", 4
        ).out,
    )
    assert "adapter" in json.loads(veneer("eval", base, data, "--adapter", name, "--json").out)
    assert veneer("merge", base, name, tmp_path / "merged").code == 0
    refused(veneer("merge", base, "library:frensh", tmp_path / "m"), "nearest: 'french'")


def test_push_and_pull(veneer: Case, adapter: Path, tmp_path: Path) -> None:
    store = f"file://{tmp_path}/store"
    veneer("add", adapter, "french")
    pushed = veneer("push", "library:french", store)
    assert pushed.code == 0, pushed.err
    place = pushed.out.strip()
    assert re.fullmatch(re.escape(store) + "@[0-9a-f]{64}", place)
    cached = Path(veneer("pull", place).out.strip())
    assert cached.is_relative_to(tmp_path / "cache" / "veneer" / "adapters")
    assert veneer("pull", store, tmp_path / "out").out == f"{tmp_path}/out\n"
    assert (tmp_path / "out" / "README.md").read_bytes() == (adapter / "README.md").read_bytes()
    refused(veneer("pull", store, tmp_path / "out"), "which exists")
    refused(veneer("pull", f"{store}2"), "nothing at")
    refused(veneer("push", adapter, store, "--private"), "they are the hub's")
    assert json.loads(veneer("inspect", store, "--json").out)["path"] == str(cached)
    assert veneer("add", place, "again").code == 0


def test_help(veneer: Case) -> None:
    for command in ("list", "add", "rm", "tag", "gc", "push", "pull"):
        found = veneer(command, "--help")
        assert found.code == 0
        assert f"veneer {command}" in found.out.split("Example", 1)[1]
        assert f" {command} " in veneer("--help").out


def test_training_writes_a_card_of_the_run(adapter: Path) -> None:
    text = (adapter / "README.md").read_text()
    for part in ("sums.jsonl", "learning_rate", "last_loss", "finished", "LlamaForCausalLM"):
        assert part in text
    assert "/sums.jsonl" not in text, "no path of the data"


def test_what_compares_and_converts_takes_names_too(
    veneer: Case, adapter: Path, tmp_path: Path
) -> None:
    assert veneer("add", adapter, "french").code == 0
    assert "identical" in veneer("diff", "library:french", adapter, "--exit-code").out
    found = veneer("convert", "library:french", tmp_path / "plain", "--to", "peft")
    assert found.code == 0, found.err
    assert veneer("diff", tmp_path / "plain", "library:french").code == 0
    refused(veneer("diff", adapter, "library:german"), "german")
