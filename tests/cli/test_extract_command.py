"""`veneer extract`: a merged model becomes an adapter again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Case = Callable[..., Any]


@pytest.fixture(scope="module")
def tuned(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from veneer.cli import run

    folder = tmp_path_factory.mktemp("tuned") / "merged"
    assert run(["merge", str(base), str(adapter), str(folder)]) == 0
    return folder


def test_a_merged_adapter_comes_back(
    veneer: Case, base: Path, tuned: Path, adapter: Path, tmp_path: Path
) -> None:
    found = veneer("extract", base, tuned, tmp_path / "out", "--rank", 4, "--layers", 3)
    assert found.code == 0, found.err
    assert re.search(r"weight +rank +‖ΔW‖/‖W‖ +kept +error +seconds +found", found.out)
    assert re.search(r"model\.layers\.\d\.\S+ +4 +\S+ +100\.00% +\S+ +\S+ +exact", found.out)
    assert "and 11 that keep more" in found.out
    assert "14 weights as products of rank 4" in found.out
    norms = [
        json.loads(veneer("inspect", path, "--json").out)["norms"]
        for path in (adapter, tmp_path / "out")
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert "100.00% of the change" in found.out
    again = veneer(
        "extract", base, tuned, tmp_path / "out", "--energy", 0.9, "--overwrite", "--json"
    )
    facts = json.loads(again.out)
    assert again.code == 0
    assert all(0.9 <= layer["kept"] <= 1 and layer["rank"] <= 4 for layer in facts["layers"])
    assert not facts["lost"]
    assert not list(tmp_path.glob(".*"))


def test_targets_and_keep(veneer: Case, base: Path, tuned: Path, tmp_path: Path) -> None:
    options = (
        "--rank",
        2,
        "--targets",
        "q_proj, v_proj",
        "--keep",
        "o_proj,none",
        "--exclude",
        "*.layers.1.*",
        "--json",
    )
    facts = json.loads(veneer("extract", base, tuned, tmp_path / "out", *options).out)
    assert {layer["path"].split(".")[-2] for layer in facts["layers"]} == {"q_proj", "v_proj"}
    assert [entry["path"] for entry in facts["whole"]] == ["model.layers.0.self_attn.o_proj.weight"]
    assert {entry["why"] for entry in facts["lost"]} == {"no target", "excluded"}


def test_a_regular_expression_keeps_its_commas(
    veneer: Case, base: Path, tuned: Path, tmp_path: Path
) -> None:
    targets = "re:.*q_proj.{0,7}"
    found = veneer(
        "extract", base, tuned, tmp_path / "out", "--rank", 2, "--targets", targets, "--json"
    )
    assert found.code == 0, found.err
    layers = json.loads(found.out)["layers"]
    assert {layer["path"].split(".")[-2] for layer in layers} == {"q_proj"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), r"rank=None and energy=None"),
        (("--rank", 4, "--energy", 0.5), r"rank=4 and energy=0.5"),
        (("--energy", 2), r"energy=2.0.*a share between 0 and 1"),
        (("--rank", 4, "--targets", "q_prj"), r"q_prj.*matches nothing"),
    ],
)
def test_bad_options(
    veneer: Case, base: Path, tuned: Path, tmp_path: Path, options: Any, words: str
) -> None:
    found = veneer("extract", base, tuned, tmp_path / "out", *options)
    assert found.code == 2
    assert "Traceback" not in found.err
    assert re.search(words, re.sub(r"\s+", " ", found.err))
    assert not (tmp_path / "out").exists()


def test_bad_models(veneer: Case, base: Path, tuned: Path, adapter: Path, tmp_path: Path) -> None:
    for one, other, words in (
        (base, base, "no difference"),
        (base, adapter, "is an adapter"),
        (base, tmp_path / "nowhere", "no base model"),
    ):
        found = veneer("extract", one, other, tmp_path / "out", "--rank", 2)
        assert found.code == 2
        assert words in re.sub(r"\s+", " ", found.err)
    found = veneer("extract", base, tuned, adapter, "--rank", 2)
    assert found.code == 2
    assert "which exists" in re.sub(r"\s+", " ", found.err)
