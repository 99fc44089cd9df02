"""Generate text with a model, for many prompts at a time.

    texts = generate(model, tokenizer, ["2 + 2 =", …], max_new_tokens=32)

A row ends at the end-of-text token, at a stop string, or after `max_new_tokens`. The longest
prompts run first, so that a lack of memory shows at once. There are two ways:

    engine      the calls of the server's engine (models/decode/continuations.py): equal prompts are
                computed once, and the place of a row that ends is taken by the next one
    generate    transformers' own: prompts of similar length share a batch, padded on the left, and
                all wait for the longest answer

The engine is used unless `rollouts` says otherwise, for those models that it can call. Stop
strings, callbacks and the penalties of a base need transformers' own. Both draw the same numbers,
so in float32 they give the same tokens.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from veneer.errors import ConfigError, DataError
from veneer.kernels.draws import generators, perturb, sample_seed
from veneer.models.sampling_defaults import changes_greedy_tokens

log = logging.getLogger("veneer.generate")

Prompt = str | list[dict[str, Any]]
#: how answers are computed
Rollouts = Literal["engine", "generate"]


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    batch_size: int = 16,
    stop: Sequence[str] = (),
    seed: int | None = None,
    say: Callable[[str], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[str]:
    """The continuation of each prompt, in order, without the prompt and without the stop string.
    Applies the penalties of the base's generation_config.json.

    Args:
        prompts: texts, or chats (lists of {"role", "content"}), which are encoded by the
            tokenizer's chat template.
        temperature: 0 always takes the most likely token; above 0 samples.
        top_p: sample from the smallest set of tokens with this total probability.
        top_k: sample from this many most likely tokens; 0 is all.
        batch_size: prompts at a time.
        stop: strings that end a row.
        seed: of the sampling; prompt i draws from ``sample_seed(seed, i)`` in any batch. None draws
            a seed from torch's generator; otherwise the global random state does not change.
        say: called with each new piece of text, for a single prompt.
        should_stop: called after each token; generation ends when it returns True.

    Raises:
        DataError: a prompt is empty, or longer than the model's context with `max_new_tokens`.
    """
    encoded = [encode(prompt, tokenizer) for prompt in prompts]
    sampled = continuations(
        model,
        tokenizer,
        encoded,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        batch_size=batch_size,
        stop=stop,
        seed=seed,
        say=say,
        should_stop=should_stop,
        penalties=True,
    )
    texts = tokenizer.batch_decode(sampled, skip_special_tokens=True)
    for word in stop:
        texts = [text.split(word, 1)[0] for text in texts]
    return texts


@torch.no_grad()
def continuations(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    batch_size: int = 16,
    stop: Sequence[str] = (),
    seed: int | None = None,
    say: Callable[[str], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    penalties: bool = False,
    rollouts: Rollouts = "engine",
) -> list[list[int]]:
    """The new token ids of each encoded prompt, in order, up to and including the end-of-text
    token. ``penalties``: apply those of the base's generation_config.json. Without them the tokens
    are samples of the model's own distribution, which a policy loss requires. ``rollouts``: how
    they are computed. Other arguments and errors as for ``generate``."""
    _check_context(model, max(map(len, encoded), default=0), max_new_tokens)
    if seed is None and temperature > 0:
        seed = int(torch.randint(2**62, ()))
    sampling = _Sampling(temperature, top_p, top_k, seed)
    streams = bool(stop) or say is not None or should_stop is not None
    penalised = penalties and changes_greedy_tokens(model.generation_config)
    with _evaluating(model):
        if rollouts == "engine" and encoded and max_new_tokens > 0 and not (streams or penalised):
            end_tokens = _end_tokens(model, tokenizer, penalties)
            answers = _by_engine(model, encoded, max_new_tokens, batch_size, sampling, end_tokens)
            if answers is not None:
                return answers
        options = {"max_new_tokens": max_new_tokens, "stop_strings": list(stop) or None}
        streaming = _stream_options(say, should_stop, tokenizer)
        return _by_generate(
            model, tokenizer, encoded, options, streaming, sampling, batch_size, penalties
        )


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _end_tokens(model: Any, tokenizer: Any, penalties: bool) -> frozenset[int]:
    """The ids that end an answer: the tokenizer's; where it has none, those of the generation
    config, which applies with ``penalties``."""
    end = tokenizer.eos_token_id
    if end is None and penalties:
        end = model.generation_config.eos_token_id
    ids = end if isinstance(end, list | tuple) else [end]
    return frozenset(id for id in ids if id is not None)


def _by_engine(
    model: Any,
    encoded: Sequence[list[int]],
    max_new_tokens: int,
    rows: int,
    sampling: _Sampling,
    end_tokens: frozenset[int],
) -> list[list[int]] | None:
    """The answers by the engine; None where it cannot call the model, which the log says."""
    from veneer.models.decode.continuations import Continuations, open_forward

    try:
        forward = open_forward(model, max(map(len, encoded)) + max_new_tokens)
    except ConfigError as error:
        _log_once(f"Answers are computed by transformers' own generate: {error.problem}.")
        return None
    with contextlib.closing(forward):
        return Continuations(
            forward,
            encoded,
            sampling.sample,
            max_new_tokens=max_new_tokens,
            rows=rows,
            end_tokens=end_tokens,
        ).run()


@functools.cache
def _log_once(message: str) -> None:
    log.warning(message)


def _by_generate(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[list[int]],
    limits: dict[str, Any],
    streaming: dict[str, Any],
    sampling: _Sampling,
    batch_size: int,
    penalties: bool,
) -> list[list[int]]:
    """The answers by transformers' own generate."""
    from transformers import GenerationConfig, LogitsProcessorList

    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]), reverse=True)
    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config = GenerationConfig(
        **limits, pad_token_id=pad, eos_token_id=end, use_cache=True, do_sample=False, num_beams=1
    )
    options = {
        "generation_config": config,
        **({"tokenizer": tokenizer} if limits["stop_strings"] else {}),
        **streaming,
    }
    answers: list[list[int]] = [[] for _ in encoded]
    base_config = model.generation_config
    try:
        if not penalties:  # transformers fills unset fields of `config` from the model's config
            model.generation_config = GenerationConfig()
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            width = len(encoded[rows[0]])
            inputs = _pad_left([encoded[row] for row in rows], width, pad or 0, model.device)
            if sampling.temperature > 0:
                options["logits_processor"] = LogitsProcessorList(sampling.processors(rows))
            new = model.generate(**inputs, **options)[:, width:].tolist()
            for row, tokens in zip(rows, new, strict=True):
                answers[row] = tokens[: tokens.index(end) + 1] if end in tokens else tokens
    finally:
        model.generation_config = base_config
    return answers


