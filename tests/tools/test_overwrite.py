"""``overwrite`` replaces what Veneer wrote and nothing else, whatever it is that writes a
folder."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.checkpoints import save_model, tiny, trained
from tests.support.tiny import tiny_tokenizer
from tests.support.toys import randomise
from torch import nn

import veneer
from veneer.errors import MergeError, OutputExistsError
from veneer.fileio import atomic
from veneer.models import save_plain
from veneer.tools.compose import compose
from veneer.tools.compose.repair import repair
from veneer.tools.convert import convert
from veneer.tools.extract import extract
from veneer.tools.merge_checkpoint import merge_checkpoint, prove

pytestmark = pytest.mark.filterwarnings("ignore:.*was written by another library")

#: what the scripts of others keep in an output folder
THEIRS = (
    "notes.txt",
    "tokenizer.json",
    "step_100/optimizer.bin",
    "step_100/adapter_model.safetensors",
)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("given")
    model, base = tiny(folder / "base", torch.float32)
    adapter = trained(model, folder / "adapter", targets=["q_proj"])
    tuned = save_model(merged_into(model, adapter), folder / "tuned")
    return {"model": model, "base": base, "adapter": adapter, "tuned": tuned}


def merged_into(model: nn.Module, adapter: Path) -> nn.Module:
    import copy

    twin = copy.deepcopy(model)
    handle = veneer.load(twin, adapter)
    handle.merge(keep=False)
    veneer.detach(twin, keep_merged=True)
    return twin


def _save(given: dict[str, Any], out: Path, *, overwrite: bool, **config: Any) -> None:
    handle = veneer.attach(given["model"], veneer.LoraConfig(rank=2, targets=["q_proj"], **config))
    try:
        randomise(handle)
        handle.save(out, overwrite=overwrite)
    finally:
        handle.detach()


def _own_method(given: dict[str, Any], out: Path, *, overwrite: bool) -> None:
    handle = veneer.attach(given["model"], veneer.LoraConfig(rank=2, targets=["q_proj"]))
    try:
        given["model"].save_pretrained(out)  # which always replaces
    finally:
        handle.detach()


def _compose(given, out, *, overwrite):
    compose([given["adapter"]], out, weights=[0.5], overwrite=overwrite)


def _repair(given, out, *, overwrite):
    repair(given["adapter"], out, base=given["model"], threshold=1.0, overwrite=overwrite)


def _extract(given, out, *, overwrite):
    extract(given["base"], given["tuned"], out, rank=2, overwrite=overwrite)


def _convert(given, out, *, overwrite, to):
    source = given["adapter"].with_name(f"source-{to}")
    if not source.exists():
        convert(
            given["adapter"], source, to="peft" if to == "veneer" else "dense", base=given["model"]
        )
    convert(source, out, to=to, base=given["model"], overwrite=overwrite)


def _merge(given, out, *, overwrite):
    merge_checkpoint(
        given["base"], [given["adapter"]], out, model=given["model"], overwrite=overwrite
    )


def _save_plain(given, out, *, overwrite):
    save_plain(given["model"], tiny_tokenizer(), out, overwrite=overwrite)


ADAPTERS = {
    "save": _save, "save_pretrained": _own_method, "compose": _compose, "repair": _repair, "extract": _extract,
    "convert to veneer": partial(_convert, to="veneer"), "convert to peft": partial(_convert, to="peft"),
}  # fmt: skip
MODELS = {"merge": _merge, "save_plain": _save_plain}
WRITERS = {**ADAPTERS, **MODELS}


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("theirs")


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "no exchange"])
@pytest.mark.parametrize("writer", WRITERS)
def test_the_files_of_others_stay(given, tmp_path, writer, exchanges, monkeypatch):
    if not exchanges:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    theirs = [
        name for name in THEIRS if writer not in MODELS or name != "tokenizer.json"
    ]  # which belongs to a model
    fill(tmp_path / "out", *theirs)
    WRITERS[writer](given, tmp_path / "out", overwrite=True)
    WRITERS[writer](given, tmp_path / "out", overwrite=True)
    assert {name: (tmp_path / "out" / name).read_text() for name in theirs} == dict.fromkeys(
        theirs, "theirs"
    )
    hidden = [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
    assert hidden == [], "no litter"
    if writer in ADAPTERS:
        veneer.adapter_files.read(tmp_path / "out")


@pytest.mark.parametrize("writer", [writer for writer in WRITERS if writer != "save_pretrained"])
def test_a_file_is_refused(given, tmp_path, writer):
    """transformers' method refuses a file by itself, with a line in the log."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"notes.txt, which is a file"):
        WRITERS[writer](given, tmp_path / "notes.txt", overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_the_old_adapter_had_and_the_new_one_has_not_is_gone(given, tmp_path):
    """The parameters of a variant that PEFT lacks, beside another adapter, would be refused as a
    stranger's."""
    _save(given, tmp_path / "out", overwrite=False, variant="vera")
    fill(tmp_path / "out", *THEIRS)
    assert (tmp_path / "out" / "veneer.safetensors").exists()
    _save(given, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "veneer.safetensors").exists()
    assert veneer.adapter_files.read(tmp_path / "out").config.variant == "lora"


def test_the_shards_of_the_old_model_are_gone(given, tmp_path):
    """They, and their index, would be another model's beside the new one's single file."""
    _merge(given, tmp_path / "out", overwrite=False)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    fill(tmp_path / "out", *THEIRS)
    _save_plain(given, tmp_path / "out", overwrite=True)
    weights = [path.name for path in (tmp_path / "out").glob("model*")]
    assert weights == ["model.safetensors"]
    _merge(given, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert prove(given["base"], [given["adapter"]], tmp_path / "out", model=given["model"])


def test_what_an_earlier_merge_copied_of_another_base_is_gone(given, tmp_path):
    """transformers would use the template, the sampling and the processor of the one base with the
    weights of the other."""
    first, second = (
        Path(shutil.copytree(given["base"], tmp_path / name)) for name in ("first", "second")
    )
    gone = ("chat_template.jinja", "generation_config.json", "preprocessor_config.json")
    fill(first, *gone, "README.md")
    for name in gone:
        (second / name).unlink(missing_ok=True)

    out, adapters, model = tmp_path / "out", [given["adapter"]], given["model"]

    def merge(base: Path) -> None:
        merge_checkpoint(base, adapters, out, model=model, overwrite=True)

    merge(first)
    fill(out, "notes.txt")
    merge(second)
    assert [name for name in gone if (out / name).exists()] == []
    assert (out / "README.md").read_text() == (out / "notes.txt").read_text() == "theirs"
    assert prove(second, adapters, out, model=model)
    # a template that no merge wrote stays, and is told
    fill(out, "chat_template.jinja")
    record = json.loads((out / "veneer_merge.json").read_text())
    for files in (record["files"], ["../second/config.json", "notes.txt", 1], None):
        (out / "veneer_merge.json").write_text(json.dumps({**record, "files": files}))
        merge(second)
    assert (out / "notes.txt").exists()
    assert (second / "config.json").exists()
    with pytest.raises(MergeError, match=r"chat_template\.jinja is there"):
        prove(second, adapters, out, model=model)


def test_the_tokenizer_of_the_old_model_is_gone(given, tmp_path):
    from transformers import AutoTokenizer

    out, tokenizer = tmp_path / "out", tiny_tokenizer()
    _save_plain(given, out, overwrite=False)
    assert AutoTokenizer.from_pretrained(out).chat_template
    for name in ("preprocessor_config.json", "notes.txt"):
        (out / name).write_text("{}")
    tokenizer.chat_template = None
    save_plain(given["model"], tokenizer, out, overwrite=True)
    assert not AutoTokenizer.from_pretrained(out).chat_template
    assert (out / "preprocessor_config.json").exists()
    assert (out / "notes.txt").exists()


@pytest.mark.parametrize("writer", MODELS)
def test_a_model_is_not_written_beside_an_adapter(given, tmp_path, writer):
    _save(given, tmp_path / "out", overwrite=False)
    with pytest.raises(OutputExistsError, match="which holds an adapter, for a whole model"):
        MODELS[writer](given, tmp_path / "out", overwrite=True)
    assert veneer.adapter_files.read(tmp_path / "out")


@pytest.mark.parametrize("writer", ADAPTERS)
def test_an_adapter_is_not_written_beside_another_model(given, tmp_path, writer):
    _save_plain(given, tmp_path / "out", overwrite=False)
    with pytest.raises(OutputExistsError, match="which holds a whole model"):
        ADAPTERS[writer](given, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_during_a_long_merge(given, tmp_path, overwrite):
    """Without leave the merge is refused; with leave, the files of others stay."""
    out = tmp_path / "out"

    def appear(done: int, total: int, name: str) -> None:
        fill(out, *THEIRS)

    def merge(**options: Any) -> Any:
        options = {"model": given["model"], **options}
        return merge_checkpoint(given["base"], [given["adapter"]], out, **options)

    if overwrite:
        merge(overwrite=True, progress=appear)
    else:
        with pytest.raises(OutputExistsError, match="out, which exists"):
            merge(progress=appear)
        assert not (out / "config.json").exists()
        merge(overwrite=True)
    assert (out / "step_100" / "optimizer.bin").read_text() == "theirs"
    assert prove(given["base"], [given["adapter"]], out, model=given["model"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
