"""The model card: the README.md of an adapter folder, for people and for the Hugging Face hub.

    ---
    front matter: one JSON value a line, which is YAML too, so that no YAML library is needed to
        write it
    ---
    what it is, its base, data, training, metrics, licence, how to load and how to verify it
    <!-- … -->
    notes of people

It is made of what is known: PEFT's config and Veneer's record. What is not known is left out or
said to be "not stated". Nothing reads it back, so people may edit it. Saving again writes anew what
stands above the last line of the template and keeps what stands below; a card without that line
belongs to somebody else and is kept whole.

The keys of ``provenance`` that it reads, all of them optional:

    title, description  str           the heading; a paragraph of Markdown below it
    license             str           as the hub spells it ("apache-2.0"), or any other words
    language            str | [str]   two-letter codes
    datasets            [str]         hub ids, besides the one of ``config``
    config              {name: value} how it was trained; ``data`` and ``eval_data`` in it name the data
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
# of a run's config: what is named elsewhere in the card, and what only the machine that trained
# cares about
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
}


def card(
    peft_config: Mapping[str, Any],
    record: Mapping[str, Any] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> str:
    """The text of an adapter's README.md. ``peft_config``: the fields of ``adapter_config.json``.
    ``record``: Veneer's record (``AdapterFiles.record``), or None for an adapter of another
    library. ``shapes``: of the tensors in its file, by name, which say more of who can load it."""
    return _Card(peft_config, record or {}, shapes or {}).text()


def renewed(new: str, old: str | None) -> str:
    """The card ``new`` with the notes below the line of the card ``old``; ``old`` itself if it has
    no such line."""
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
        self.config, self.record, self.shapes, self.told = config, record, shapes, _told(record)
        self.base = record.get("base", {})
        named = config.get("base_model_name_or_path")
        self.base_name = self.base.get("name") or named
        self.variant = record.get("config", {}).get("variant", "lora")
        self.title = self.told["title"] or (
            "LoRA adapter" + (f" for {_shown(named)}" if named else "")
        )
        self.data, self.eval_data = (
            self.told["config"].get("data"),
            self.told["config"].get("eval_data"),
        )
        # the class of a base that reads images, sounds or another sequence, as transformers names
        # it
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
            "Metrics": _table("metric", self.told["metrics"]),
            "Licence": (
                f"{_line(self.told['license'] or 'Not stated')}. The base model has a licence of"
                " its own."
            ),
            "Use": "\n\n".join(self.use()),
            "Verify": self.verification(),
        }
        body = [f"# {_line(self.title)}", self.what(), _paragraphs(self.told["description"])]
        body += [f"## {name}\n\n{text}" for name, text in sections.items() if text]
        return (
            f"---\n{front_matter(self.metadata())}---\n\n"
            + "\n\n".join(filter(None, body))
            + f"\n\n{LINE}\n"
        )

    def metadata(self) -> dict[str, Any]:
        base = _hub_id(self.base_name)
        datasets = map(_hub_id, (*self.told["datasets"], self.data, self.eval_data))
        metadata = {
            "library_name": "veneer" if self.not_peft else "peft",
            "base_model": base,
            "base_model_relation": "adapter" if base else None,
            "pipeline_tag": "text-generation" if self.generates else None,
            "tags": list(
                dict.fromkeys(["lora", *(["veneer"] if self.record else []), self.variant])
            ),
            "language": self.told["language"],
            "datasets": list(dict.fromkeys(filter(None, datasets))),
            **_licence(self.told["license"]),
            "model-index": self.model_index(),
        }
        return {key: value for key, value in metadata.items() if value}

    def model_index(self) -> list[dict[str, Any]]:
        data = self.eval_data or self.data
        measured = [
            {"type": name.removeprefix("eval_"), "name": name, "value": value}
            for name, value in self.told["metrics"].items()
            if name.startswith("eval_") and type(value) in (int, float) and math.isfinite(value)
        ]
        if not measured or not data or not self.generates:
            return []
        dataset = {"name": _shown(data), "type": _hub_id(data) or "private"}
        results = [{"task": {"type": "text-generation"}, "dataset": dataset, "metrics": measured}]
        return [{"name": self.title, "results": results}]

    def what(self) -> str:
        paths = self.record.get("changes", {})
        kinds = Counter(".".join(path.split(".")[-2:]).removesuffix(".weight") for path in paths)
        ranks = sorted({self.config["r"], *(self.config.get("rank_pattern") or {}).values()})
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        text = (
            f"A low-rank adapter: variant {_code(self.variant)}, {rank}, alpha"
            f" {self.config['lora_alpha']:g}. It holds the change of some weights of its base, and"
            " is of no use without it."
        )
        if kinds:
            listed = [f"{_code(kind)} × {count}" for kind, count in kinds.items()]
            text += f" It changes {len(paths)} weights: {_some(listed, 24)}."
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
            others = "tensors that the adapter does not change: norms, embeddings, heads"
            text += f" It also compares {len(base['rest'])} {others}."
        if base.get("fresh"):
            lost = _some([_code(name) for name in base["fresh"]], 8)
            text += (
                "\n\nParameters that were random as it was trained, and that no file holds:"
                f" {lost}."
            )
        return text

    def of_data(self) -> str:
        named = {"trained on": self.data, "evaluated on": self.eval_data}
        lines = [f"- {what} {_code(_shown(data))}" for what, data in named.items() if data]
        lines += [f"- {_code(name)}" for name in self.told["datasets"]]
        lines += [
            f"- hash of {_line(name)}: {_code(value)}"
            for name, value in self.told["data"].items()
            if value
        ]
        return "\n".join(lines) or "Not stated."

    def settings(self) -> dict[str, Any]:
        trained = self.told["config"] or self.record.get("config") or {}
        known = {name: value for name, value in trained.items() if value not in (None, [], "")}
        settings = {name: value for name, value in known.items() if name not in _ELSEWHERE}
        settings = settings or {"rank": self.config["r"], "alpha": self.config["lora_alpha"]}
        return {
            **settings,
            **({"finished": self.told["finished"]} if self.told["finished"] else {}),
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
            f"model = {f'{loader}.from_pretrained({_quoted(plain)})' if plain else UNKNOWN}"
        )
        ours, by_ours = from_transformers, by_transformers
        if name and not self.family:
            ours, by_ours = (
                f"model = load_base({_quoted(name)}).model",
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
        own = self.record["hashes"].get("record")
        return f"{text}, whose own is {_code(own)}." if own is not None else f"{text}."


def front_matter(metadata: Mapping[str, Any]) -> str:
    """Lines ``key: value`` of YAML, each value in JSON's form. What YAML 1.1 reads otherwise than
    JSON is written so that both agree: floats have a point, and what YAML does not print is
    escaped."""
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
    """The hub takes a licence from its list, or "other" with a name of the user's."""
    if not words:
        return {}
    if re.fullmatch(r"[a-z][a-z0-9.+-]*", words.lower()):
        return {"license": words.lower()}
    return {
        "license": "other",
        "license_name": re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-"),
    }