def _pad_left(
    prompts: Sequence[list[int]], width: int, pad: int, device: Any
) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask, [b, width]."""
    short = [width - len(prompt) for prompt in prompts]
    ids = [[pad] * count + prompt for count, prompt in zip(short, prompts, strict=True)]
    mask = [[0] * count + [1] * (width - count) for count in short]
    inputs = {"input_ids": ids, "attention_mask": mask}
    return {name: torch.tensor(value, device=device) for name, value in inputs.items()}


class _Sampling:
    """Samples tokens of answers, each by the generator of its number: temperature, top-k, top-p,
    and the argmax of randomly perturbed scores. transformers' own sampling uses one generator for a
    batch, so the answer to a prompt would depend on the other prompts. With temperature 0 the most
    likely token is taken."""

    def __init__(self, temperature: float, top_p: float, top_k: int, seed: int | None) -> None:
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self.temperature, self._seed = temperature, seed
        self._warpers: list[Any] = []
        if temperature > 0:
            self._warpers.append(TemperatureLogitsWarper(float(temperature)))
            self._warpers += [TopKLogitsWarper(top_k)] if top_k else []
            self._warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        self._generators: dict[int, torch.Generator] = {}

    def sample(self, logits: Tensor, numbers: Sequence[int]) -> list[int]:
        """The next tokens of the answers with these numbers, from logits [n, vocabulary]."""
        scores = logits.float()
        for warper in self._warpers:
            scores = warper(None, scores)
        if self.temperature > 0:
            scores = self._perturb(scores, numbers)
        return scores.argmax(-1).tolist()

    def processors(self, numbers: Sequence[int]) -> list[Any]:
        """Logits processors of transformers whose greedy choice is a sample."""
        from transformers import LogitsProcessor

        sampling = self

        class Perturb(LogitsProcessor):
            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                return sampling._perturb(scores, numbers)

        return [*self._warpers, Perturb()]

    def _perturb(self, scores: Tensor, numbers: Sequence[int]) -> Tensor:
        assert self._seed is not None
        for number in numbers:
            if number not in self._generators:
                seeds = [sample_seed(self._seed, number)]
                (self._generators[number],) = generators(seeds, scores.device)
        return perturb(scores, [self._generators[number] for number in numbers])


def _check_context(model: Any, longest: int, max_new_tokens: int) -> None:
    """Raise `DataError` if the longest prompt with the new tokens exceeds the model's context."""
    context = context_of(model)
    if context is not None and longest and longest + max_new_tokens > context:
        problem = f"a prompt of {longest:,} tokens and {max_new_tokens:,} new ones"
        do = "shorten the prompt, or ask for fewer new tokens"
        raise DataError(problem, f"at most {context:,} together, the model's context", do)


def context_of(model: Any) -> int | None:
    """The maximal number of positions in a model's config, or None."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _stream_options(
    say: Callable[[str], None] | None, should_stop: Callable[[], bool] | None, tokenizer: Any
) -> dict[str, Any]:
    """The arguments of transformers' ``generate`` that call `say` and `should_stop`."""
    from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

    class CallbackStreamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text and say is not None:
                say(text)

    class CallbackCriteria(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.full(
                (len(input_ids),),
                should_stop is not None and should_stop(),
                device=input_ids.device,
            )

    options: dict[str, Any] = {}
    if say is not None:
        options["streamer"] = CallbackStreamer(
            tokenizer, skip_prompt=True, skip_special_tokens=True
        )
    if should_stop is not None:
        options["stopping_criteria"] = StoppingCriteriaList([CallbackCriteria()])
    return options


def encode(prompt: Prompt, tokenizer: Any) -> list[int]:
    """The token ids of a text, or of a chat by the tokenizer's template, including the header of
    the answer. Raises `DataError` for an empty prompt or a chat without a template."""
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
    elif tokenizer.chat_template is None:
        raise DataError(
            "a chat prompt, and a base without a chat template",
            "a chat model",
            "pass the prompt as text",
        )
    else:
        chat = tokenizer.apply_chat_template(
            prompt, tokenize=True, return_dict=True, add_generation_prompt=True
        )
        ids = list(chat["input_ids"])
    if not ids:
        raise DataError("an empty prompt", "at least one token", "write something to continue")
    return ids
