"""Text from a model, many prompts at a time.

    texts = generate(model, tokenizer, ["2 + 2 =", …], max_new_tokens=32)

Prompts of similar length share a batch, padded on the left so that every row goes on from its last
token. A row ends at the end-of-text token, at a stop string, or at `max_new_tokens`; the longest
prompts run first, so that too little memory shows at once.
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
    until: Callable[[], bool] | None = None,
) -> list[str]:
    """The continuation of each prompt, in order, without the prompt and without the stop string.
    ``prompts``: texts, or chats (lists of {"role", "content"}), which go through the tokenizer's
    chat template. ``temperature``: 0 takes the most likely token each time; above 0 samples.
    ``top_p``: when sampling, from the smallest set of tokens with this much probability. ``top_k``:
    and from so many tokens; 0 is all. ``stop``: strings that end a row. ``seed``: of the sampling.
    Prompt i draws from ``sample_seed(seed, i)``, whatever batch it is in. None draws a seed from
    torch's generator; otherwise the global random state is left as it was. ``say``: called with
    each piece of the text of a single prompt as it is written. ``until``: asked after each token;
    what is written when it says True is the text. Penalties of the base's generation_config.json
    apply. ``DataError``: an empty prompt, or a prompt with `max_new_tokens` is longer than the
    model's context."""
    encoded = [encode(prompt, tokenizer) for prompt in prompts]
    sampled = continuations(
        model, tokenizer, encoded, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
        top_k=top_k, batch_size=batch_size, stop=stop, seed=seed, say=say, until=until, penalties=True,
    )  # fmt: skip
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
    until: Callable[[], bool] | None = None,
    penalties: bool = False,
) -> list[list[int]]:
    """The new tokens of each prompt of token ids, in order, up to the end-of-text token and with
    it. ``penalties``: apply those of the base's generation_config.json. Without them the tokens are
    samples of the model itself, as the loss of a policy needs them. Other arguments and errors as
    of ``generate``."""
    from transformers import GenerationConfig, LogitsProcessorList

    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]), reverse=True)
    context = context_of(model)
    if (
        context is not None
        and encoded
        and (longest := len(encoded[order[0]])) + max_new_tokens > context
    ):
        problem = f"a prompt of {longest:,} tokens and {max_new_tokens:,} new ones"
        do = "shorten the prompt, or ask for fewer new tokens"
        raise DataError(problem, f"at most {context:,} together, the model's context", do)
    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=end, stop_strings=list(stop) or None,
        use_cache=True, do_sample=False, num_beams=1,
    )  # fmt: skip
    options = {
        "generation_config": config,
        **({"tokenizer": tokenizer} if stop else {}),
        **_watched(say, until, tokenizer),
    }
    if seed is None and temperature > 0:
        seed = int(torch.randint(2**62, ()))
    answers: list[list[int]] = [[] for _ in encoded]
    training, of_base = model.training, model.generation_config
    model.eval()
    try:
        if not penalties:  # transformers fills what `config` leaves open from the model's
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
        model.generation_config = of_base
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
    """What makes the most likely token of a greedy run a draw. transformers' own sampling draws a
    batch's tokens from one generator, so that the answer to a prompt would depend on the others."""
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


def context_of(model: Any) -> int | None:
    """How many tokens a model's positions allow, if it says so."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _watched(
    say: Callable[[str], None] | None, until: Callable[[], bool] | None, tokenizer: Any
) -> dict[str, Any]:
    """The arguments of transformers' ``generate`` for who reads along, and for who ends it."""
    from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

    class Aloud(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text and say is not None:
                say(text)

    class Until(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.full(
                (len(input_ids),), until is not None and until(), device=input_ids.device
            )

    aloud = (
        {}
        if say is None
        else {"streamer": Aloud(tokenizer, skip_prompt=True, skip_special_tokens=True)}
    )
    return (
        aloud if until is None else {**aloud, "stopping_criteria": StoppingCriteriaList([Until()])}
    )


def encode(prompt: Prompt, tokenizer: Any) -> list[int]:
    """The token ids of a text, or of a chat through the tokenizer's template, up to where its
    answer begins."""
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
