"""Translate PEFT's ``LoraConfig`` into the fields of Veneer's ``LoraConfig``.

    read_fields(config)      reads the fields of PEFT's config: an object, a mapping, or the path of
                             an ``adapter_config.json``
    lora_fields(fields)      returns the fields of ``veneer.LoraConfig`` with the same meaning, and
                             every problem

A field of PEFT that Veneer lacks is a problem if its value changes the result. Fields that describe
the file or the machine are ignored. ``task_type`` is read, because PEFT adds a head for some tasks.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from veneer.errors import AdapterError, ConfigError, sentence
from veneer.fileio.untrusted import read_json
from veneer.formats import peft

#: PEFT's field -> the field of ``veneer.LoraConfig`` with the same values
_RENAMED_FIELDS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "trainable_token_indices": "trainable_tokens",
    "alora_invocation_tokens": "invocation_tokens",
}
#: PEFT's values of ``bias`` -> Veneer's
BIASES = {"none": "none", "lora_only": "targets", "all": "all"}
#: the values of ``init_lora_weights`` that are the names of variants in Veneer
_INIT_VARIANTS = ("corda", "eva", "loftq", "lora_ga", "mica", "olora", "orthogonal", "pissa")
#: the modules that PEFT trains in full for a task, without a field that names them
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
#: the fields of PEFT's config that ``lora_fields`` translates
_TRANSLATED_FIELDS = {
    *_RENAMED_FIELDS, "alpha_pattern", "bias", "corda_config", "exclude_modules",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "modules_to_save", "peft_type",
    "qalora_group_size", "rank_pattern", "target_modules", "target_parameters", "task_type",
    "use_dora", "use_qalora", "use_rslora",
}  # fmt: skip
#: PEFT's fields that do not change the result, or that ``veneer.attach`` takes as arguments
_IRRELEVANT_FIELDS = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config",
    "fan_in_fan_out", "inference_mode", "loftq_config", "lora_ga_config", "megatron_config",
    "megatron_core", "peft_version", "revision", "runtime_config",
}  # fmt: skip
#: the number of inputs that QA-LoRA pools: PEFT's default, and the only value of Veneer's variant
_GROUP_SIZE = 16
#: the rank and alpha of a ``peft.LoraConfig()``
_DEFAULTS = {"r": 8, "lora_alpha": 8}
#: names of modules that a config of Veneer would not take literally, but as one of its patterns
_VENEER_PATTERN = re.compile(r"(peft-)?all-linear|attention|mlp|all|.*[*?\[\]].*|re:.*")


def read_fields(config: Any) -> dict[str, Any]:
    """The fields of a PEFT config, by name. ``config``: PEFT's object, a mapping of its fields, or
    the path of an ``adapter_config.json`` or of its folder. ``ConfigError``: it is none of these,
    or cannot be read."""
    if isinstance(config, Mapping):
        return dict(config)
    if isinstance(config, str | Path):
        path = Path(config)
        try:
            return read_json(path / peft.CONFIG if path.is_dir() else path)
        except (AdapterError, OSError) as error:
            raise ConfigError(
                f"{path} ({error})", f"PEFT's {peft.CONFIG}", "check the path"
            ) from error
    if dataclasses.is_dataclass(config) and hasattr(config, "peft_type"):
        return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)} | {
            "peft_type": getattr(config, "peft_type")  # noqa: B009 (not every dataclass has it)
        }
    raise ConfigError(
        f"a {type(config).__name__} for a config of PEFT",
        f"PEFT's LoraConfig, its fields as a mapping, or the path of an {peft.CONFIG}",
        "pass one",
    )


def lora_fields(fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(fields of ``veneer.LoraConfig``, one error text for each of PEFT's fields that they cannot
    express). ``fields``: the fields of PEFT's config."""
    peft_type = getattr(fields.get("peft_type"), "value", fields.get("peft_type"))
    if peft_type not in (None, "LORA"):
        advice = "docs/from-peft.md names what Veneer has for PEFT's other tuners"
        return {}, [sentence(f"peft_type={peft_type!r}", "'LORA'", advice)]
    values = {**_DEFAULTS, **{name: value for name, value in fields.items() if value is not None}}
    task_type = getattr(values.get("task_type"), "value", values.get("task_type"))
    problems = _unknown_field_problems(values)
    full_patterns = _full_module_patterns(values.get("modules_to_save") or (), task_type)
    veneer_fields = {
        **{name: values[key] for key, name in _RENAMED_FIELDS.items() if key in values},
        "targets": _target_patterns(values, problems),
        "train_also": full_patterns,
        # also exclude the modules that are trained in full, because PEFT adapts nothing in them
        "exclude": (*_weight_patterns(values.get("exclude_modules") or ()), *full_patterns),
        "ranks": _by_layer_pattern(values.get("rank_pattern") or {}),
        "alphas": _by_layer_pattern(values.get("alpha_pattern") or {}),
        "bias": BIASES.get(values.get("bias", "none"), values.get("bias")),
        "variant": _variant_name(values, problems),
    }
    return veneer_fields, problems


