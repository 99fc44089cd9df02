"""Checks of the fields of ``adapter_config.json``: their types and ranges, and fields that would
change the result in a way that Veneer does not support."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from veneer.errors import AdapterError, raise_all, sentence
from veneer.formats import patterns
from veneer.formats.peft import CONFIG, MAX_RANK, not_for_peft
from veneer.formats.peft_paths import layers_patterns


def _is(*types: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in types


def _every(container: type, test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether all values of a list, or of a dict, pass a test."""
    return lambda value: (
        isinstance(value, container)
        and all(map(test, value.values() if container is dict else value))
    )


def _rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _token_ids(value: Any) -> bool:
    lists = value.values() if isinstance(value, dict) else [value]
    return all(
        isinstance(ids, list) and all(type(id_) is int and id_ >= 0 for id_ in ids) for ids in lists
    )


_number, _texts = _is(int, float), _every(list, _is(str))
_SIZE = f"a whole number from 1 to {MAX_RANK:,}"
# The fields that Veneer supports or that do not change the result, and their valid values besides
# null: (test, description, fields).
_FIELDS: tuple[tuple[Callable[[Any], bool], str, str], ...] = (
    (
        _is(str),
        "text",
        "base_model_name_or_path megatron_core peft_type peft_version revision task_type",
    ),
    (_is(bool), "true or false", "ensure_weight_tying fan_in_fan_out inference_mode lora_bias"),
    (_is(bool), "true or false", "use_dora use_qalora use_rslora"),
    (
        _is(dict),
        "an object",
        "auto_mapping corda_config eva_config loftq_config lora_ga_config megatron_config",
    ),
    (_is(dict), "an object", "runtime_config"),
    (_is(bool, str), "true, false or a name", "init_lora_weights"),
    (_is(int), "a whole number", "qalora_group_size"),
    (_number, "a number", "lora_alpha"),
    (lambda value: _number(value) and 0 <= value <= 1, "a number from 0 to 1", "lora_dropout"),
    (_rank, _SIZE, "r"),
    (_every(dict, _rank), f"{_SIZE} for each pattern", "rank_pattern"),
    (_every(dict, _number), "a number for each pattern", "alpha_pattern"),
    (_texts, "a list of texts", "modules_to_save target_parameters"),
    (
        lambda value: isinstance(value, str) or _texts(value),
        "text, or a list of texts",
        "exclude_modules layers_pattern target_modules",
    ),
    (_token_ids, "a list of token ids, or one for each path", "trainable_token_indices"),
    (
        lambda value: isinstance(value, list) and _token_ids(value),
        "a list of token ids",
        "alora_invocation_tokens",
    ),
    (lambda value: value in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'", "bias"),
    (
        lambda value: _every(list, _is(int))(value if isinstance(value, list) else [value]),
        "a whole number, or a list of these",
        "layers_to_transform",
    ),
)
_FIELD_TESTS = {field: (test, words) for test, words, fields in _FIELDS for field in fields.split()}
#: the advice for a refused field, if it is not "use PEFT"
_ADVICE = {
    "layer_replication": (
        'take it out, and load on a base that has these layers (docs/from-peft.md, "Repeated'
        ' layers")'
    ),
}
#: starts that move part of the base's weight into the adapter, so that the file holds a change of
#: the base without that part; PEFT recomputes them when it loads the folder
STARTS = ("pissa", "olora")
# starts that cannot be recomputed: (prefix of the name, reason)
_LOST_STARTS = (
    ("pissa", "which took a random approximation off the base's weights as it started"),
    ("corda", "which took what it found in data off the base's weights as it started"),
    ("loftq", "which quantised the base's weights as it started"),
    ("lora_ga", "which took what it found in gradients off the base's weights as it started"),
)


def starts_from_base(config: Mapping[str, Any]) -> bool:
    """Whether the file holds changes of a base that PEFT itself changes when it loads the folder
    (``STARTS``)."""
    start = config.get("init_lora_weights")
    return isinstance(start, str) and (start == "pissa" or start.lower() == "olora")


def check_config(
    config: Mapping[str, Any], by_veneer: bool = False, with_base: bool = False
) -> None:
    """Raise AdapterError for fields that would change the result in a way that Veneer does not
    support.

    Args:
        by_veneer: Veneer wrote the config.
        with_base: the base's weights are available.
    """
    peft_type = config.get("peft_type")
    # the fields of another tuner have other meanings
    if peft_type != "LORA" and not_for_peft(config) is None:
        problem = f"peft_type {peft_type!r} in {CONFIG}"
        do = (
            "save it as LoRA with PEFT (save_as_lora), or merge it there and run `veneer extract`"
            " on the merged model"
        )
        raise AdapterError(problem, "'LORA', or a type that docs/from-peft.md names", do)
    problems = []
    if peft_type != "LORA" and not by_veneer:
        problem = f"peft_type {peft_type!r} and no record"
        problems.append(sentence(problem, "'LORA'", "get the whole folder again"))
    problems += _missing_fields(config)
    problems += _start_problems(config, with_base)
    problems += _option_problems(config, with_base)
    problems += _invocation_problems(config)
    problems += _value_problems(config)
    problems = problems or list(_bad_patterns(config))
    raise_all(AdapterError, f"This {CONFIG} cannot be used", problems)


def _missing_fields(config: Mapping[str, Any]) -> Iterator[str]:
    """The problems of required fields without a value."""
    for name in ("r", "lora_alpha", "target_modules"):
        if name == "target_modules" and config.get("target_parameters"):
            continue
        if config.get(name) is None:
            do = f"add the {name} that it was trained with"
            yield sentence(f"no {name!r} in {CONFIG}", "a value", do)


def _start_problems(config: Mapping[str, Any], with_base: bool) -> Iterator[str]:
    """The problem of a start that changed the base's weights, unless it can be recomputed from the
    base."""
    start, expected = config.get("init_lora_weights"), "an adapter of the unchanged base"
    if starts_from_base(config):
        if not with_base:
            problem = f"init_lora_weights={start!r}, which changed the base's weights as it started"
            do = (
                "load it on its base with veneer.load and save it, or let PEFT convert it when it"
                " saves"
            )
            yield sentence(problem, expected, do)
    elif isinstance(start, str):
        do = "let PEFT convert it when it saves (path_initial_model_for_weight_conversion)"
        for name, reason in _LOST_STARTS:
            if start.lower().startswith(name):
                yield sentence(f"init_lora_weights={start!r}, {reason}", expected, do)


def _option_problems(config: Mapping[str, Any], with_base: bool) -> Iterator[str]:
    """The problems of options that are changes of weights only if the base is available."""
    if config.get("lora_bias") is True and not with_base:
        do = "load it on its base, and merge or save it there"
        yield sentence("lora_bias=true, biases beside B", "changes of weights alone", do)
    # with a group size of 1, A has all inputs, but PEFT scales them in a GPTQ layer
    single_inputs = config.get("qalora_group_size") == 1
    if config.get("use_qalora") is True and (single_inputs or not with_base):
        do = "load it on its base, and save it there"
        if single_inputs:
            do = "set it to false, unless that base is GPTQ's"
        problem = "use_qalora=true, which pools inputs of GPTQ layers"
        yield sentence(problem, "A of all inputs", do)


def _invocation_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """The problems of options that would change tokens before an adapter's invocation."""
    if not config.get("alora_invocation_tokens"):
        return
    names = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "bias")
    for name in names:
        if config.get(name) not in (None, False, "none") and config[name]:
            problem = f"{name}={config[name]!r} with alora_invocation_tokens in {CONFIG}"
            expected = "plain LoRA of linear layers, which acts from the invocation on"
            yield sentence(problem, expected, "use PEFT for it")


