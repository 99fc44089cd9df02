"""The rules of `veneer advise`, where the data and the base lie at their edges."""

from __future__ import annotations

import pytest

from veneer.errors import ConfigError
from veneer.train import advise
from veneer.train.config import make_config


@pytest.mark.parametrize(
    ("learnt", "rank"), [(1, 4), (4_000, 4), (4_001, 8), (64_000, 64), (64_001, 128), (10**9, 512)]
)
def test_a_rank_has_as_many_numbers_as_there_are_tokens(learnt: int, rank: int) -> None:
    found = advise._advise_rank(learnt, 1000)
    assert found.value == rank
    assert ("are fewer" in found.why) is (learnt > 512_000)


def test_rates_fall_with_the_width_where_that_was_fitted() -> None:
    assert advise._advise_rate(2000, "llama", 1000).value == 5e-4
    assert advise._advise_rate(4096, "llama", 1000).value == pytest.approx(
        5e-4 * (2000 / 4096) ** 0.781, rel=0.05
    )
    assert advise._advise_rate(4096, "qwen3", 1000).value == pytest.approx(
        5e-4 * (2000 / 4096) ** 0.0775, rel=0.05
    )
    assert advise._advise_rate(4096, "gpt_neox", 1000).value == 2e-4
    assert advise._advise_rate(4096, "gpt_neox", 100).value == pytest.approx(3e-4)
    assert "tinker-cookbook" not in advise._advise_rate(4096, "gpt_neox", 100).source


def test_only_rows_that_are_imitated_are_counted() -> None:
    config = make_config({"task": "dpo", "base": "base", "data": "data.jsonl", "output": "out"})
    with pytest.raises(ConfigError, match="task dpo"):
        advise.advise(config)
