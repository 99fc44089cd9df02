"""Recipes of `tinker-cookbook` as they are, against the server at argv[1] whose base's tokenizer lies at argv[2]; what
they log goes to argv[3]. Data sets and tokenizer are local; the policy recipe's reward is a task that a tiny model can
learn: to write small letters."""

from __future__ import annotations

import os
import random
import sys
import warnings

os.environ["TINKER_TELEMETRY"], os.environ["TINKER_API_KEY"] = "0", "tml-any"
warnings.simplefilter("ignore")

import datasets  # noqa: E402
from tinker_cookbook import model_info  # noqa: E402  # pyright: ignore[reportMissingImports]
from tinker_cookbook.recipes import rl_loop, sl_loop  # noqa: E402  # pyright: ignore[reportMissingImports]
from transformers import AutoTokenizer  # noqa: E402

URL, TOKENIZER, LOG = sys.argv[1:4]
LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz")
WORDS = ["sun", "sea", "hill", "rain", "tree", "stone"]


def chats(path, *_):
    draw = random.Random(1)
    if "gsm8k" in path:
        rows = [{"question": draw.choice(WORDS), "answer": ""} for _ in range(60)]
    else:
        pairs = [(word, " ".join([word] * 3)) for word in (draw.choice(WORDS) for _ in range(160))]
        rows = [
            {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
            for asked, said in pairs
        ]
    return datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})


def main():
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    datasets.load_dataset = chats
    model_info.get_recommended_renderer_name = lambda name: "role_colon"
    for recipe in (sl_loop, rl_loop):
        recipe.get_tokenizer = lambda name: tokenizer
    common = {"base_url": URL, "model_name": "tiny", "lora_rank": 8, "ttl_seconds": None}
    sl_loop.main(
        sl_loop.Config(**common, log_path=f"{LOG}/sl", batch_size=8, learning_rate=0.02, max_length=64, save_every=5)
    )
    rl_loop.get_reward = lambda content, answer: sum(one in LETTERS for one in content) / max(len(content), 1)
    rl_loop.main(
        rl_loop.Config(
            **common, log_path=f"{LOG}/rl", batch_size=4, group_size=8, learning_rate=0.03, max_tokens=16, max_steps=12
        )
    )


main()