def _told(record: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a provenance that a card reads. It may hold anything: what has another form
    counts as not told."""
    given = record.get("provenance", {})
    told: dict[str, Any] = {}
    for key in ("title", "description", "license", "finished"):
        told[key] = given[key] if isinstance(given.get(key), str) else ""
    for key in ("config", "data", "metrics"):
        told[key] = given[key] if isinstance(given.get(key), Mapping) else {}
    for key in ("language", "datasets"):
        words = [given[key]] if isinstance(given.get(key), str) else given.get(key)
        told[key] = (
            [word for word in words if isinstance(word, str)] if isinstance(words, list) else []
        )
    return told


def _table(head: str, values: Mapping[str, Any]) -> str:
    rows = [
        f"| {_code(name).replace('|', chr(92) + '|')} | {_cell(value)} |"
        for name, value in values.items()
    ]
    return "\n".join([f"| {head} | value |", "|---|---|", *rows]) if rows else ""


def _python(imports: list[str], *lines: str) -> str:
    return "\n".join(["```python", *imports, "", *lines, "```"])


def _some(words: list[str], most: int) -> str:
    return ", ".join([*words[:most], *(["…"] if len(words) > most else [])])


def _hub_id(name: Any) -> str | None:
    """The name if it is that of a hub repository, as far as can be told: "owner/name", and no such
    path here."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII):
        return None
    return None if name.endswith((*_DATA_FILES, ".gguf")) or Path(name).exists() else name


def _shown(name: Any) -> str:
    """A hub id as it is; of a path, the last part, as the others are of one machine."""
    return str(name) if _hub_id(name) else Path(str(name)).name or str(name)


def _paragraphs(text: str) -> str:
    """Markdown of others, without the line that the notes stand below."""
    return escape_controls(text.replace("\r\n", "\n").replace(LINE, "").strip())


def _line(words: Any) -> str:
    """Words of others on one line, with what Markdown and HTML would take for marks escaped."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", " ".join(escape_controls(str(words)).split()))


def _code(words: Any) -> str:
    """Words of others as code, on one line."""
    text = " ".join(escape_controls(str(words)).split())
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return _line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _quoted(name: Any) -> str:
    return escape_controls(json.dumps(str(name), ensure_ascii=False))
