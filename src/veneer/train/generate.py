"""Generate text with a model, for many prompts at a time.

    texts = generate(model, tokenizer, ["2 + 2 =", …], max_new_tokens=32)

An answer ends at an end token of the base or of its tokenizer, as in the server, at a stop string,
or after `max_new_tokens`. The longest prompts run first, so that a lack of memory shows at once.
Answers are computed in one of two ways:

    engine      by the server's engine (models/decode/continuations.py): equal prompts are computed
                once, and the next prompt starts in the slot of an answer that has ended
    generate    by transformers' own generate: prompts of similar length share a batch, padded on
                the left, and all wait for the longest answer

The engine is used for the models that it can call, unless `rollouts` is "generate". Stop strings,
callbacks, and the penalties in a base's generation_config.json, such as repetition_penalty, need
transformers' own generate. Both ways draw the same random numbers, so in float32 they give the same
tokens.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from veneer.context import evaluation_mode
from veneer.errors import ConfigError, DataError
from veneer.kernels.draws import generators, perturb, sample_seed
from veneer.models.load import context_length_of
from veneer.models.sampling_defaults import changes_greedy_tokens
from veneer.models.sampling_defaults import end_tokens as find_end_tokens
from veneer.train.tokens import chat_tokens, text_tokens

log = logging.getLogger("veneer.generate")

#: a text, or the messages of a chat
Prompt = str | list[dict[str, Any]]
#: how answers are computed: by the server's engine, or by transformers' own generate
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
    Applies the penalties and the stop strings of the base's generation_config.json.

    Args:
        prompts: texts, or chats (lists of {"role", "content"}), which are encoded by the
            tokenizer's chat template.
        temperature: 0 always takes the most likely token; above 0 samples.
        top_p: sample from the smallest set of tokens with this total probability.
        top_k: sample from this number of most likely tokens; 0 samples from all.
        batch_size: number of prompts that are computed at a time.
        stop: further strings that end an answer.
        seed: the seed of the sampling. Prompt i draws from ``sample_seed(seed, i)``, whatever its
            batch. If None, the seed is drawn from torch's global generator, whose state changes
            only in this case.
        say: called with each new piece of text; only for a single prompt.
        should_stop: called after each token; generation ends when it returns True.

    Raises:
        DataError: a prompt is empty, or longer than the model's context with `max_new_tokens`, or
            the chat template refuses it.
    """
    prompt_ids = [
        encode(prompt, tokenizer, f"prompt {number}") for number, prompt in enumerate(prompts, 1)
    ]
    stop = [*stop, *_base_stop_strings(model)]
    answer_ids = continuations(
        model,
        tokenizer,
        prompt_ids,
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
    texts = tokenizer.batch_decode(answer_ids, skip_special_tokens=True)
    for stop_string in stop:
        texts = [text.split(stop_string, 1)[0] for text in texts]
    return texts


@torch.no_grad()
def continuations(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[list[int]],
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
    """The new token ids of each prompt, in order, up to and including an end token.

    Args:
        prompt_ids: the token ids of each prompt.
        penalties: whether to apply the penalties of the base's generation_config.json, such as
            repetition_penalty. Without them the tokens are samples of the model's distribution,
            which a policy loss requires.
        rollouts: how the answers are computed (see the top of this file).

    Other arguments and errors are those of ``generate``."""
    _check_context(model, max(map(len, prompt_ids), default=0), max_new_tokens)
    if seed is None and temperature > 0:
        seed = int(torch.randint(2**62, ()))
    sampling = _Sampling(temperature, top_p, top_k, seed)
    has_stops_or_callbacks = bool(stop) or say is not None or should_stop is not None
    has_penalties = penalties and changes_greedy_tokens(model.generation_config)
    end_tokens = find_end_tokens(model, tokenizer)
    with evaluation_mode(model):
        if (
            rollouts == "engine"
            and prompt_ids
            and max_new_tokens > 0
            and not (has_stops_or_callbacks or has_penalties)
        ):
            answers = _answer_by_engine(
                model, prompt_ids, max_new_tokens, batch_size, sampling, end_tokens
            )
            if answers is not None:
                return answers
        generation_options = {
            "max_new_tokens": max_new_tokens,
            "stop_strings": list(stop) or None,
            "eos_token_id": sorted(end_tokens) or None,
        }
        stream_options = _stream_options(say, should_stop, tokenizer)
        return _answer_by_generate(
            model,
            tokenizer,
            prompt_ids,
            generation_options,
            stream_options,
            sampling,
            batch_size,
            penalties,
        )


def _base_stop_strings(model: Any) -> list[str]:
    """The stop strings of the base's generation_config.json."""
    stop_strings = getattr(model.generation_config, "stop_strings", None) or []
    return [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)


def _answer_by_engine(
    model: Any,
    prompt_ids: Sequence[list[int]],
    max_new_tokens: int,
    slot_count: int,
    sampling: _Sampling,
    end_tokens: frozenset[int],
) -> list[list[int]] | None:
    """The token ids of each answer, computed by the engine with ``slot_count`` answers at a time.
    None if the engine cannot call the model; the log then says why."""
    from veneer.models.decode.continuations import Continuations, open_forward

    try:
        forward = open_forward(model, max(map(len, prompt_ids)) + max_new_tokens)
    except ConfigError as error:
        _log_once(f"Answers are computed by transformers' own generate: {error.problem}.")
        return None
    with contextlib.closing(forward):
        return Continuations(
            forward,
            prompt_ids,
            sampling.sample,
            max_new_tokens=max_new_tokens,
            rows=slot_count,
            end_tokens=end_tokens,
        ).run()


@functools.cache
def _log_once(message: str) -> None:
    log.warning(message)


def _answer_by_generate(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[list[int]],
    generation_options: dict[str, Any],
    stream_options: dict[str, Any],
    sampling: _Sampling,
    batch_size: int,
    penalties: bool,
) -> list[list[int]]:
    """The token ids of each answer, computed by transformers' own generate in batches of
    ``batch_size``.

    Args:
        generation_options: fields of the ``GenerationConfig``: max_new_tokens, stop_strings and
            eos_token_id.
        stream_options: further arguments of transformers' ``generate``, from ``_stream_options``.
        penalties: whether to apply the penalties of the base's generation_config.json. If not, the
            model's generation config is replaced during the call.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    prompt_order = sorted(
        range(len(prompt_ids)), key=lambda index: len(prompt_ids[index]), reverse=True
    )
    end_tokens = generation_options["eos_token_id"] or ()
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    generation_config = GenerationConfig(
        **generation_options,
        pad_token_id=pad_id,
        use_cache=True,
        do_sample=False,
        num_beams=1,
    )
    call_options = {
        "generation_config": generation_config,
        **({"tokenizer": tokenizer} if generation_options["stop_strings"] else {}),
        **stream_options,
    }
    answers: list[list[int]] = [[] for _ in prompt_ids]
    base_config = model.generation_config
    try:
        # transformers fills unset fields of `generation_config` from the model's own, so an empty
        # one keeps the base's penalties out
        if not penalties:
            model.generation_config = GenerationConfig()
        for start in range(0, len(prompt_order), batch_size):
            batch_indices = prompt_order[start : start + batch_size]
            width = len(prompt_ids[batch_indices[0]])
            inputs = _pad_left(
                [prompt_ids[index] for index in batch_indices], width, pad_id or 0, model.device
            )
            if sampling.temperature > 0:
                call_options["logits_processor"] = LogitsProcessorList(
                    sampling.processors(batch_indices)
                )
            new_tokens = model.generate(**inputs, **call_options)[:, width:].tolist()
            for index, token_ids in zip(batch_indices, new_tokens, strict=True):
                end_lengths = (n for n, token in enumerate(token_ids, 1) if token in end_tokens)
                answers[index] = token_ids[: next(end_lengths, None)]
    finally:
        model.generation_config = base_config
    return answers


def _pad_left(
    prompt_ids: Sequence[list[int]], width: int, pad_id: int, device: Any
) -> dict[str, torch.Tensor]:
    """The input_ids and attention_mask, [b, width] each, of b prompts of at most ``width`` tokens,
    padded on the left with the token ``pad_id``."""
    padding_counts = [width - len(ids) for ids in prompt_ids]
    padded_ids = [
        [pad_id] * padding_count + ids
        for padding_count, ids in zip(padding_counts, prompt_ids, strict=True)
    ]
    mask = [[0] * padding_count + [1] * (width - padding_count) for padding_count in padding_counts]
    inputs = {"input_ids": padded_ids, "attention_mask": mask}
    return {name: torch.tensor(value, device=device) for name, value in inputs.items()}


class _Sampling:
    """Samples the tokens of answers by temperature, top-k and top-p. Each answer has its own random
    generator, whose noise is added to the scores before the argmax (Gumbel-max sampling), so that
    the answer to a prompt does not depend on the other prompts. (transformers' own sampling uses
    one generator for the whole batch.) With temperature 0, the most likely token is taken, and
    ``seed`` may be None."""

    def __init__(self, temperature: float, top_p: float, top_k: int, seed: int | None) -> None:
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self.temperature, self._seed = temperature, seed
        self._warpers: list[Any] = []
        if temperature > 0:
            if temperature != 1:
                self._warpers.append(TemperatureLogitsWarper(float(temperature)))
            self._warpers += [TopKLogitsWarper(top_k)] if top_k else []
            self._warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        self._generators: dict[int, torch.Generator] = {}

    def sample(self, logits: Tensor, answer_indices: Sequence[int]) -> list[int]:
        """The next token of each of n answers, from logits [n, vocabulary]. ``answer_indices``: the
        indices of the answers among all answers."""
        scores = logits.float() if self._warpers else logits
        for warper in self._warpers:
            scores = warper(None, scores)
        if self.temperature > 0:
            scores = self._perturb(scores, answer_indices)
        return scores.argmax(-1).tolist()

    def processors(self, answer_indices: Sequence[int]) -> list[Any]:
        """Logits processors of transformers that turn the greedy choice into a random sample.
        ``answer_indices``: for each row of the batch, the index of its answer among all answers."""
        from transformers import LogitsProcessor

        sampling = self

        class PerturbScores(LogitsProcessor):
            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                return sampling._perturb(scores, answer_indices)

        return [*self._warpers, PerturbScores()]

    def _perturb(self, scores: Tensor, answer_indices: Sequence[int]) -> Tensor:
        """Add the noise of each answer's generator to its row of the scores [n, vocabulary]."""
        assert self._seed is not None
        for index in answer_indices:
            if index not in self._generators:
                seeds = [sample_seed(self._seed, index)]
                (self._generators[index],) = generators(seeds, scores.device)
        return perturb(scores, [self._generators[index] for index in answer_indices])


def _check_context(model: Any, prompt_length: int, max_new_tokens: int) -> None:
    """Raise `DataError` if a prompt of ``prompt_length`` tokens and the new tokens together exceed
    the model's context."""
    context_length = context_tokens(model)
    if (
        context_length is not None
        and prompt_length
        and prompt_length + max_new_tokens > context_length
    ):
        raise DataError(
            f"a prompt of {prompt_length:,} tokens and {max_new_tokens:,} new ones",
            f"at most {context_length:,} together, the model's context",
            "shorten the prompt, or ask for fewer new tokens",
        )


def context_tokens(model: Any) -> int | None:
    """The context length of a model in tokens, as its config states it; None if it states none."""
    return context_length_of(model.config)


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


def encode(
    prompt: Prompt, tokenizer: Any, location: str = "the prompt", tools: Any = None
) -> list[int]:
    """The token ids of a prompt. A chat is encoded by the tokenizer's chat template and ends with
    the header that begins the assistant's turn. Raises `DataError` for an empty prompt, for a chat
    if the tokenizer has no template, and for a chat that the template refuses; only the last error
    names the ``location`` of the prompt. ``tools``: JSON schemas of the functions that the answer
    to a chat may call, or None."""
    if isinstance(prompt, str):
        ids = text_tokens(prompt, tokenizer)
    elif tokenizer.chat_template is None:
        raise DataError(
            "a chat prompt, and a base without a chat template",
            "a chat model",
            "pass the prompt as text",
        )
    else:
        ids = chat_tokens(prompt, tokenizer, location, header=True, tools=tools)
    if not ids:
        raise DataError("an empty prompt", "at least one token", "write something to continue")
    return ids
