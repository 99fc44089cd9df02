"""The model card: the README.md of an adapter folder, for people and for the Hugging Face hub.

    ---
    front matter: one JSON value a line, which is YAML too, so that no YAML library is needed to
        write it
    ---
    what it is, its base, data, training, metrics, licence, how to load and how to verify it
    <!-- … -->
    notes of people

The card is generated from PEFT's config and Veneer's record; facts that these lack are left out or
"not stated". No code reads the card, so people may edit it. Saving again rewrites the text above
the last line of the template and keeps the notes below it; a card without that line was written by
somebody else and is kept unchanged.

The card reads these keys of ``provenance``, all of them optional:

    title, description  str           the heading; a paragraph of Markdown below it
    license             str           as the hub spells it ("apache-2.0"), or any other words
    language            str | [str]   two-letter codes
    datasets            [str]         hub ids, besides the one of ``config``
    config              {name: value} how it was trained; ``data`` and ``eval_data`` in it name the
                        data
    data                {name: hash}  hashes of the data
    metrics             {name: value} those that begin with "eval_" go into the front matter too
    finished            str           when

``veneer train`` gives the last four. Format: https://huggingface.co/docs/hub/model-cards
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

from veneer.errors import escape_controls
from veneer.fileio.hashing import hash_json
from veneer.formats import peft, vllm

NAME = "README.md"
LINE = (
    "<!-- Saving the adapter again keeps what stands below this line, and writes anew what stands"
    " above. -->"
)
UNKNOWN = "...  # the base"
_DATA_FILES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
# settings of a run that other sections of the card show, or that matter on the training machine
# alone
_ELSEWHERE = {
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
        shapes: the shapes of the tensors in PEFT's file, by name, from which the card tells whether
            vLLM can load it.
    """
    return _Card(peft_config, record or {}, shapes or {}).text()


def renew_card(new: str, old: str | None) -> str:
    """The card ``new`` with the notes below the last line of the template in ``old``; ``old``
    itself if it lacks that line."""
    if old is None:
        return new
    _, line, notes = old.partition(LINE)
    return new.rstrip("\n") + notes if line else old