def _unknown_field_problems(values: Mapping[str, Any]) -> list[str]:
    """An error text for each field that has a value and no equivalent in ``veneer.LoraConfig``."""
    advice = 'leave it out; docs/from-peft.md has what to do instead ("The fields of `LoraConfig`")'
    return [
        sentence(f"{name}={value!r}", "a field that veneer.LoraConfig can express", advice)
        for name, value in values.items()
        if value and name not in _TRANSLATED_FIELDS | _IRRELEVANT_FIELDS
    ]


def _target_patterns(values: Mapping[str, Any], problems: list[str]) -> Any:
    """Veneer's ``targets`` that match what PEFT's ``target_modules`` and ``target_parameters``
    match. An error text is added to ``problems`` if there is no equivalent."""
    modules, parameters = values.get("target_modules"), values.get("target_parameters") or ()
    if modules is None and not parameters:
        advice = 'name the modules, or set target_modules="all-linear"'
        problems.append(sentence("no target_modules", "the layers to adapt", advice))
    patterns = _module_patterns(() if modules is None else modules)
    if isinstance(modules, str) and modules.lower() == "all-linear":
        patterns = "peft-all-linear"
    if (block_expression := _block_expression(values, problems)) is not None:
        escaped_names = [re.escape(name) for name in _as_list(modules or ())]
        patterns = tuple(rf"re:{name}|(?={block_expression}).*\.{name}" for name in escaped_names)
    if isinstance(patterns, str) and not parameters:
        return patterns
    return (*((patterns,) if isinstance(patterns, str) else patterns), *parameters)


def _block_expression(values: Mapping[str, Any], problems: list[str]) -> str | None:
    """A regular expression that matches the beginning of a module's path if the module lies in one
    of the blocks ``layers_to_transform``. None if the config does not restrict the blocks, or if
    Veneer cannot express the restriction, for which an error text is added to ``problems``.

    As in PEFT, the index of a block is the first number that stands behind at least two names in
    the path; with ``layers_pattern``, the first number behind the first of the pattern's names that
    the path has. A module that the config names by its full path is adapted in any block.
    """
    block_indices, container_names = (
        values.get("layers_to_transform"),
        values.get("layers_pattern") or (),
    )
    indices = [block_indices] if isinstance(block_indices, int) else [*(block_indices or ())]
    container_names = [container_names] if isinstance(container_names, str) else [*container_names]
    advice = None
    if not indices:
        if container_names and block_indices is None:
            advice = "leave it out, or set layers_to_transform"
    elif isinstance(values.get("target_modules"), str):
        advice = "name the modules in target_modules as a list"
    elif any(type(index) is not int or index < 0 for index in indices):
        advice = "count the blocks from 0: PEFT matches none with these"
    elif not all(re.fullmatch(r"[\w.]+", name) for name in container_names):
        advice = "name the modules that hold the blocks"
    if advice is not None:
        problem = " with ".join(
            f"{name}={values[name]!r}"
            for name in ("layers_to_transform", "layers_pattern", "target_modules")
            if values.get(name) is not None
        )
        expected = "indices of blocks, for modules that are named"
        problems.append(sentence(problem, expected, advice))
        return None
    if not indices:
        return None
    index_pattern = rf"0*(?:{'|'.join(map(str, sorted({*indices})))})\."
    if not container_names:
        return rf"(?>.*?\.[^.]*\.(?=\d+\.)){index_pattern}"
    container_patterns = [rf"(?:^|.*?\.){name}\.(?=\d+\.)" for name in container_names]
    return "|".join(
        "".join(f"(?!{earlier_pattern})" for earlier_pattern in container_patterns[:position])
        + f"(?>{container_pattern}){index_pattern}"
        for position, container_pattern in enumerate(container_patterns)
    )


