"""The configuration of a run: what the flags and the YAML file mean."""

from __future__ import annotations

from veneer.train.config import make_config

NEEDED = {"base": "b", "data": "d.jsonl", "output": "o"}


def test_commas_make_lists_but_not_of_a_regular_expression() -> None:
    assert make_config({**NEEDED, "targets": "q_proj, v_proj"}).targets == ["q_proj", "v_proj"]
    expression = r"re:model\.layers\.\d{1,2}\.mlp\..*"
    assert make_config({**NEEDED, "targets": expression}).targets == expression
