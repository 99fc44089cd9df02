"""Text from a model, many prompts at a time.

    texts = generate(model, tokenizer, ["2 + 2 =", …], max_new_tokens=32)

Prompts of similar length share a batch, padded on the left so that every row goes on from its last token. A row ends at
the end-of-text token, at a stop string, or at `max_new_tokens`; the longest prompts run first, so that too little
memory shows at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from veneer.errors import DataError

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
    batch_size: int = 16,
    stop: Sequence[str] = (),
    seed: int | None = None,
) -> list[str]:
    """The continuation of each prompt, in order, without the prompt and without the stop string.

    Args:
        prompts: texts, or chats (lists of {"role", "content"}), which go through the tokenizer's chat template.
        temperature: 0 takes the most likely token each time; above 0 samples.
        top_p: when sampling, from the smallest set of tokens with this much probability.
        stop: strings that end a row.
        seed: of the sampling; the global random state is left as it was.

    Raises:
        DataError: an empty prompt, or a prompt with `max_new_tokens` is longer than the model's context.
    """
    encoded = [_encode(prompt, tokenizer) for prompt in prompts]
    _fits(model, encoded, max_new_tokens)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]), reverse=True)
    texts = [""] * len(encoded)
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                options = _options(tokenizer, max_new_tokens, temperature, top_p, stop)
                for row, text in zip(rows, _batch(model, tokenizer, [encoded[i] for i in rows], options), strict=True):
                    texts[row] = _cut(text, stop)
    finally:
        model.train(training)
    return texts


def _encode(prompt: Prompt, tokenizer: Any) -> list[int]:
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
    elif tokenizer.chat_template is None:
        raise DataError(
            "Found: a chat prompt, and a base without a chat template. Expected: a chat model. "
            "Do: pass the prompt as text."
        )
    else:
        chat = tokenizer.apply_chat_template(prompt, tokenize=True, return_dict=True, add_generation_prompt=True)
        ids = list(chat["input_ids"])
    if not ids:
        raise DataError("Found: an empty prompt. Expected: at least one token. Do: write something to continue.")
    return ids


def _fits(model: Any, encoded: list[list[int]], max_new_tokens: int) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max((len(ids) for ids in encoded), default=0)
    if context is not None and longest + max_new_tokens > context:
        raise DataError(
            f"Found: a prompt of {longest:,} tokens and {max_new_tokens:,} new ones. Expected: at most {context:,} "
            "together, the model's context. Do: shorten the prompt, or ask for fewer new tokens."
        )


def _options(
    tokenizer: Any, max_new_tokens: int, temperature: float, top_p: float, stop: Sequence[str]
) -> dict[str, Any]:
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    # A config of our own: a model's may carry sampling values that warn, or change the result, in a greedy run.
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
        stop_strings=list(stop) or None,
        use_cache=True,
        **sampling,
    )
    return {"generation_config": config, **({"tokenizer": tokenizer} if stop else {})}


def _batch(model: Any, tokenizer: Any, rows: list[list[int]], options: dict[str, Any]) -> list[str]:
    width = max(len(ids) for ids in rows)
    pad = options["generation_config"].pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)  # [b, width]
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    output = model.generate(input_ids=ids, attention_mask=mask, **options)
    return tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)


def _cut(text: str, stop: Sequence[str]) -> str:
    for word in stop:
        text = text.split(word, 1)[0]
    return text
