"""One word for one thing: the names in the package are the field's, none that only its authors
knew."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import veneer

SOURCE = Path(veneer.__file__).parent

#: words that stood for an idea of the field, and what it is called now
PRIVATE = {
    "artefact": "AdapterFiles", "filing": "PEFT mapping", "filed": "PeftEntry", "fitting": "match",
    "fitted": "match", "derive": "write_derived", "hosted": "submodule_adapters", "site": "LayerState",
    "sites": "LayerState", "wish": "TargetSpec", "lowplan": "LowRankPlan", "evidence": "calibration data",
    "settle": "set_fused_change", "hollow": "meta_model", "skeleton": "linear_stub_model", "prints": "fingerprints",
    "lineup": "BatchAssignment", "spot": "AlignedWeight", "grounds": "BaseWeights", "ground": "BaseWeight",
    "deck": "BatchState", "decks": "BatchState", "rack": "groups", "racks": "groups", "mix": "blend",
    "mixes": "blend", "skinny": "thin_matmul", "dot16": "bf16_dot", "pace": "throttle", "paced": "throttle",
    "give_way": "throttle_loads", "chooser": "Sampler", "beside": "aux_files", "wholes": "full_params",
    "opened": "base_info",
}  # fmt: skip


def names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """What a file defines, takes or assigns, and the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno


def test_names_are_the_fields():
    private = [
        (file.name, name, line, PRIVATE[word])
        for file in sorted(SOURCE.rglob("*.py"))
        for name, line in [(file.stem, 0), *names(ast.parse(file.read_text()))]
        if (word := name.strip("_").lower()) in PRIVATE
    ]
    assert private == []


def test_the_walk_sees_every_kind_of_name():
    code = "def site(wish):\n    deck = 1\n    deck.rack = 2\nclass Spot: ...\n"
    assert {name.lower() for name, _ in names(ast.parse(code))} == {
        "site",
        "wish",
        "deck",
        "rack",
        "spot",
    }
