"""Answers by the engine's calls are those of transformers' generate, for the work of each prompt
once and of each answer's own length."""

from __future__ import annotations

import gc
import json
import logging
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.support.serving import MODELS, make, prompts
from tests.support.tasks import config_of
from tests.support.tiny import tiny_model, tiny_tokenizer

import veneer
from veneer import context
from veneer.attach import adapters_of
from veneer.errors import ConfigError
from veneer.models.decode import continuations as engine
from veneer.models.decode.forward import Forward
from veneer.train import generate
from veneer.train.generate import continuations
from veneer.train.run import fit

TOKENIZER: Any = SimpleNamespace(eos_token_id=2, pad_token_id=0)
UNEQUAL = [list(ids) for ids in prompts(9, 40)]
#: one that is longer than what is computed beside running rows
LONG = [*range(3, 153)]


def both_ways(model: Any, encoded: Any, tokenizer: Any = TOKENIZER, **options: Any) -> list[Any]:
    """The answers of the engine, and those of transformers' generate."""
    options = {"max_new_tokens": 12, **options}
    return [
        continuations(model, tokenizer, encoded, rollouts=rollouts, **options)
        for rollouts in ("engine", "generate")
    ]


def random_adapter(model: Any, name: str, seed: int) -> None:
    veneer.attach(model, veneer.LoraConfig(rank=2, alpha=8), name)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.requires_grad and name in path:
                parameter.normal_(0, 0.3, generator=draw)


class Calls:
    """The tokens and rows of each call of a model."""

    def __init__(self, model: Any) -> None:
        self.shapes: list[tuple[int, int]] = []
        self._hook = model.get_input_embeddings().register_forward_pre_hook(
            lambda module, inputs: self.shapes.append(tuple(inputs[0].shape))
        )

    @property
    def tokens(self) -> int:
        return sum(rows * width for rows, width in self.shapes)