class _Card:
    def __init__(
        self,
        config: Mapping[str, Any],
        record: Mapping[str, Any],
        shapes: Mapping[str, Sequence[int]],
    ) -> None:
        self.config, self.record, self.shapes, self.provenance = (
            config,
            record,
            shapes,
            _parse_provenance(record),
        )
        self.base = record.get("base", {})
        named = config.get("base_model_name_or_path")
        self.base_name = self.base.get("name") or named
        self.variant = record.get("config", {}).get("variant", "lora")
        self.title = self.provenance["title"] or (
            "LoRA adapter" + (f" for {_display_name(named)}" if named else "")
        )
        self.data, self.eval_data = (
            self.provenance["config"].get("data"),
            self.provenance["config"].get("eval_data"),
        )
        # transformers' class of a base that reads images, sounds or an encoder's sequence
        name = str(self.base.get("architecture"))
        self.family = (
            name if name.isidentifier() and name.endswith("ForConditionalGeneration") else None
        )
        self.generates = config.get("task_type") == "CAUSAL_LM" and self.family is None
        kind = str(config.get("peft_type"))
        self.not_peft = "" if kind == "LORA" else kind.removeprefix(peft.NOT_FOR_PEFT).lstrip(": ")

    def text(self) -> str:
        sections = {
            "Base": self.of_base(),
            "Data": self.of_data(),
            "Training": _table("setting", self.settings()),
            "Metrics": _table("metric", self.provenance["metrics"]),
            "Licence": (
                f"{_line(self.provenance['license'] or 'Not stated')}. The base model has a licence"
                " of its own."
            ),
            "Use": "\n\n".join(self.use()),
            "Verify": self.verification(),
        }
        body = [
            f"# {_line(self.title)}",
            self.summary(),
            _paragraphs(self.provenance["description"]),
        ]
        body += [f"## {name}\n\n{text}" for name, text in sections.items() if text]
        return (
            f"---\n{front_matter(self.metadata())}---\n\n"
            + "\n\n".join(filter(None, body))
            + f"\n\n{LINE}\n"
        )

    def metadata(self) -> dict[str, Any]:
        base = _hub_id(self.base_name)
        datasets = map(_hub_id, (*self.provenance["datasets"], self.data, self.eval_data))
        metadata = {
            "library_name": "veneer" if self.not_peft else "peft",
            "base_model": base,
            "base_model_relation": "adapter" if base else None,
            "pipeline_tag": "text-generation" if self.generates else None,
            "tags": list(
                dict.fromkeys(["lora", *(["veneer"] if self.record else []), self.variant])
            ),
            "language": self.provenance["language"],
            "datasets": list(dict.fromkeys(filter(None, datasets))),
            **_licence(self.provenance["license"]),
            "model-index": self.model_index(),
        }
        return {key: value for key, value in metadata.items() if value}

    def model_index(self) -> list[dict[str, Any]]:
        data = self.eval_data or self.data
        measured = [
            {"type": name.removeprefix("eval_"), "name": name, "value": value}
            for name, value in self.provenance["metrics"].items()
            if name.startswith("eval_") and type(value) in (int, float) and math.isfinite(value)
        ]
        if not measured or not data or not self.generates:
            return []
        dataset = {"name": _display_name(data), "type": _hub_id(data) or "private"}
        results = [{"task": {"type": "text-generation"}, "dataset": dataset, "metrics": measured}]
        return [{"name": self.title, "results": results}]

    def summary(self) -> str:
        paths = self.record.get("changes", {})
        kinds = Counter(".".join(path.split(".")[-2:]).removesuffix(".weight") for path in paths)
        ranks = sorted({self.config["r"], *(self.config.get("rank_pattern") or {}).values()})
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        text = (
            f"A low-rank adapter: variant {_code(self.variant)}, {rank}, alpha"
            f" {self.config['lora_alpha']:g}. It holds the change of some weights of its base, and"
            " is of no use without it."
        )
        if tokens := self.config.get("alora_invocation_tokens"):
            text += f" It acts on the tokens from its invocation {_code(tokens)} on (aLoRA)."
        if kinds:
            listed = [f"{_code(kind)} × {count}" for kind, count in kinds.items()]
            text += f" It changes {len(paths)} weights: {_abbreviate(listed, 24)}."
        return text

    def of_base(self) -> str:
        base, text = self.base, _code(self.base_name) if self.base_name else "Not stated"
        if base.get("architecture"):
            text += f", a {_code(base['architecture'])}"
        text += "."
        if base.get("weights"):
            text += (
                f"\n\nFingerprint of the {len(base['weights'])} base weights that it changes: "
                f"{_code(hash_json(base['weights'])[:32])}. Veneer refuses another base."
            )
        if base.get("rest"):
            unchanged = "tensors that the adapter does not change: norms, embeddings, heads"
            text += f" It also compares {len(base['rest'])} {unchanged}."
        if base.get("fresh"):
            lost = _abbreviate([_code(name) for name in base["fresh"]], 8)
            text += (
                "\n\nParameters that were random as it was trained, and that no file holds:"
                f" {lost}."
            )
        return text

    def of_data(self) -> str:
        named = {"trained on": self.data, "evaluated on": self.eval_data}
        lines = [f"- {label} {_code(_display_name(data))}" for label, data in named.items() if data]
        lines += [f"- {_code(name)}" for name in self.provenance["datasets"]]
        lines += [
            f"- hash of {_line(name)}: {_code(value)}"
            for name, value in self.provenance["data"].items()
            if value
        ]
        return "\n".join(lines) or "Not stated."

    def settings(self) -> dict[str, Any]:
        trained = self.provenance["config"] or self.record.get("config") or {}
        nonempty = {name: value for name, value in trained.items() if value not in (None, [], "")}
        settings = {name: value for name, value in nonempty.items() if name not in _ELSEWHERE}
        settings = settings or {"rank": self.config["r"], "alpha": self.config["lora_alpha"]}
        return {
            **settings,
            **({"finished": self.provenance["finished"]} if self.provenance["finished"] else {}),
        }

    def use(self) -> Iterator[str]:
        name = self.base_name if self.family or self.generates else None
        plain = (
            name
            if name and not name.startswith("package:") and not name.endswith(".gguf")
            else None
        )
        loader = self.family or "AutoModelForCausalLM"
        by_transformers = [f"from transformers import {loader}"] if plain else []
        from_transformers = (
            f"model = {f'{loader}.from_pretrained({_quote(plain)})' if plain else UNKNOWN}"
        )
        ours, by_ours = from_transformers, by_transformers
        if name and not self.family:
            ours, by_ours = (
                f"model = load_base({_quote(name)}).model",
                ["from veneer.models import load_base"],
            )
        yield _python(["import veneer", *by_ours], ours, 'veneer.load(model, ".")  # this folder')
        if self.not_peft:
            yield f"PEFT and vLLM cannot load it: {_line(self.not_peft)}."
            return
        by_peft = ["from peft import PeftModel", *by_transformers]
        yield _python(by_peft, from_transformers, 'model = PeftModel.from_pretrained(model, ".")')
        reasons = list(self.not_vllm())
        if reasons:
            yield f"vLLM cannot serve it: {'; '.join(reasons)}."
            return
        rank = next(rank for rank in vllm.RANKS if rank >= vllm.largest_rank(self.config))
        options = f"--enable-lora --max-lora-rank {rank} --lora-modules adapter=."
        yield f"```console\nvllm serve {shlex.quote(plain or 'BASE')} {options}\n```"
        yield "vLLM decides by the architecture of the base which of its layers may have adapters."

    def not_vllm(self) -> Iterator[str]:
        if not self.generates:
            yield "it serves language models"
        if self.config.get("target_parameters"):
            yield "it adapts modules, not single parameters"
        if self.config.get("fan_in_fan_out"):
            yield "it does not read transposed layers"
        yield from vllm.problems(self.config, self.shapes, shapes=self.shapes)

    def verification(self) -> str:
        if not self.record:
            return "Another library wrote it: there is nothing to verify it by."
        text = (
            "`veneer inspect .` reads every byte of this folder and compares it with the hashes in"
            " its record"
        )
        record_hash = self.record["hashes"].get("record")
        return (
            f"{text}, whose own is {_code(record_hash)}." if record_hash is not None else f"{text}."
        )


