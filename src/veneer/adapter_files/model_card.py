"""The model card: the README.md of an adapter folder, for people and for the Hugging Face hub.

    ---
    front matter: one JSON value a line, which is YAML too, so that no YAML library is needed to write it
    ---
    what it is, its base, data, training, metrics, licence, how to load and how to verify it
    <!-- … -->
    notes of people

It is made of what is known: PEFT's config and Veneer's record. What is not known is left out or said to be "not
stated"; nothing is guessed. Nothing reads it back, so people may edit it. Saving again writes anew what stands above
the last line of the template and keeps what stands below; a card without that line belongs to somebody else and is kept
whole. (Telling an edited card from a generated one by its hash would call every card of an older Veneer edited.)

The keys of ``provenance`` that it reads, all of them optional:

    title, description  str           the heading; a paragraph of Markdown below it
    license             str           as the hub spells it ("apache-2.0"), or any other words
    language            str | [str]   two-letter codes
    datasets            [str]         hub ids, besides the one of ``config``
    config              {name: value} how it was trained; ``data`` and ``eval_data`` in it name the data
    data                {name: hash}  hashes of the data
    metrics             {name: value} those that begin with "eval_" go into the front matter too
    finished            str           when

``veneer train`` gives the last four.

Format: https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.fileio.hashing import hash_json
from veneer.formats import peft, vllm

NAME = "README.md"
LINE = "<!-- Saving the adapter again keeps what stands below this line, and writes anew what stands above. -->"
UNKNOWN = "...  # the base"
_DATA_FILES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
# of a run's config: what is named elsewhere in the card, and what only the machine that trained cares about
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
    """The text of an adapter's README.md.

    Args:
        peft_config: the fields of ``adapter_config.json``.
        record: Veneer's record (``AdapterFiles.record``), or None for an adapter of another library.
        shapes: of the tensors in its file, by name, which say more of who can load it.
    """
    record = record or {}
    provenance = _told(record)
    sections = {
        "Base": _base(peft_config, record),
        "Data": _data(provenance),
        "Training": _table("setting", _settings(peft_config, record)),
        "Metrics": _table("metric", provenance["metrics"]),
        "Licence": f"{_line(provenance['license'] or 'Not stated')}. The base model has a licence of its own.",
        "Use": "\n\n".join(_use(peft_config, record, shapes or {})),
        "Verify": _verify(record),
    }
    body = [f"# {_line(_title(peft_config, provenance))}", _what(peft_config, record), _description(provenance)]
    body += [f"## {name}\n\n{text}" for name, text in sections.items() if text]
    return (
        f"---\n{front_matter(_metadata(peft_config, record))}---\n\n"
        + "\n\n".join(filter(None, body))
        + f"\n\n{LINE}\n"
    )


def renewed(new: str, old: str | None) -> str:
    """The card ``new`` with the notes below the line of the card ``old``; ``old`` itself if it has no such line."""
    if old is None:
        return new
    _, line, notes = old.partition(LINE)
    return new.rstrip("\n") + notes if line else old


# ---------------------------------------------------------------------------------------------- front matter


def front_matter(metadata: Mapping[str, Any]) -> str:
    """Lines ``key: value`` of YAML, each value in JSON's form. What YAML 1.1 reads otherwise than JSON is written so
    that both agree: floats have a point, and what YAML does not print is escaped."""
    return "".join(f"{key}: {_flow(value)}\n" for key, value in metadata.items())


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_flow(str(key))}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, float):
        text = repr(value)
        return text if "." in text else text.replace("e", ".0e")
    text = json.dumps(value, ensure_ascii=False)
    return re.sub("[\x7f-\xa0\u2028\u2029\ufeff\ud800-\udfff\ufffe\uffff]", lambda m: f"\\u{ord(m[0]):04x}", text)


def _metadata(peft_config: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    provenance, base = _told(record), _hub_id(_base_name(peft_config, record))
    variant = record.get("config", {}).get("variant", "lora")
    metadata = {
        "library_name": "peft" if _for_peft(peft_config) else "veneer",
        "base_model": base,
        "base_model_relation": "adapter" if base else None,
        "pipeline_tag": "text-generation" if _generates(peft_config, record) else None,
        "tags": list(dict.fromkeys(["lora", *(["veneer"] if record else []), variant])),
        "language": provenance["language"],
        "datasets": list(_datasets(provenance)),
        **_licence(provenance["license"]),
        "model-index": _model_index(peft_config, record, provenance),
    }
    return {key: value for key, value in metadata.items() if value}


def _licence(words: str) -> dict[str, str]:
    """The hub takes a licence from its list, or "other" with a name of the user's."""
    if not words:
        return {}
    if re.fullmatch(r"[a-z][a-z0-9.+-]*", words.lower()):
        return {"license": words.lower()}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-")}


