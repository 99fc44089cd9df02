"""`veneer inspect --report` and `veneer compose --repair`, and the page in a browser."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.commands import refused
from tests.support.tiny import write_rows, write_tiny

from veneer.adapter_files.folder import read

Case = Callable[..., Any]


@pytest.fixture(scope="module")
def general(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {"text": "The cat sat on the mat, and the dog did not. " * 9},
        {"text": "Rain fell all day."},
    ]
    return write_rows(tmp_path_factory.mktemp("general") / "general.jsonl", rows)


@pytest.fixture(scope="module")
def strong(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained adapter, so large that it has intruders."""
    from veneer.tools.compose import compose

    return compose(adapter, tmp_path_factory.mktemp("strong") / "a", weights=[8]).path


def test_the_report_of_an_adapter_alone(veneer: Case, adapter: Path, tmp_path: Path) -> None:
    found = veneer("inspect", adapter, "--report", tmp_path / "look.html")
    assert found.code == 0, found.err
    assert "rank to use next" in found.out
    text = (tmp_path / "look.html").read_text()
    assert "How much of its rank is in use" in text
    assert "Forgetting" not in text
    assert "Without --base" in text


def test_everything_is_measured_and_the_same_as_json(
    veneer: Case, base: Path, data: Path, general: Path, adapter: Path, strong: Path, tmp_path: Path
) -> None:
    page = tmp_path / "look.html"
    found = veneer("inspect", strong, "--report", page, "--json", "--base", base, "--data", data, "--general", general,
                   "--with", adapter, "--precision", "fp32", "--intruders", 5)  # fmt: skip
    assert found.code == 0, found.err
    report = json.loads(found.out)["report"]
    rows = {(row["what"], row["at"]): row for row in report["losses"]["rows"]}
    assert {at for what, at in rows if what == "rank"} == {1, 2}
    assert {at for what, at in rows if what == "repaired"} == {0.5, 0.0}
    assert rows["rank", 1]["removed"] == report["cuts"][0]["lost"]
    assert rows["rank", 1]["general"] is None
    assert sum(layer["intruders"][0] for layer in report["layers"]) > 0
    assert all(layer["shared"]["read"] == pytest.approx(1) for layer in report["layers"])
    measured = json.loads(
        veneer("eval", base, data, "--adapter", strong, "--precision", "fp32", "--json").out
    )  # the loss is that which `veneer eval` says
    for what, name in (("base", "base"), ("adapter", "adapter")):
        assert rows[what, None]["data"] == pytest.approx(measured[name]["loss"], rel=1e-5)
    text = page.read_text()
    for row in rows.values():
        for name in ("data", "general"):
            assert row[name] is None or f"{row[name]:.4f}" in text
    assert f"{rows['repaired', 0.5]['removed']:.1%}" in text

    out = veneer("compose", tmp_path / "repaired", strong, "--repair", "--base", base, "--factor", 0.5, "--intruders",
                 5, "--json")  # fmt: skip
    assert out.code == 0, out.err
    facts = json.loads(out.out)
    assert facts["intruders"] == sum(layer["intruders"][0] for layer in report["layers"])
    assert facts["removed"] == pytest.approx(rows["repaired", 0.5]["removed"])
    assert read(tmp_path / "repaired").metadata["provenance"]["repaired"]["factor"] == 0.5
    again = json.loads(veneer("eval", base, data, "--adapter", tmp_path / "repaired", "--precision", "fp32", "--json",
                              "--only-adapter").out)  # fmt: skip
    assert again["adapter"]["loss"] == pytest.approx(rows["repaired", 0.5]["data"], rel=1e-4)


def test_names_are_text(veneer: Case, adapter: Path, tmp_path: Path) -> None:
    """Whatever a folder is called."""
    odd = tmp_path / "<b>a&b"
    odd.symlink_to(adapter, target_is_directory=True)
    assert veneer("inspect", odd, "--report", tmp_path / "look.html").code == 0
    text = (tmp_path / "look.html").read_text()
    assert "&lt;b&gt;a&amp;b" in text
    assert "<b>a" not in text


