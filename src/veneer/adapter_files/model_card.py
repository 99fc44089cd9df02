"""The model card: the README.md of an adapter folder, for people and for the Hugging Face hub.

    ---
    front matter: lines "key: JSON value", which are valid YAML, so that no YAML library is needed
    ---
    the sections: what the adapter is, its base, data, training, metrics, licence, how to load and
    verify it
    <!-- NOTES_MARKER -->
    notes of people

The card is generated from PEFT's config and Veneer's record. Facts that both lack are left out, or
the card calls them "not stated". Veneer takes no facts from the card, so people may edit it. Saving
the adapter again rewrites the text above NOTES_MARKER and keeps the notes below. A card without
this line was written by somebody else and is kept unchanged.

The card reads these keys of ``provenance``, all of them optional:

    title, description  str           the heading; a paragraph of Markdown below the heading
    license             str           as the hub spells it ("apache-2.0"), or any other words
    language            str | [str]   two-letter codes
    datasets            [str]         hub ids of data sets, besides the data in ``config``
    config              {name: value} the settings of the training; ``data`` and ``eval_data`` among
                                      them name the data
    data                {name: hash}  hashes of the data
    metrics             {name: value} metrics that begin with "eval_" are in the front matter, too
    finished            str           the time at which the training ended

``veneer train`` gives the last four keys. Format: https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.errors import escape_controls
from veneer.fileio.hashing import hash_json
from veneer.formats import peft, vllm

#: the file name of the card
CARD_FILE = "README.md"
#: the last generated line of a card; people may write notes below it
NOTES_MARKER = (
    "<!-- Saving the adapter again keeps what stands below this line, and writes anew what stands"
    " above. -->"
)
#: the Python code that stands for the base in an example, if its name is unknown
UNKNOWN_BASE_CODE = "...  # the base"
_DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
# settings of a run that other sections of the card show, or that concern only the run's machine
_HIDDEN_SETTINGS = {
    "base",
    "data",
    "eval_data",
    "output",
    "trackers",
    "resume",
    "overwrite",
    "save_every",
    "keep_checkpoints",
    "record_example",
}


def card(
    peft_config: Mapping[str, Any],
    record: Mapping[str, Any] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> str:
    """The text of an adapter's README.md.

    Args:
        peft_config: the fields of ``adapter_config.json``.
        record: Veneer's record (``AdapterFiles.record``); None for an adapter of another library.
        shapes: the shapes of the tensors in PEFT's file by name, by which the card tells whether
            vLLM can load the adapter.
    """
    return _Card(peft_config, record or {}, shapes or {}).text()


def renew_card(new_card: str, old_card: str | None) -> str:
    """``new_card`` with the notes of ``old_card``, the text below NOTES_MARKER. If ``old_card`` has
    no such line, it is returned unchanged."""
    if old_card is None:
        return new_card
    _, marker, notes = old_card.partition(NOTES_MARKER)
    return new_card.rstrip("\n") + notes if marker else old_card


def folder_card(
    path: Path,
    peft_config: Mapping[str, Any],
    record: Mapping[str, Any] | None,
    tensors: Mapping[str, Tensor],
) -> str:
    """The model card of an adapter, with the notes that people added to the card in ``path``."""
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    card_path = path / CARD_FILE
    old_card = (
        card_path.read_text(encoding="utf-8", errors="replace") if card_path.is_file() else None
    )
    return renew_card(card(peft_config, record, shapes), old_card)


class _Card:
    def __init__(
        self,
        config: Mapping[str, Any],
        record: Mapping[str, Any],
        shapes: Mapping[str, Sequence[int]],
    ) -> None:
        self.peft_config = config
        self.record = record
        self.shapes = shapes
        self.provenance = parse_provenance(record)
        self.base_record = record.get("base", {})
        config_base = config.get("base_model_name_or_path")
        self.base_name = self.base_record.get("name") or config_base
        self.variant = record.get("config", {}).get("variant", "lora")
        self.title = self.provenance["title"] or (
            "LoRA adapter" + (f" for {_display_name(config_base)}" if config_base else "")
        )
        run_config = self.provenance["config"]
        self.data_name, self.eval_data_name = run_config.get("data"), run_config.get("eval_data")
        # the transformers class of a base that also reads images or sounds, or that has an encoder;
        # None for any other base
        architecture = str(self.base_record.get("architecture"))
        self.multimodal_class = (
            architecture
            if architecture.isidentifier() and architecture.endswith("ForConditionalGeneration")
            else None
        )
        self.is_language_model = (
            config.get("task_type") == "CAUSAL_LM" and self.multimodal_class is None
        )
        peft_type = str(config.get("peft_type"))
        self.not_peft_reason = (
            "" if peft_type == "LORA" else peft_type.removeprefix(peft.NOT_FOR_PEFT).lstrip(": ")
        )

    def text(self) -> str:
        sections = {
            "Base": self.describe_base(),
            "Data": self.describe_data(),
            "Training": _markdown_table("setting", self.settings()),
            "Metrics": _markdown_table("metric", self.provenance["metrics"]),
            "Licence": (
                f"{_escape_line(self.provenance['license'] or 'Not stated')}. The base model has a"
                " licence of its own."
            ),
            "Use": "\n\n".join(self.usage()),
            "Verify": self.describe_verification(),
        }
        body = [
            f"# {_escape_line(self.title)}",
            self.summary(),
            _clean_paragraphs(self.provenance["description"]),
        ]
        body += [f"## {name}\n\n{text}" for name, text in sections.items() if text]
        return (
            f"---\n{front_matter(self.metadata())}---\n\n"
            + "\n\n".join(filter(None, body))
            + f"\n\n{NOTES_MARKER}\n"
        )

    def metadata(self) -> dict[str, Any]:
        base_id = _hub_id(self.base_name)
        datasets = map(_hub_id, (*self.provenance["datasets"], self.data_name, self.eval_data_name))
        metadata = {
            "library_name": "veneer" if self.not_peft_reason else "peft",
            "base_model": base_id,
            "base_model_relation": "adapter" if base_id else None,
            "pipeline_tag": "text-generation" if self.is_language_model else None,
            "tags": list(
                dict.fromkeys(["lora", *(["veneer"] if self.record else []), self.variant])
            ),
            "language": self.provenance["language"],
            "datasets": list(dict.fromkeys(filter(None, datasets))),
            **_licence_fields(self.provenance["license"]),
            "model-index": self.model_index(),
        }
        return {key: value for key, value in metadata.items() if value}

    def model_index(self) -> list[dict[str, Any]]:
        data = self.eval_data_name or self.data_name
        eval_metrics = [
            {"type": name.removeprefix("eval_"), "name": name, "value": value}
            for name, value in self.provenance["metrics"].items()
            if name.startswith("eval_") and type(value) in (int, float) and math.isfinite(value)
        ]
        if not eval_metrics or not data or not self.is_language_model:
            return []
        result = {
            "task": {"type": "text-generation"},
            "dataset": {"name": _display_name(data), "type": _hub_id(data) or "private"},
            "metrics": eval_metrics,
        }
        return [{"name": self.title, "results": [result]}]

    def summary(self) -> str:
        paths = self.record.get("changes", {})
        module_counts = Counter(
            ".".join(path.split(".")[-2:]).removesuffix(".weight") for path in paths
        )
        ranks = sorted(
            {self.peft_config["r"], *(self.peft_config.get("rank_pattern") or {}).values()}
        )
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        text = (
            f"A low-rank adapter: variant {_inline_code(self.variant)}, {rank}, alpha"
            f" {self.peft_config['lora_alpha']:g}. It holds the change of some weights of its base,"
            " and is of no use without it."
        )
        if tokens := self.peft_config.get("alora_invocation_tokens"):
            text += f" It acts on the tokens from its invocation {_inline_code(tokens)} on (aLoRA)."
        if module_counts:
            counted_modules = [
                f"{_inline_code(name)} × {count}" for name, count in module_counts.items()
            ]
            text += f" It changes {len(paths)} weights: {_abbreviate(counted_modules, 24)}."
        return text

    def describe_base(self) -> str:
        base, text = (
            self.base_record,
            _inline_code(self.base_name) if self.base_name else "Not stated",
        )
        if base.get("architecture"):
            text += f", a {_inline_code(base['architecture'])}"
        text += "."
        if base.get("weights"):
            text += (
                f"\n\nFingerprint of the {len(base['weights'])} base weights that it changes: "
                f"{_inline_code(hash_json(base['weights'])[:32])}. Veneer refuses another base."
            )
        if base.get("rest"):
            unchanged_text = "tensors that the adapter does not change: norms, embeddings, heads"
            text += f" It also compares {len(base['rest'])} {unchanged_text}."
        if base.get("fresh"):
            fresh_names = _abbreviate([_inline_code(name) for name in base["fresh"]], 8)
            text += (
                "\n\nParameters that were random as it was trained, and that no file holds:"
                f" {fresh_names}."
            )
        return text

    def describe_data(self) -> str:
        data_by_use = {"trained on": self.data_name, "evaluated on": self.eval_data_name}
        lines = [
            f"- {label} {_inline_code(_display_name(data))}"
            for label, data in data_by_use.items()
            if data
        ]
        lines += [f"- {_inline_code(name)}" for name in self.provenance["datasets"]]
        lines += [
            f"- hash of {_escape_line(name)}: {_inline_code(value)}"
            for name, value in self.provenance["data"].items()
            if value
        ]
        return "\n".join(lines) or "Not stated."

    def settings(self) -> dict[str, Any]:
        config = self.provenance["config"] or self.record.get("config") or {}
        settings = {
            name: value
            for name, value in config.items()
            if value not in (None, [], "") and name not in _HIDDEN_SETTINGS
        }
        settings = settings or {
            "rank": self.peft_config["r"],
            "alpha": self.peft_config["lora_alpha"],
        }
        return {
            **settings,
            **({"finished": self.provenance["finished"]} if self.provenance["finished"] else {}),
        }

    def usage(self) -> Iterator[str]:
        base_name = self.base_name if self.multimodal_class or self.is_language_model else None
        transformers_name = (
            base_name
            if base_name
            and not base_name.startswith("package:")
            and not base_name.endswith(".gguf")
            else None
        )
        loader_class = self.multimodal_class or "AutoModelForCausalLM"
        transformers_import = (
            [f"from transformers import {loader_class}"] if transformers_name else []
        )
        load_call = f"{loader_class}.from_pretrained({_quote_string(transformers_name)})"
        transformers_code = f"model = {load_call if transformers_name else UNKNOWN_BASE_CODE}"
        veneer_code, veneer_import = transformers_code, transformers_import
        if base_name and not self.multimodal_class:
            veneer_code = f"model = load_base({_quote_string(base_name)}).model"
            veneer_import = ["from veneer.models import load_base"]
        yield _python_block(
            ["import veneer", *veneer_import], veneer_code, 'veneer.load(model, ".")  # this folder'
        )
        if self.not_peft_reason:
            yield f"PEFT and vLLM cannot load it: {_escape_line(self.not_peft_reason)}."
            return
        peft_import = ["from peft import PeftModel", *transformers_import]
        yield _python_block(
            peft_import, transformers_code, 'model = PeftModel.from_pretrained(model, ".")'
        )
        reasons = list(self.vllm_problems())
        if reasons:
            yield f"vLLM cannot serve it: {'; '.join(reasons)}."
            return
        rank = next(
            rank for rank in vllm.VALID_MAX_RANKS if rank >= vllm.largest_rank(self.peft_config)
        )
        options = f"--enable-lora --max-lora-rank {rank} --lora-modules adapter=."
        yield f"```console\nvllm serve {shlex.quote(transformers_name or 'BASE')} {options}\n```"
        yield "vLLM decides by the architecture of the base which of its layers may have adapters."

    def vllm_problems(self) -> Iterator[str]:
        if not self.is_language_model:
            yield "it serves language models"
        if self.peft_config.get("target_parameters"):
            yield "it adapts modules, not single parameters"
        if self.peft_config.get("fan_in_fan_out"):
            yield "it does not read transposed layers"
        yield from vllm.problems(self.peft_config, self.shapes, shapes=self.shapes)

    def describe_verification(self) -> str:
        if not self.record:
            return "Another library wrote it: there is nothing to verify it by."
        text = (
            "`veneer inspect .` reads every byte of this folder and compares it with the hashes in"
            " its record"
        )
        record_hash = self.record["hashes"].get("record")
        return (
            f"{text}, whose own is {_inline_code(record_hash)}."
            if record_hash is not None
            else f"{text}."
        )


def front_matter(metadata: Mapping[str, Any]) -> str:
    """Lines ``key: value`` of YAML. Each value is JSON that YAML 1.1 reads with the same result,
    because floats have a decimal point and characters that YAML forbids are escaped."""
    return "".join(f"{key}: {_yaml_value(value)}\n" for key, value in metadata.items())


def _yaml_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return (
            "{"
            + ", ".join(
                f"{_yaml_value(str(key))}: {_yaml_value(member)}" for key, member in value.items()
            )
            + "}"
        )
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_yaml_value, value)) + "]"
    if isinstance(value, float):
        text = repr(value)
        return text if "." in text else text.replace("e", ".0e")
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(
        "[\x7f-\xa0\u2028\u2029\ufeff\ud800-\udfff\ufffe\uffff]",
        lambda match: f"\\u{ord(match[0]):04x}",
        text,
    )


def _licence_fields(text: str) -> dict[str, str]:
    """The front matter of a licence: ``license`` if ``text`` is one word, as the hub writes it;
    else ``license: other`` and ``license_name``."""
    if not text:
        return {}
    if re.fullmatch(r"[a-z][a-z0-9.+-]*", text.lower()):
        return {"license": text.lower()}
    return {
        "license": "other",
        "license_name": re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-"),
    }


def parse_provenance(record: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a record's provenance that the card reads, with values of the expected types. A
    provenance may hold any values; a missing key, or a value of another type, becomes empty."""
    provenance = record.get("provenance", {})
    fields: dict[str, Any] = {}
    for key in ("title", "description", "license", "finished"):
        fields[key] = provenance[key] if isinstance(provenance.get(key), str) else ""
    for key in ("config", "data", "metrics"):
        fields[key] = provenance[key] if isinstance(provenance.get(key), Mapping) else {}
    for key in ("language", "datasets"):
        words = [provenance[key]] if isinstance(provenance.get(key), str) else provenance.get(key)
        fields[key] = (
            [word for word in words if isinstance(word, str)] if isinstance(words, list) else []
        )
    return fields


