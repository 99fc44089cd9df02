"""Checks of the fields of ``adapter_config.json``: their types and ranges, and the fields that
change PEFT's result in a way that Veneer does not support."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from veneer.errors import AdapterError, raise_all, sentence
from veneer.formats import patterns
from veneer.formats.peft import CONFIG, MAX_RANK, not_for_peft
from veneer.formats.peft_paths import layers_patterns


def has_type(*types: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in types


def all_values(container: type, test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A function that tells whether a value is a ``container`` (list or dict) of which every value
    passes ``test``."""
    return lambda value: (
        isinstance(value, container)
        and all(map(test, value.values() if container is dict else value))
    )


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _has_token_ids(value: Any) -> bool:
    id_lists = value.values() if isinstance(value, dict) else [value]
    return all(
        isinstance(ids, list) and all(type(id_) is int and id_ >= 0 for id_ in ids)
        for ids in id_lists
    )


is_number = has_type(int, float)
_is_text_list, _is_int_list = all_values(list, has_type(str)), all_values(list, has_type(int))
_RANK_RANGE = f"a whole number from 1 to {MAX_RANK:,}"
# The fields that Veneer supports or that do not change the result, with their valid values. Null is
# valid, too. Each entry: (test of a value, description of the valid values, field names).
_FIELDS: tuple[tuple[Callable[[Any], bool], str, str], ...] = (
    (
        has_type(str),
        "text",
        "base_model_name_or_path megatron_core peft_type peft_version revision task_type",
    ),
    (
        has_type(bool),
        "true or false",
        "ensure_weight_tying fan_in_fan_out inference_mode lora_bias",
    ),
    (has_type(bool), "true or false", "use_dora use_qalora use_rslora"),
    (
        has_type(dict),
        "an object",
        "auto_mapping corda_config eva_config loftq_config lora_ga_config megatron_config",
    ),
    (has_type(dict), "an object", "runtime_config"),
    (has_type(bool, str), "true, false or a name", "init_lora_weights"),
    (has_type(int), "a whole number", "qalora_group_size"),
    (is_number, "a number", "lora_alpha"),
    (lambda value: is_number(value) and 0 <= value <= 1, "a number from 0 to 1", "lora_dropout"),
    (_is_rank, _RANK_RANGE, "r"),
    (all_values(dict, _is_rank), f"{_RANK_RANGE} for each pattern", "rank_pattern"),
    (all_values(dict, is_number), "a number for each pattern", "alpha_pattern"),
    (_is_text_list, "a list of texts", "modules_to_save target_parameters"),
    (
        lambda value: isinstance(value, str) or _is_text_list(value),
        "text, or a list of texts",
        "exclude_modules layers_pattern target_modules",
    ),
    (_has_token_ids, "a list of token ids, or one for each path", "trainable_token_indices"),
    (
        lambda value: isinstance(value, list) and _has_token_ids(value),
        "a list of token ids",
        "alora_invocation_tokens",
    ),
    (lambda value: value in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'", "bias"),
    (
        lambda value: _is_int_list(value if isinstance(value, list) else [value]),
        "a whole number, or a list of these",
        "layers_to_transform",
    ),
)
#: field name -> (test of a value, description of the valid values)
_FIELD_TESTS = {
    field: (test, description) for test, description, fields in _FIELDS for field in fields.split()
}
#: the advice in the error for a refused field, where it is not "use PEFT for it"
_ADVICE = {
    "layer_replication": (
        'take it out, and load on a base that has these layers (docs/from-peft.md, "Repeated'
        ' layers")'
    ),
}
#: values of ``init_lora_weights`` with which PEFT changes the base's weights before training, in a
#: way that cannot be recomputed from the base: (beginning of the value, reason in the error)
_UNREPEATABLE_INITS = (
    ("pissa", "which took a random approximation off the base's weights as it started"),
    ("corda", "which took what it found in data off the base's weights as it started"),
    ("loftq", "which quantised the base's weights as it started"),
    ("lora_ga", "which took what it found in gradients off the base's weights as it started"),
)


def changes_base_at_load(config: Mapping[str, Any]) -> bool:
    """Whether PEFT changes the base's weights when it loads the folder, so that the file holds
    changes of that changed base. It does so if ``init_lora_weights`` is "pissa" or "olora": then
    PEFT subtracts the initial scale · B A from the base's weight, and recomputes it on loading."""
    init_method = config.get("init_lora_weights")
    return isinstance(init_method, str) and (
        init_method == "pissa" or init_method.lower() == "olora"
    )


def check_config(
    config: Mapping[str, Any], by_veneer: bool = False, with_base: bool = False
) -> None:
    """Raise AdapterError for a config that changes PEFT's result in a way that Veneer does not
    support, or that is invalid.

    Args:
        by_veneer: whether Veneer wrote the config.
        with_base: whether the base's weights are available.
    """
    peft_type = config.get("peft_type")
    # raise this error alone, because the fields of another ``peft_type`` have other meanings
    if peft_type != "LORA" and not_for_peft(config) is None:
        raise AdapterError(
            f"peft_type {peft_type!r} in {CONFIG}",
            "'LORA', or a type that docs/from-peft.md names",
            "save it as LoRA with PEFT (save_as_lora), or merge it there and run `veneer extract`"
            " on the merged model",
        )
    problems = []
    if peft_type != "LORA" and not by_veneer:
        problem = f"peft_type {peft_type!r} and no record"
        problems.append(sentence(problem, "'LORA'", "get the whole folder again"))
    problems += [
        *_missing_field_problems(config),
        *_init_problems(config, with_base),
        *_option_problems(config, with_base),
        *_invocation_problems(config),
        *_value_problems(config),
    ]
    problems = problems or list(_pattern_problems(config))
    raise_all(AdapterError, f"This {CONFIG} cannot be used", problems)


def _missing_field_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """An error text for each required field without a value."""
    for name in ("r", "lora_alpha", "target_modules"):
        if name == "target_modules" and config.get("target_parameters"):
            continue
        if config.get(name) is None:
            advice = f"add the {name} that it was trained with"
            yield sentence(f"no {name!r} in {CONFIG}", "a value", advice)


def _init_problems(config: Mapping[str, Any], with_base: bool) -> Iterator[str]:
    """An error text if ``init_lora_weights`` changed the base's weights before training, unless
    this change can be recomputed and ``with_base`` says that the base is available for that."""
    init_method, expected = config.get("init_lora_weights"), "an adapter of the unchanged base"
    if changes_base_at_load(config):
        if not with_base:
            problem = (
                f"init_lora_weights={init_method!r}, which changed the base's weights as it started"
            )
            advice = (
                "load it on its base with veneer.load and save it, or let PEFT convert it when it"
                " saves"
            )
            yield sentence(problem, expected, advice)
    elif isinstance(init_method, str):
        advice = "let PEFT convert it when it saves (path_initial_model_for_weight_conversion)"
        for name, reason in _UNREPEATABLE_INITS:
            if init_method.lower().startswith(name):
                yield sentence(f"init_lora_weights={init_method!r}, {reason}", expected, advice)


def _option_problems(config: Mapping[str, Any], with_base: bool) -> Iterator[str]:
    """An error text for each option that Veneer can convert to changes of weights only with the
    base, if ``with_base`` is False. ``use_qalora`` with a group size of 1 is never converted."""
    if config.get("lora_bias") is True and not with_base:
        advice = "load it on its base, and merge or save it there"
        yield sentence("lora_bias=true, biases beside B", "changes of weights alone", advice)
    # With a group size of 1, A has all inputs, as in plain LoRA. But PEFT still scales the inputs
    # of a GPTQ layer, and the config does not tell whether the base is GPTQ's.
    is_unpooled = config.get("qalora_group_size") == 1
    if config.get("use_qalora") is True and (is_unpooled or not with_base):
        advice = "load it on its base, and save it there"
        if is_unpooled:
            advice = "set it to false, unless that base is GPTQ's"
        problem = "use_qalora=true, which pools inputs of GPTQ layers"
        yield sentence(problem, "A of all inputs", advice)


def _invocation_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """An error text for each option that would also change the outputs of tokens before the
    ``alora_invocation_tokens``. An adapter with invocation tokens must not change those outputs."""
    if not config.get("alora_invocation_tokens"):
        return
    option_names = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "bias")
    for name in option_names:
        if config.get(name) not in (None, False, "none") and config[name]:
            problem = f"{name}={config[name]!r} with alora_invocation_tokens in {CONFIG}"
            expected = "plain LoRA of linear layers, which acts from the invocation on"
            yield sentence(problem, expected, "use PEFT for it")