def _module_patterns(modules: str | Iterable[str]) -> Any:
    """Veneer's patterns for PEFT's list of module names, or Veneer's pattern for PEFT's regular
    expression of full paths (if ``modules`` is a text)."""
    if isinstance(modules, str):
        return f"re:{modules}"
    return tuple(
        rf"re:(.*\.)?{re.escape(name)}" if _VENEER_PATTERN.fullmatch(name) else name
        for name in _as_list(modules)
    )


#: matches the end of a weight's path, behind the path of its module: ".weight", ".weight_ih_l0"
_WEIGHT = r"\.[^.]*weight[^.]*"
#: matches "$" and "\Z" in an expression. It also matches, as its group, other escapes and sets of
#: characters, so that a "$" within these is not found
_TEXT_END = re.compile(r"(\\[^Z]|\[\^?\]?[^\]]*\])|\$|\\Z")


def _weight_patterns(modules: str | Iterable[str]) -> tuple[str, ...]:
    """Patterns of the weights of the modules in ``exclude_modules``. PEFT still adapts submodules
    of an excluded module and trains its bias; a pattern of the module itself would exclude both."""
    if isinstance(modules, str):  # "$" meant the end of the module's path, which the weight follows
        path_expressions = [_TEXT_END.sub(lambda match: match[1] or rf"(?={_WEIGHT}$)", modules)]
    else:
        path_expressions = [rf"(.*\.)?{re.escape(name)}" for name in _as_list(modules)]
    return tuple(f"re:(?:{path_expression}){_WEIGHT}" for path_expression in path_expressions)


def _as_list(names: Iterable[str]) -> list[str]:
    return [*names] if isinstance(names, list | tuple) else sorted(names)


def _by_layer_pattern(values: Mapping[str, Any]) -> dict[str, Any]:
    """``rank_pattern`` or ``alpha_pattern`` with Veneer's patterns as keys. PEFT takes a key as a
    regular expression that must match a path from its beginning, or from any dot, to its end."""
    return {
        key if re.fullmatch(r"[\w.]+", key) else rf"re:(.*\.)?({key})": value
        for key, value in values.items()
    }


def _full_module_patterns(names: Iterable[str], task_type: str | None) -> tuple[str, ...]:
    """Patterns of the modules that are trained in full. PEFT trains each module whose path ends
    with one of the ``names``, even within a word, and adds every name that the head of a task may
    have. Each pattern of Veneer must match a module, so the heads' names become one expression."""
    head_names = _TASK_HEADS.get(task_type or "", ())
    endings = [re.escape(name) for name in names if name not in head_names]
    endings += [f"({'|'.join(head_names)})"] if head_names else []
    return tuple(f"re:.*{ending}" for ending in endings)


def _variant_name(values: Mapping[str, Any], problems: list[str]) -> str:
    """The name of Veneer's variant for PEFT's ``init_lora_weights`` and flags (``use_dora``,
    ``use_rslora``, ``use_qalora``). An error text is added to ``problems`` for each setting or
    combination that no variant has."""
    # dora comes before rslora, because the variant with both is named "dora_rslora"
    flag_names = [name for name in ("dora", "rslora", "qalora") if values.get(f"use_{name}")]
    init_method = values.get("init_lora_weights", True)
    variant = ""
    if isinstance(init_method, str):
        variant = init_method.partition("_niter")[0].lower()
    if init_method is not True and variant not in _INIT_VARIANTS:
        problems.append(
            sentence(
                f"init_lora_weights={init_method!r}",
                f"True, or one of {', '.join(_INIT_VARIANTS)}",
                'leave it at True: A starts Kaiming-uniform and B at zero (variant="lora")',
            )
        )
    elif (flag_names and variant) or (len(flag_names) > 1 and "qalora" in flag_names):
        problem = " with ".join(
            [f"use_{flag}=True" for flag in flag_names] + [f"init_lora_weights={init_method!r}"]
        )
        problems.append(sentence(problem, "a variant that has all of it", "choose one of them"))
    if "qalora" in flag_names and values.get("qalora_group_size", _GROUP_SIZE) != _GROUP_SIZE:
        problem = f"qalora_group_size={values['qalora_group_size']!r}"
        problems.append(sentence(problem, str(_GROUP_SIZE), "use that size"))
    if variant == "corda" and _corda_method(values.get("corda_config")) == "kpm":
        variant = "corda_kpm"
    return variant or "_".join(flag_names) or "lora"


def _corda_method(config: Any) -> str | None:
    return (
        config.get("corda_method")
        if isinstance(config, Mapping)
        else getattr(config, "corda_method", None)
    )
