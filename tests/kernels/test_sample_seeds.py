"""Seeds of samples: one function of (seed, number), whoever samples."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tests.support.tiny import tiny_model, tiny_tokenizer

from veneer.kernels.draws import sample_seed
from veneer.models.sampling_defaults import SamplingDefaults
from veneer.serve.schemas import ChatRequest
from veneer.serve.training import bodies
from veneer.serve.training.samples import _sampling_settings
from veneer.train.generate import continuations, generate


def api_seed(seed, index):
    asked = ChatRequest(model="m", messages=[{"role": "user", "content": "a"}], seed=seed)  # pyright: ignore
    return asked.sampling(5, index, SamplingDefaults()).seed


def service_seed(seed, index):
    parameters = bodies.SamplingParams(seed=seed)
    asked = bodies.Sample(prompt=bodies.ModelInput(chunks=[]), sampling_params=parameters)
    return _sampling_settings(asked, index, 10).seed


@pytest.mark.parametrize("derive", [sample_seed, api_seed, service_seed])
def test_samples_of_neighbouring_seeds_share_no_draws(derive):
    seeds = {
        (seed, index): derive(seed, index)
        for seed in (-3, *range(40), 2**32, 2**63 - 1)
        for index in range(40)
    }
    assert len({value % 2**32 for value in seeds.values()}) == len(
        seeds
    )  # torch's generator on a processor reads 32 bits
    assert seeds == {(seed, index): sample_seed(seed, index) for seed, index in seeds}
    assert all(0 <= value < 2**63 for value in seeds.values())


def test_the_function_of_the_docs_stays_what_it_is():
    """A seed that was written down gives the same text with the next version."""
    assert sample_seed(0, 0) == 6213027144842677344
    assert sample_seed(7, 3) == 616456930342725979


@pytest.fixture(scope="module")
def tiny():
    return SimpleNamespace(model=tiny_model(), tokenizer=tiny_tokenizer())


SAMPLED = {"max_new_tokens": 12, "temperature": 1.0}


def test_a_prompt_draws_the_same_in_every_batch(tiny):
    prompts = ["a", "bcd", "a", "efghi", "j"]
    alone = generate(tiny.model, tiny.tokenizer, prompts, seed=3, batch_size=1, **SAMPLED)
    assert generate(tiny.model, tiny.tokenizer, prompts, seed=3, batch_size=5, **SAMPLED) == alone
    assert alone[0] != alone[2]
    other = generate(tiny.model, tiny.tokenizer, ["a"] * 6, seed=4, **SAMPLED)
    assert len({*generate(tiny.model, tiny.tokenizer, ["a"] * 6, seed=3, **SAMPLED), *other}) == 12


def test_the_global_random_state_is_left_as_it_was_and_decides_where_there_is_no_seed(tiny):
    before = torch.get_rng_state()
    continuations(tiny.model, tiny.tokenizer, [[5, 6]], seed=1, **SAMPLED)
    assert torch.equal(torch.get_rng_state(), before)
    rows = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        rows.append(continuations(tiny.model, tiny.tokenizer, [[5, 6]] * 3, **SAMPLED))
    assert rows[0] == rows[1] != rows[2]
    assert len({*map(tuple, rows[0])}) == 3


def test_tokens_come_as_often_as_the_model_says(tiny):
    """With top_p and top_k; 4,000 draws of one token."""
    drawn = continuations(
        tiny.model, tiny.tokenizer, [[5, 6]] * 4000, max_new_tokens=1, temperature=0.7, top_k=5, top_p=0.9, seed=0,
        batch_size=4000,
    )  # fmt: skip
    with torch.no_grad():
        logits = tiny.model(torch.tensor([[5, 6]])).logits[0, -1] / 0.7
    values, ids = logits.topk(5)
    chances = values.softmax(-1)
    chances = chances[: int((chances.cumsum(-1) < 0.9).sum()) + 1]
    counts = torch.bincount(torch.tensor([row[0] for row in drawn]), minlength=len(logits)) / 4000
    expected = torch.zeros(len(logits)).index_put((ids[: len(chances)],), chances / chances.sum())
    torch.testing.assert_close(counts, expected, atol=0.03, rtol=0)