def _value_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """An error text for each unknown field with a value (other than null, false, 0 or empty), and
    for each known field with an invalid value."""
    for name, value in config.items():
        test, expected = _FIELD_TESTS.get(
            name, (lambda value: not value, "a field that Veneer can honour")
        )
        if value is None or test(value):
            continue
        value_text = repr(value)
        value_text = value_text if len(value_text) <= 200 else value_text[:200] + "…"
        advice = _ADVICE.get(name, "use PEFT for it")
        if name in _FIELD_TESTS:
            advice = "correct it, or get the file again"
        yield sentence(f"{name[:80]}={value_text} in {CONFIG}", expected, advice)


def _pattern_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """An error text for each invalid regular expression in a config whose fields have valid types.
    Expressions in ``target_modules`` and ``exclude_modules`` are compiled with ``re`` only. They
    may exceed the limits of ``patterns.py``, because the keys of the tensors then tell the
    targets."""
    compilers: list[tuple[str, Callable[[Any], Any], Any]] = [
        (field, patterns.path_endings, tuple(config.get(field) or ()))
        for field in ("rank_pattern", "alpha_pattern")
    ]
    target_fields = ("target_modules", "exclude_modules")
    compilers += [
        (field, patterns.compile_flags, config[field])
        for field in target_fields
        if isinstance(config.get(field), str)
    ]
    for field, compile_source, source in (
        *compilers,
        ("layers_pattern", patterns.layer_containers, layers_patterns(config)),
    ):
        try:
            compile_source(source)
        except ValueError as error:
            advice = "name the modules by the ends of their paths"
            yield sentence(f"{field} in {CONFIG}: {error}", "a plain regular expression", advice)
