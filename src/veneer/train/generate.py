"""Generate text with a model, for many prompts at a time.

    texts = generate(model, tokenizer, ["2 + 2 =", …], max_new_tokens=32)

Prompts of similar length share a batch, padded on the left so that every row continues from its
last token. A row ends at the end-of-text token, at a stop string, or after `max_new_tokens`. The
longest prompts run first, so that a lack of memory shows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from veneer.errors import DataError
from veneer.kernels.draws import generators, perturb, sample_seed

Prompt = str | list[dict[str, Any]]


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
        batch_size: prompts per batch.
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
) -> list[list[int]]:
    """The new token ids of each encoded prompt, in order, up to and including the end-of-text
    token. ``penalties``: apply those of the base's generation_config.json. Without them the tokens
    are samples of the model's own distribution, which a policy loss requires. Other arguments and
    errors as for ``generate``."""
    from transformers import GenerationConfig, LogitsProcessorList

    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]), reverse=True)
    _check_context(model, max(map(len, encoded), default=0), max_new_tokens)
    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=end,
        stop_strings=list(stop) or None,
        use_cache=True,
        do_sample=False,
        num_beams=1,
    )
    options = {
        "generation_config": config,
        **({"tokenizer": tokenizer} if stop else {}),
        **_stream_options(say, should_stop, tokenizer),
    }
    if seed is None and temperature > 0:
        seed = int(torch.randint(2**62, ()))
    answers: list[list[int]] = [[] for _ in encoded]
    training, base_config = model.training, model.generation_config
    model.eval()
    try:
        if not penalties:  # transformers fills unset fields of `config` from the model's config
            model.generation_config = GenerationConfig()
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            width = len(encoded[rows[0]])
            inputs = _pad_left([encoded[row] for row in rows], width, pad or 0, model.device)
            if temperature > 0 and seed is not None:
                seeds = [sample_seed(seed, row) for row in rows]
                processors = _sampling(temperature, top_p, top_k, seeds)
                options["logits_processor"] = LogitsProcessorList(processors)
            new = model.generate(**inputs, **options)[:, width:].tolist()
            for row, tokens in zip(rows, new, strict=True):
                answers[row] = tokens[: tokens.index(end) + 1] if end in tokens else tokens
    finally:
        model.generation_config = base_config
        model.train(training)
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


def _sampling(temperature: float, top_p: float, top_k: int, seeds: Sequence[int]) -> list[Any]:
    """Logits processors whose greedy choice is a sample: temperature, top-k, top-p, and random
    perturbation with one generator per row. transformers' own sampling uses one generator for a
    batch, so the answer to a prompt would depend on the other prompts."""
    from transformers import (
        LogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    class Perturb(LogitsProcessor):
        def __init__(self) -> None:
            self.rows: list[torch.Generator] = []

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.rows = self.rows or generators(seeds, scores.device)
            return perturb(scores, self.rows)

    processors: list[Any] = [TemperatureLogitsWarper(float(temperature))]
    processors += [TopKLogitsWarper(top_k)] if top_k else []
    processors += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    return [*processors, Perturb()]


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