def fallbacks(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines of the log about models that the engine cannot call."""
    return [line.getMessage() for line in caplog.records if line.name == "veneer.generate"]


# ---- the same answers


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [3, 16])
def test_greedy_answers_are_those_of_generate(name, rows):
    """Left-padded there, rows of their own here, and with three rows prompts beside running ones."""
    by_engine, by_generate = both_ways(make(name), [*UNEQUAL, LONG, UNEQUAL[0]], batch_size=rows)
    assert by_engine == by_generate
    assert len({*map(tuple, by_engine)}) > 5


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_answers_are_those_of_the_selected_adapter(name):
    model = make(name)
    answers = {None: both_ways(model, UNEQUAL)}
    for seed, adapter in enumerate(("first", "second")):
        random_adapter(model, adapter, seed)
    for adapter in ("first", "second", None):
        with veneer.use(model, adapter):
            by_engine, by_generate = answers[adapter] = both_ways(model, UNEQUAL)
            assert by_engine == by_generate
    assert answers[None][0] == both_ways(make(name), UNEQUAL)[0]
    assert len({json.dumps(by_engine) for by_engine, _ in answers.values()}) == 3


def test_answers_follow_the_weights_that_train():
    model = make("llama")
    random_adapter(model, "first", 0)
    before = both_ways(model, UNEQUAL)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    ids = torch.tensor([LONG[:20]])
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    after = both_ways(model, UNEQUAL)
    assert after[0] == after[1] != before[0]


@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"top_p": 0.8, "temperature": 1.3}])
def test_samples_are_those_of_generate_and_of_the_seed(options):
    encoded = [ids for ids in UNEQUAL[:3] for _ in range(8)]
    options = {"temperature": 0.8, "seed": 5, **options}
    by_engine, by_generate = both_ways(make("llama"), encoded, batch_size=5, **options)
    assert by_engine == by_generate == both_ways(make("llama"), encoded, **options)[0]
    assert len({*map(tuple, by_engine[:8])}) > 4
    assert by_engine != both_ways(make("llama"), encoded, **{**options, "seed": 6})[0]


def test_first_tokens_come_as_often_as_the_model_says():
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        pairs = [[5, 6], [7, 8, 9]]
        chances = [model(torch.tensor([ids])).logits[0, -1].softmax(-1) for ids in pairs]
    encoded = [ids for ids in pairs for _ in range(3000)]
    drawn = continuations(
        model, TOKENIZER, encoded, max_new_tokens=2, temperature=1.0, seed=0, batch_size=6000
    )
    for number, expected in enumerate(chances):
        counts = Counter(answer[0] for answer in drawn[3000 * number : 3000 * (number + 1)])
        shares = torch.tensor([counts[token] / 3000 for token in range(len(expected))])
        torch.testing.assert_close(shares, expected, atol=0.03, rtol=0)


def without_end_tokens(model: Any) -> Any:
    """The model, changed in place so that none of its configs names an end token."""
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return model


def test_an_answer_ends_with_the_end_token_and_at_its_limit():
    model = without_end_tokens(make("llama"))
    free = continuations(model, SimpleNamespace(eos_token_id=None, pad_token_id=0), UNEQUAL,
                         max_new_tokens=12)  # fmt: skip
    assert [len(answer) for answer in free] == [12] * len(UNEQUAL)
    tokenizer = SimpleNamespace(eos_token_id=free[0][2], pad_token_id=0)
    by_engine, by_generate = both_ways(model, UNEQUAL, tokenizer)
    assert by_engine == by_generate
    assert len(by_engine[0]) <= 3
    assert by_engine[0][-1] == tokenizer.eos_token_id
    assert both_ways(model, UNEQUAL, max_new_tokens=1)[0] == [answer[:1] for answer in free]
    assert continuations(model, TOKENIZER, [], max_new_tokens=3) == []


def test_an_answer_ends_with_each_end_token_of_the_base():
    """A chat model's generation config names the end of a turn beside the end of a text, and its
    tokenizer one of both."""
    model = without_end_tokens(make("llama"))
    tokenizer = SimpleNamespace(eos_token_id=None, pad_token_id=0)
    (free,) = continuations(model, tokenizer, UNEQUAL[:1], max_new_tokens=12)
    model.generation_config.eos_token_id = [2, free[3]]
    expected = free[: free.index(free[3]) + 1]
    for options in ({}, {"penalties": True}):
        for tokenizer in (TOKENIZER, SimpleNamespace(eos_token_id=None, pad_token_id=0)):
            assert both_ways(model, UNEQUAL[:1], tokenizer, **options) == [[expected]] * 2


@pytest.mark.parametrize("form", [str, lambda stop: [stop]])
def test_a_text_ends_before_each_stop_string_of_the_base(form):
    model, tokenizer = make("llama"), tiny_tokenizer()
    texts = ["a", "bc", "def"]
    free = generate.generate(model, tokenizer, texts, max_new_tokens=12)
    stop = next(letter for letter in "".join(free) if letter.isascii() and letter.isalnum())
    other = next(
        letter
        for letter in reversed("".join(free))
        if letter.isascii() and letter.isalnum() and letter != stop
    )
    model.generation_config.stop_strings = form(stop)
    cut = [text.split(stop)[0] for text in free]
    assert generate.generate(model, tokenizer, texts, max_new_tokens=12) == cut != free
    cut = [text.split(other)[0] for text in cut]
    assert generate.generate(model, tokenizer, texts, max_new_tokens=12, stop=[other]) == cut


# ---- for less work


def test_the_prompt_of_a_group_is_computed_once():
    model = make("llama")
    continuations(model, TOKENIZER, [LONG], max_new_tokens=1)  # the trial of the model
    calls = Calls(model)
    answers = continuations(
        model, TOKENIZER, [LONG] * 8, max_new_tokens=6, temperature=1.0, seed=0, batch_size=8
    )
    steps = sum(len(answer) - 1 for answer in answers)
    assert calls.tokens == 160 + steps  # in a call whose width is a multiple of 16
    calls.shapes.clear()
    answers = continuations(  # three at a time: the row of the prompt stays for the others
        model, TOKENIZER, [LONG] * 8, max_new_tokens=6, temperature=1.0, seed=0, batch_size=3
    )
    assert calls.tokens == 160 + steps
    assert max(rows for rows, _ in calls.shapes) == 3


def test_a_row_that_ends_gives_its_place_to_the_next_prompt():
    model = make("llama")
    free = continuations(model, TOKENIZER, UNEQUAL, max_new_tokens=20)
    end = Counter(token for answer in free for token in answer[1:12]).most_common(1)[0][0]
    tokenizer = SimpleNamespace(eos_token_id=end, pad_token_id=0)
    calls = Calls(model)
    answers = continuations(model, tokenizer, UNEQUAL, max_new_tokens=20, batch_size=2)
    lengths = [len(answer) for answer in answers]
    assert min(lengths) < max(lengths)
    # short prompts are computed in the call of the running row: a call a token of either place
    assert len(calls.shapes) <= sum(lengths) / 2 + max(lengths) + 1
    steps = len(calls.shapes)
    calls.shapes.clear()
    assert answers == continuations(
        model, tokenizer, UNEQUAL, max_new_tokens=20, batch_size=2, rollouts="generate"
    )
    assert steps < len(calls.shapes)


def test_the_model_is_tried_once_and_again_after_a_change(monkeypatch):
    model, tried = make("llama"), []
    compare = Forward.compare_logits
    monkeypatch.setattr(
        Forward, "compare_logits", lambda self, *a: tried.append(1) or compare(self, *a)
    )
    for _ in range(3):
        both_ways(model, UNEQUAL[:2])
    assert len(tried) == 1
    by_engine, by_generate = both_ways(model.double(), UNEQUAL)
    assert by_engine == by_generate
    assert len(tried) == 2


def test_a_refusal_ends_with_its_cause() -> None:
    """Training mode is no trait of the model, so its refusal is not kept."""
    model = tiny_model()
    with pytest.raises(ConfigError, match="training mode"):
        engine.open_forward(model.train(), 9)
    engine.open_forward(model.eval(), 9).close()


def test_the_base_is_tried_without_its_adapters():
    """A trained adapter may amplify the rounding of bf16 beyond the trial's bound."""
    model, used = make("llama"), []
    random_adapter(model, "default", 1)
    uid = adapters_of(model).uid

    def note_selection(module: Any, inputs: Any) -> None:
        chosen = context.current.selection.get(uid)
        used.append("default" if chosen is None else chosen.name)

    model.model.layers[0].register_forward_pre_hook(note_selection)
    engine.open_forward(model, 9).close()
    assert used
    assert set(used) == {None}
    both_ways(model, UNEQUAL[:2])
    assert used[-1] == "default"


# ---- and nothing is left behind


def test_memory_is_released_also_after_a_failure(monkeypatch):
    references: list[Any] = []

    class Slots(engine.Slots):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            references.append(weakref.ref(self))

    monkeypatch.setattr(engine, "Slots", Slots)
    model = make("llama")
    gc.disable()
    try:
        continuations(model, TOKENIZER, UNEQUAL, max_new_tokens=4)
        assert [reference() for reference in references] == [None]
    finally:
        gc.enable()
    attention = model.config._attn_implementation

    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("on purpose")

    monkeypatch.setattr(Forward, "decode", fail)
    with pytest.raises(torch.OutOfMemoryError) as failure:
        continuations(model.train(), TOKENIZER, UNEQUAL, max_new_tokens=4)
    slots = references[-1]()
    assert failure.value.__traceback__ is not None
    assert slots is not None
    assert slots.nbytes == 0
    assert model.training
    assert model.config._attn_implementation == attention


def test_the_model_trains_afterwards_as_if_nothing_had_been():
    models = [make("qwen3"), make("qwen3")]
    gradients = []
    for model in models:
        random_adapter(model, "first", 0)
        attention = model.config._attn_implementation
        model.train()
        if model is models[1]:
            continuations(model, TOKENIZER, UNEQUAL, max_new_tokens=4, temperature=1.0, seed=0)
        assert model.training
        assert all(module.training for module in model.modules())
        assert torch.is_grad_enabled()
        assert model.config._attn_implementation == attention
        assert not model.get_output_embeddings()._forward_pre_hooks
        ids = torch.tensor([LONG])
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert gradients[0]
    for alone, beside in zip(*gradients, strict=True):
        assert torch.equal(alone, beside)


# ---- models that the engine cannot call, and the switch


@pytest.mark.parametrize("name", ["bloom", "mamba", "gpt_oss"])
def test_other_models_are_generated_from_and_the_log_says_so_once(name, caplog):
    generate._log_once.cache_clear()
    model = make(name)
    attention = model.config._attn_implementation
    with caplog.at_level(logging.WARNING, "veneer.generate"):
        by_engine, by_generate = both_ways(model, UNEQUAL, max_new_tokens=3)
        both_ways(model, UNEQUAL[:2], max_new_tokens=3)
    assert by_engine == by_generate
    assert model.config._attn_implementation == attention
    (line,) = fallbacks(caplog)
    assert "transformers' own generate" in line
    assert type(model).__name__ in line


def test_positions_that_change_behind_a_length_are_generated(caplog):
    generate._log_once.cache_clear()
    rope = {
        "rope_type": "dynamic",
        "factor": 2.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 24,
    }
    model = tiny_model(rope_parameters=rope)
    with caplog.at_level(logging.WARNING, "veneer.generate"):
        assert len({*map(json.dumps, both_ways(model, [LONG[:10]]))}) == 1
        assert not fallbacks(caplog)
        assert len({*map(json.dumps, both_ways(model, [LONG[:20]]))}) == 1
    (line,) = fallbacks(caplog)
    assert "behind 24 tokens" in line


def test_a_generate_that_was_replaced_is_called(caplog):
    generate._log_once.cache_clear()
    model = make("llama")
    expected = both_ways(model, UNEQUAL)[0]
    calls: list[int] = []

    def replacement(**inputs: Any) -> Any:
        calls.append(len(inputs["input_ids"]))
        return type(model).generate(model, **inputs)

    model.generate = replacement
    assert continuations(model, TOKENIZER, UNEQUAL, max_new_tokens=12) == expected
    assert calls == [len(UNEQUAL)]
    (line,) = fallbacks(caplog)
    assert "generate was replaced" in line


def test_rollouts_by_generate_do_not_ask_the_engine(monkeypatch):
    monkeypatch.setattr(engine, "open_forward", lambda *_: pytest.fail("the engine was asked"))
    assert continuations(
        make("llama"), TOKENIZER, UNEQUAL[:2], max_new_tokens=2, rollouts="generate"
    )


# ---- GRPO


def log_of(result: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (result.output / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_losses_and_rewards_of_grpo_are_those_of_generate(seed, tmp_path: Path):
    """The same answers are drawn, so the runs are the same but for rounding."""
    logs = []
    for rollouts in ("engine", "generate"):
        config = config_of(
            "grpo", tmp_path, rollouts, rollouts=rollouts, seed=seed, max_steps=4, eval_every=4,
            save_every=100, check=False, beta=0.1,
        )  # fmt: skip
        logs.append(log_of(fit(config, quiet=True)))
    names = {"loss", "reward", "reward_spread", "answer_length", "eval_loss", "eval_reward"}
    by_engine, by_generate = (
        [{name: line[name] for name in names & line.keys()} for line in lines] for lines in logs
    )
    assert any("reward" in line for line in by_engine)
    assert by_engine == [pytest.approx(line, rel=1e-3, abs=1e-4) for line in by_generate]
