"""Model folders whose JSON files name Python code in the folder. The code writes a file as soon as
it is imported."""

from __future__ import annotations

import json
from pathlib import Path

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({mark!r}).write_text("it ran")


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
CLASSES = {
    "AutoConfig": "own_code.OwnConfig",
    "AutoModel": "own_code.OwnModel",
    "AutoModelForCausalLM": "own_code.OwnModel",
    "AutoModelForSeq2SeqLM": "own_code.OwnModel",
    "AutoModelForSequenceClassification": "own_code.OwnModel",
    "AutoModelForTokenClassification": "own_code.OwnModel",
    "AutoModelForImageClassification": "own_code.OwnModel",
    "AutoModelForSpeechSeq2Seq": "own_code.OwnModel",
    "AutoImageProcessor": "own_code.OwnTokenizer",
    "AutoFeatureExtractor": "own_code.OwnTokenizer",
    "AutoProcessor": "own_code.OwnTokenizer",
    "AutoTokenizer": ["own_code.OwnTokenizer", "own_code.OwnTokenizer"],
}


def name_own_code(folder: Path, mark: Path, files: tuple[str, ...]) -> Path:
    """Make the JSON ``files`` of a folder name code in the folder. The code writes the file
    ``mark`` when it is imported. Returns the folder."""
    (folder / "own_code.py").write_text(CODE.format(mark=str(mark)))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).write_text('it ran')\n"
        "def generate(*a, **k): pass\n"
    )
    for name in files:
        content = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        content["auto_map"] = CLASSES
        if name == "config.json":
            content["model_type"] = "own_llama"
        if name == "tokenizer_config.json":
            content["tokenizer_class"] = "OwnTokenizer"
        (folder / name).write_text(json.dumps(content))
    return folder