def test_what_a_report_refuses(
    veneer: Case,
    base: Path,
    data: Path,
    adapter: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    page = tmp_path / "look.html"
    refused(veneer("inspect", adapter, "--base", base), "--base without --report")
    values = {"intruders": 3, "batch-size": 2, "precision": "fp32", "device": "cpu"}
    for flag, value in values.items():
        refused(veneer("inspect", adapter, f"--{flag}", value), f"--{flag} without --report")
    refused(veneer("inspect", adapter, "--report", tmp_path / "look.pdf"), r"a file \.html")
    refused(
        veneer("inspect", adapter, "--report", tmp_path / "nowhere" / "look.html"),
        "a folder that exists",
    )
    refused(veneer("inspect", adapter, "--report", page, "--data", data), "--data without --base")
    refused(veneer("inspect", adapter, "--report", page, "--with", tmp_path / "none"), "no folder")
    refused(
        veneer(
            "inspect", adapter, "--report", page, "--base", base, "--general", tmp_path / "none.txt"
        ),
        "Do: ",
    )
    other = write_tiny(tmp_path / "other", seed=5)
    refused(
        veneer("inspect", adapter, "--report", page, "--base", other),
        "another weight",
        "pass that base",
    )
    assert not page.exists()


def test_what_a_repair_refuses(veneer: Case, base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(veneer("compose", out, adapter, "--repair"), "--repair without --base")
    refused(veneer("compose", out, adapter, adapter, "--repair", "--base", base), "one adapter")
    refused(veneer("compose", out, f"{adapter}=0.5", "--repair", "--base", base), "one adapter")
    refused(
        veneer("compose", out, adapter, "--repair", "--base", base, "--rank", 2),
        "--repair with --rank",
    )
    refused(
        veneer("compose", out, adapter, "--repair", "--base", base, "--seed", 2),
        "--repair with --seed",
    )
    refused(
        veneer("compose", out, adapter, "--repair", "--base", base, "--factor", 3), r"in \[0, 1\]"
    )
    refused(veneer("compose", out, adapter, "--factor", 0.5), "without --repair")
    for options in ((), ("--method", "ties", "--density", 0.5), ("--rank", 2)):
        refused(veneer("compose", out, adapter, *options, "--seed", 2), "--seed with --method")
    assert not out.exists()


def test_without_an_intruder_the_change_is_made_smaller(
    veneer: Case, base: Path, general: Path, adapter: Path, tmp_path: Path
) -> None:
    page = tmp_path / "look.html"
    found = veneer("inspect", adapter, "--report", page, "--json", "--base", base, "--general", general, "--precision",
                   "fp32", "--intruders", 0)  # fmt: skip
    assert found.code == 0, found.err
    losses = json.loads(found.out)["report"]["losses"]
    assert [(row["what"], row["at"]) for row in losses["rows"]] == [
        ("base", None), ("adapter", None), ("weaker", 0.75), ("weaker", 0.5),
    ]  # fmt: skip
    assert losses["data"] is None
    assert len({row["general"] for row in losses["rows"]}) == 4
    assert "Forgetting" not in page.read_text()
    assert "ΔW × 0.75, evenly" in page.read_text()


def test_an_adapter_that_an_invocation_starts_is_measured_itself(
    veneer: Case, base: Path, general: Path, tmp_path: Path
) -> None:
    from tests.support.toys import randomise
    from transformers import AutoModelForCausalLM

    from veneer import LoraConfig, attach

    handle = attach(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(rank=2, invocation_tokens=[104])
    )
    randomise(handle, 0.05)
    handle.save(tmp_path / "a")
    page = tmp_path / "look.html"
    found = veneer("inspect", tmp_path / "a", "--report", page, "--json", "--base", base, "--general", general,
                   "--precision", "fp32", "--intruders", 0)  # fmt: skip
    assert found.code == 0, found.err
    rows = json.loads(found.out)["report"]["losses"]["rows"]
    assert [row["what"] for row in rows] == ["base", "adapter"]
    assert "It acts from its invocation tokens on" in page.read_text()


def test_the_next_rank_is_the_smallest_that_keeps_the_gain() -> None:
    from veneer.cli.inspect_report import _recommend_rank

    def rows(base: float, adapter: float, *cuts: float) -> list[dict[str, Any]]:
        whole = [
            {"what": "base", "at": None, "data": base},
            {"what": "adapter", "at": None, "data": adapter},
        ]
        return [
            *whole,
            *({"what": "rank", "at": 2**power, "data": loss} for power, loss in enumerate(cuts)),
        ]

    assert _recommend_rank(rows(2.0, 1.0, 1.5, 1.005, 1.0), 8) == (
        2,
        "truncated to rank 2 it keeps 99.5% of what it gained on the data",
    )
    assert _recommend_rank(rows(2.0, 1.0, 1.5, 1.02), 8) == (
        8,
        "no truncation keeps 99% of what it gained on the data",
    )
    assert _recommend_rank(rows(2.0, 1.0), 8) is None
    assert _recommend_rank(rows(1.0, 1.0, 1.0), 8) is None