def _value_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """The problems of unknown fields with a value, and of values of another type or range."""
    for name, value in config.items():
        test, expected = _FIELD_TESTS.get(
            name, (lambda value: not value, "a field that Veneer can honour")
        )
        if value is None or test(value):
            continue
        text = repr(value)
        text = text if len(text) <= 200 else text[:200] + "…"
        do = _ADVICE.get(name, "use PEFT for it")
        if name in _FIELD_TESTS:
            do = "correct it, or get the file again"
        yield sentence(f"{name[:80]}={text} in {CONFIG}", expected, do)


def _bad_patterns(config: Mapping[str, Any]) -> Iterator[str]:
    """The problems of the regular expressions of a config whose fields have valid types.
    Expressions of targets are only compiled with ``re``, because the tensors also name the
    targets."""
    tests: list[tuple[str, Callable[[Any], Any], Any]] = [
        (field, patterns.ends, tuple(config.get(field) or ()))
        for field in ("rank_pattern", "alpha_pattern")
    ]
    alone = ("target_modules", "exclude_modules")
    tests += [
        (field, patterns.readable, config[field])
        for field in alone
        if isinstance(config.get(field), str)
    ]
    for field, compiled, source in (
        *tests,
        ("layers_pattern", patterns.containers, layers_patterns(config)),
    ):
        try:
            compiled(source)
        except ValueError as error:
            do = "name the modules by the ends of their paths"
            yield sentence(f"{field} in {CONFIG}: {error}", "a plain regular expression", do)