def _datasets(provenance: Mapping[str, Any]) -> Iterator[str]:
    config = provenance["config"]
    names = [*provenance["datasets"], config.get("data"), config.get("eval_data")]
    yield from dict.fromkeys(filter(None, map(_hub_id, names)))


def _model_index(
    peft_config: Mapping[str, Any], record: Mapping[str, Any], provenance: Mapping[str, Any]
) -> list[dict[str, Any]]:
    metrics, config = provenance["metrics"], provenance["config"]
    data = config.get("eval_data") or config.get("data")
    values = {name: value for name, value in metrics.items() if name.startswith("eval_") and _finite(value)}
    if not values or not data or not _generates(peft_config, record):
        return []
    dataset = {"name": _shown(data), "type": _hub_id(data) or "private"}
    measured = [{"type": name.removeprefix("eval_"), "name": name, "value": value} for name, value in values.items()]
    results = [{"task": {"type": "text-generation"}, "dataset": dataset, "metrics": measured}]
    return [{"name": _title(peft_config, provenance), "results": results}]


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


# ---------------------------------------------------------------------------------------------- sections


def _title(peft_config: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    base = peft_config.get("base_model_name_or_path")
    return provenance["title"] or ("LoRA adapter" + (f" for {_shown(base)}" if base else ""))


def _description(provenance: Mapping[str, Any]) -> str:
    return provenance["description"].replace(LINE, "").strip()


def _what(peft_config: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    variant = record.get("config", {}).get("variant", "lora")
    paths = list(record.get("changes", {}))
    kinds: dict[str, int] = {}
    for path in paths:
        kind = ".".join(path.split(".")[-2:]).removesuffix(".weight")
        kinds[kind] = kinds.get(kind, 0) + 1
    ranks = sorted({peft_config["r"], *(peft_config.get("rank_pattern") or {}).values()})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    text = (
        f"A low-rank adapter: variant {_code(variant)}, {rank}, alpha {peft_config['lora_alpha']:g}. "
        "It holds the change of some weights of its base, and is of no use without it."
    )
    if kinds:
        listed = ", ".join(f"{_code(kind)} × {count}" for kind, count in list(kinds.items())[:24])
        text += f" It changes {len(paths)} weights: {listed}{', …' if len(kinds) > 24 else ''}."
    return text


def _base(peft_config: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    base = record.get("base", {})
    name = _base_name(peft_config, record)
    text = f"{_code(name) if name else 'Not stated'}"
    if base.get("architecture"):
        text += f", a {_code(base['architecture'])}"
    if base.get("weights"):
        text += (
            f".\n\nFingerprint of the {len(base['weights'])} base weights that it changes: "
            f"{_code(hash_json(base['weights'])[:32])}. Veneer refuses another base."
        )
    if base.get("rest"):
        text += (
            f" It also compares {len(base['rest'])} tensors that the adapter does not change: norms, embeddings, heads."
        )
    if base.get("fresh"):
        text += (
            f"\n\nParameters that were random as it was trained, and that no file holds: "
            f"{', '.join(map(_code, base['fresh'][:8]))}{', …' if len(base['fresh']) > 8 else ''}."
        )
    return text if text.endswith(".") else f"{text}."


def _data(provenance: Mapping[str, Any]) -> str:
    config = provenance["config"]
    named = {"trained on": config.get("data"), "evaluated on": config.get("eval_data")}
    lines = [f"- {what} {_code(_shown(data))}" for what, data in named.items() if data]
    lines += [f"- {_code(name)}" for name in provenance["datasets"]]
    lines += [f"- hash of {_line(name)}: {_code(value)}" for name, value in provenance["data"].items() if value]
    return "\n".join(lines) or "Not stated."


def _settings(peft_config: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    provenance = _told(record)
    trained = provenance["config"] or record.get("config") or {}
    settings = {
        name: value for name, value in trained.items() if name not in _ELSEWHERE and value not in (None, [], "")
    }
    if not settings:
        settings = {"rank": peft_config["r"], "alpha": peft_config["lora_alpha"]}
    return {**settings, **({"finished": provenance["finished"]} if provenance["finished"] else {})}


def _table(head: str, values: Mapping[str, Any]) -> str:
    """A Markdown table of names and values."""
    if not values:
        return ""
    rows = [f"| {_code(name).replace('|', chr(92) + '|')} | {_cell(value)} |" for name, value in values.items()]
    return "\n".join([f"| {head} | value |", "|---|---|", *rows])


def _use(
    peft_config: Mapping[str, Any], record: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> Iterator[str]:
    name, family = _base_name(peft_config, record), _conditional(record)
    name = name if family or _generates(peft_config, record) else None
    plain = name if name and not name.startswith("package:") and not name.endswith(".gguf") else None
    loader = family or "AutoModelForCausalLM"
    by_transformers = [f"from transformers import {loader}"] if plain else []
    from_transformers = f"model = {f'{loader}.from_pretrained({_quoted(plain)})' if plain else UNKNOWN}"
    if family or not name:
        yield _python(["import veneer", *by_transformers], from_transformers, 'veneer.load(model, ".")  # this folder')
    else:
        yield _python(
            ["import veneer", "from veneer.models import load_base"],
            f"model = load_base({_quoted(name)}).model",
            'veneer.load(model, ".")  # this folder',
        )
    reason = _not_peft(peft_config)
    if reason:
        yield f"PEFT and vLLM cannot load it: {_line(reason)}."
        return
    yield _python(
        ["from peft import PeftModel", *by_transformers],
        from_transformers,
        'model = PeftModel.from_pretrained(model, ".")',
    )
    reasons = list(_not_vllm(peft_config, record, shapes))
    if reasons:
        yield f"vLLM cannot serve it: {'; '.join(reasons)}."
        return
    rank = next(rank for rank in vllm.RANKS if rank >= vllm.largest_rank(peft_config))
    options = f"--enable-lora --max-lora-rank {rank} --lora-modules adapter=."
    yield f"```console\nvllm serve {shlex.quote(plain or 'BASE')} {options}\n```"
    yield "vLLM decides by the architecture of the base which of its layers may have adapters."


def _python(imports: list[str], *lines: str) -> str:
    return "\n".join(["```python", *imports, "", *lines, "```"])


def _verify(record: Mapping[str, Any]) -> str:
    if not record:
        return "Another library wrote it: there is nothing to verify it by."
    text = "`veneer inspect .` reads every byte of this folder and compares it with the hashes in its record"
    return f"{text}, whose own is {_code(record['hashes']['record'])}." if "record" in record["hashes"] else f"{text}."


# ---------------------------------------------------------------------------------------------- who can load it


def _for_peft(peft_config: Mapping[str, Any]) -> bool:
    return _not_peft(peft_config) == ""


def _not_peft(peft_config: Mapping[str, Any]) -> str:
    """Why PEFT refuses it, or an empty text."""
    kind = str(peft_config.get("peft_type"))
    return "" if kind == "LORA" else kind.removeprefix(peft.NOT_FOR_PEFT).lstrip(": ")


def _not_vllm(
    peft_config: Mapping[str, Any], record: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> Iterator[str]:
    """What vLLM's loader refuses, or would get wrong."""
    if not _generates(peft_config, record):
        yield "it serves language models"
    if peft_config.get("target_parameters"):
        yield "it adapts modules, not single parameters"
    if peft_config.get("fan_in_fan_out"):
        yield "it does not read transposed layers"
    yield from vllm.problems(peft_config, shapes, shapes=shapes)


def _generates(peft_config: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """Whether the base is a language model: one that reads text alone."""
    return peft_config.get("task_type") == "CAUSAL_LM" and _conditional(record) is None


def _conditional(record: Mapping[str, Any]) -> str | None:
    """The class of a base that reads images, sounds or another sequence, as transformers names it; else None."""
    name = str(record.get("base", {}).get("architecture"))
    return name if name.isidentifier() and name.endswith("ForConditionalGeneration") else None


# ---------------------------------------------------------------------------------------------- words


def _told(record: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the provenance that a card reads. A provenance may hold anything, so what has another form than the
    one above counts as not told."""
    given = record.get("provenance", {})
    told: dict[str, Any] = {}
    for key in ("title", "description", "license", "finished"):
        told[key] = given[key] if isinstance(given.get(key), str) else ""
    for key in ("config", "data", "metrics"):
        told[key] = given[key] if isinstance(given.get(key), Mapping) else {}
    for key in ("language", "datasets"):
        words = [given[key]] if isinstance(given.get(key), str) else given.get(key)
        told[key] = [word for word in words if isinstance(word, str)] if isinstance(words, list) else []
    return told


def _base_name(peft_config: Mapping[str, Any], record: Mapping[str, Any]) -> str | None:
    return record.get("base", {}).get("name") or peft_config.get("base_model_name_or_path")


def _hub_id(name: Any) -> str | None:
    """The name if it is that of a hub repository, as far as can be told: "owner/name", and no such path here."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII):
        return None
    return None if name.endswith((*_DATA_FILES, ".gguf")) or Path(name).exists() else name


def _shown(name: Any) -> str:
    """A hub id as it is; of a path, the last part, as the others are of one machine."""
    return str(name) if _hub_id(name) else Path(str(name)).name or str(name)


def _line(words: Any) -> str:
    """Words of others on one line, with what Markdown and HTML would take for marks escaped."""
    text = " ".join(str(words).split())
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", text)


def _code(words: Any) -> str:
    """Words of others as code, on one line."""
    text = " ".join(str(words).split())
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _cell(value: Any) -> str:
    """A value in a table."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return _line(text)


def _quoted(name: Any) -> str:
    return json.dumps(str(name), ensure_ascii=False)