def front_matter(metadata: Mapping[str, Any]) -> str:
    """Lines ``key: value`` of YAML, each value as JSON that YAML 1.1 reads alike: floats have a
    point, and characters that YAML forbids are escaped."""
    return "".join(f"{key}: {_flow(value)}\n" for key, value in metadata.items())


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return (
            "{"
            + ", ".join(f"{_flow(str(key))}: {_flow(item)}" for key, item in value.items())
            + "}"
        )
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, float):
        text = repr(value)
        return text if "." in text else text.replace("e", ".0e")
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(
        "[\x7f-\xa0\u2028\u2029\ufeff\ud800-\udfff\ufffe\uffff]",
        lambda m: f"\\u{ord(m[0]):04x}",
        text,
    )


def _licence(words: str) -> dict[str, str]:
    """The hub's fields of a licence: a word of its list, or "other" with a free name."""
    if not words:
        return {}
    if re.fullmatch(r"[a-z][a-z0-9.+-]*", words.lower()):
        return {"license": words.lower()}
    return {
        "license": "other",
        "license_name": re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-"),
    }


def _parse_provenance(record: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a provenance that a card reads. A provenance may hold anything: values of another
    type count as missing."""
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


def _table(head: str, values: Mapping[str, Any]) -> str:
    rows = [
        f"| {_code(name).replace('|', chr(92) + '|')} | {_cell(value)} |"
        for name, value in values.items()
    ]
    return "\n".join([f"| {head} | value |", "|---|---|", *rows]) if rows else ""


def _python(imports: list[str], *lines: str) -> str:
    return "\n".join(["```python", *imports, "", *lines, "```"])


def _abbreviate(words: list[str], limit: int) -> str:
    return ", ".join([*words[:limit], *(["…"] if len(words) > limit else [])])


def _hub_id(name: Any) -> str | None:
    """The name if it looks like a hub repository: "owner/name", and no such path exists here."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII):
        return None
    return None if name.endswith((*_DATA_FILES, ".gguf")) or Path(name).exists() else name


def _display_name(name: Any) -> str:
    """A hub id unchanged; for a path its last part, since the rest describes one machine."""
    return str(name) if _hub_id(name) else Path(str(name)).name or str(name)


def _paragraphs(text: str) -> str:
    """Markdown from users, without the line that separates the notes."""
    return escape_controls(text.replace("\r\n", "\n").replace(LINE, "").strip())


def _line(words: Any) -> str:
    """Text from users on one line, with the special characters of Markdown and HTML escaped."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", " ".join(escape_controls(str(words)).split()))


def _code(words: Any) -> str:
    """Text from users as inline code, on one line."""
    text = " ".join(escape_controls(str(words)).split())
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return _line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _quote(name: Any) -> str:
    return escape_controls(json.dumps(str(name), ensure_ascii=False))