def _markdown_table(column_name: str, values: Mapping[str, Any]) -> str:
    rows = [
        f"| {_inline_code(name).replace('|', chr(92) + '|')} | {_format_cell(value)} |"
        for name, value in values.items()
    ]
    return "\n".join([f"| {column_name} | value |", "|---|---|", *rows]) if rows else ""


def _python_block(imports: list[str], *lines: str) -> str:
    return "\n".join(["```python", *imports, "", *lines, "```"])


def _abbreviate(words: list[str], limit: int) -> str:
    return ", ".join([*words[:limit], *(["…"] if len(words) > limit else [])])


def _hub_id(name: Any) -> str | None:
    """``name`` if it looks like the id of a repository on the hub ("owner/name"), does not end like
    a file of data or weights, and does not exist as a path; else None."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII):
        return None
    return None if name.endswith((*_DATA_SUFFIXES, ".gguf")) or Path(name).exists() else name


def _display_name(name: Any) -> str:
    """``name`` if it is a hub id. Of a path, only the last segment is shown, because the folders
    above it differ between machines."""
    return str(name) if _hub_id(name) else Path(str(name)).name or str(name)


def _clean_paragraphs(text: str) -> str:
    """Markdown text from users, without the line NOTES_MARKER, so that the text is not taken for
    notes when the card is renewed."""
    return escape_controls(text.replace("\r\n", "\n").replace(NOTES_MARKER, "").strip())


def _escape_line(value: Any) -> str:
    """Text from users on one line, with the special characters of Markdown and HTML escaped."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", " ".join(escape_controls(str(value)).split()))


def _inline_code(value: Any) -> str:
    """Text from users as inline code of Markdown, on one line."""
    text = " ".join(escape_controls(str(value)).split())
    backticks = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{backticks}{padding}{text}{padding}{backticks}"


def _format_cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return _escape_line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _quote_string(name: Any) -> str:
    return escape_controls(json.dumps(str(name), ensure_ascii=False))
