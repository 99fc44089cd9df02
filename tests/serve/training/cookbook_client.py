"""Recipes of `tinker-cookbook` as they are, by a Python that has it: argv[1] is a file of JSON that
says which, with which settings, and on which data. Data sets and the tokenizer are local; a policy
recipe's reward is whether an answer begins with a letter that is asked for, in the place of
GSM8K's. What they log goes to the file's folder, and beside it what they were given to learn, for
whoever does the same without a server."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

os.environ["TINKER_TELEMETRY"], os.environ["TINKER_API_KEY"] = "0", "tml-any"
warnings.simplefilter("ignore")

import datasets  # noqa: E402
from tinker_cookbook import model_info, renderers, tokenizer_utils  # noqa: E402  # pyright: ignore
from tinker_cookbook.preference import dpo_datasets, preference_datasets, train_dpo  # noqa: E402  # pyright: ignore
from tinker_cookbook.recipes import rl_loop, sl_loop  # noqa: E402  # pyright: ignore[reportMissingImports]
from tinker_cookbook.supervised.data import conversation_to_datum  # noqa: E402  # pyright: ignore
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig  # noqa: E402  # pyright: ignore
from transformers import AutoTokenizer  # noqa: E402

RENDERER = "role_colon"


def rows_of(data):
    """What a server is sent of some data."""
    return [
        {
            "tokens": one.model_input.to_ints(), "target_tokens": list(one.loss_fn_inputs["target_tokens"].data),
            "weights": list(one.loss_fn_inputs["weights"].data),
        }
        for one in data
    ]  # fmt: skip


def tables(name, rows):
    datasets.load_dataset = lambda *_: datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(rows)}
    )
    return {
        "log_path": str(FOLDER / name),
        "base_url": TOLD["url"],
        "model_name": TOLD["base"],
        "ttl_seconds": None,
    }


def supervised(name, rows, batch_size, **settings):
    """Rows of "messages"."""
    config = sl_loop.Config(**tables(name, rows), batch_size=batch_size, **settings)
    sl_loop.main(config)
    shuffled = datasets.Dataset.from_list(rows).shuffle(seed=0)  # as the recipe does
    renderer = renderers.get_renderer(RENDERER, tokenizer_utils.get_tokenizer(TOLD["base"]))
    batches = []
    for start in range(0, len(shuffled) - batch_size + 1, batch_size):
        own = shuffled.select(range(start, start + batch_size))
        batches.append(
            [
                conversation_to_datum(
                    row["messages"], renderer, config.max_length, config.train_on_what
                )
                for row in own
            ]
        )
    return [rows_of(batch) for batch in batches]


def preference(name, rows, batch_size, max_length, **settings):
    """Rows of "comparison" and "label", which the cookbook's own builder reads from a file."""
    common = tables(name, rows)
    file = FOLDER / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    builder = dpo_datasets.DPODatasetBuilderFromComparisons(
        common_config=ChatDatasetBuilderCommonConfig(
            model_name_for_tokenizer=TOLD["base"],
            renderer_name=RENDERER,
            max_length=max_length,
            batch_size=batch_size,
        ),
        comparison_builder=preference_datasets.ComparisonBuilderFromJsonl(train_path=str(file)),
    )
    train_dpo.main(
        train_dpo.Config(
            **common,
            recipe_name="dpo",
            renderer_name=RENDERER,
            dataset_builder=builder,
            eval_every=0,
            **settings,
        )
    )
    again, _ = builder()
    again.set_epoch(seed=0)
    return [rows_of(again.get_batch(number)) for number in range(len(again))]


def policy(name, rows, **settings):
    """Rows of "question" and "answer", the letters of which an answer's first one shall be."""
    rl_loop.get_reward = lambda content, answer: float(
        content.strip().lower().startswith(tuple(answer))
    )
    rl_loop.main(rl_loop.Config(**tables(name, rows), **settings))


def main():
    tokenizer = AutoTokenizer.from_pretrained(TOLD["tokenizer"])
    tokenizer_utils.register_tokenizer(TOLD["base"], lambda: tokenizer)
    model_info.get_recommended_renderer_name = lambda name: RENDERER
    recipes = {"supervised": supervised, "preference": preference, "policy": policy}
    for one in TOLD["recipes"]:
        learned = recipes[one["recipe"]](one["name"], one["rows"], **one["settings"])
        (FOLDER / f"{one['name']}.learned.json").write_text(json.dumps(learned))


if __name__ == "__main__":
    FOLDER = Path(sys.argv[1]).parent
    TOLD = json.loads(Path(sys.argv[1]).read_text())
    main()
