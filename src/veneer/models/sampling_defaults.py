"""The sampling fields of a base's ``generation_config.json``, which are the defaults for requests
that do not set these fields, and the tokens that end an answer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from veneer.errors import ConfigError, raise_all, sentence
from veneer.models.locate import config_of, find_base
from veneer.models.remote_code import code_options

CONFIG_FILE = "generation_config.json"
#: fields of the file that change which tokens are sampled: {name: the values with which the field
#: has no effect}
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "min_p": (0,), "top_h": (1,), "typical_p": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,),
    "num_beams": (1,), "penalty_alpha": (0,), "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,), "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],), "suppress_tokens": ([],), "begin_suppress_tokens": ([],),
    "sequence_bias": ([], {}), "min_length": (0,), "min_new_tokens": (0,),
    "forced_bos_token_id": (), "forced_eos_token_id": (), "exponential_decay_length_penalty": (),
    "guidance_scale": (1,), "stop_strings": ([],), "watermarking_config": (),
}  # fmt: skip
#: the fields of ``NEUTRAL_VALUES`` that only transformers' sampler supports. They have no effect in
#: `veneer generate`, which uses a sampler of its own
TRANSFORMERS_ONLY = (
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "num_beams",
    "penalty_alpha",
)


@dataclass(frozen=True)
class SamplingDefaults:
    """The sampling fields in the file ``CONFIG_FILE`` of a base.

    Fields:
        temperature, top_k, top_p, repetition_penalty: None if the file does not set the field. A
            repetition penalty of 1, which has no effect, is None too.
        samples: whether the file enables sampling instead of greedy decoding.
        further_fields: {name: value} of the fields in ``NEUTRAL_VALUES`` that have an effect.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    samples: bool = False
    further_fields: Mapping[str, Any] = field(default_factory=dict)

    def describe(self, names: Iterable[str]) -> str:
        """The fields in ``names`` that the file sets, as text: "temperature 0.6, top_k 20"."""
        values = {**vars(self), **self.further_fields}
        return ", ".join(
            f"{name} {str(values[name])[:60]}"
            for name in sorted(names)
            if values.get(name) is not None
        )


def sampling_defaults(model: Any) -> SamplingDefaults:
    """The sampling defaults of a model of transformers, from its ``generation_config``.
    ``ConfigError``: a value is of another type or out of range, such as a negative temperature."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return SamplingDefaults()
    checks = {
        "temperature": (
            "a number, 0 or more",
            lambda value: _is_finite_number(value) and value >= 0,
        ),
        "top_k": ("a whole number, 0 or more", lambda value: type(value) is int and value >= 0),
        "top_p": (
            "a number above 0, at most 1",
            lambda value: _is_finite_number(value) and 0 < value <= 1,
        ),
        "repetition_penalty": (
            "a number above 0",
            lambda value: _is_finite_number(value) and value > 0,
        ),
    }
    values = {name: value for name in checks if (value := getattr(config, name, None)) is not None}
    problems = [
        sentence(
            f"{name} {value!r} in the base's {CONFIG_FILE}", checks[name][0], "correct the file"
        )
        for name, value in values.items()
        if not checks[name][1](value)
    ]
    raise_all(ConfigError, f"The base's {CONFIG_FILE} was not taken", problems)
    if values.get("repetition_penalty") == 1:
        del values["repetition_penalty"]
    return SamplingDefaults(
        **values,
        samples=bool(getattr(config, "do_sample", False)),
        further_fields=_further_fields(config),
    )


def base_end_tokens(base: str, tokenizer: Any) -> frozenset[int]:
    """``end_tokens`` of a base whose weights are not loaded. ``ConfigError``: there is no such
    base."""
    from transformers import GenerationConfig

    generation_config = None
    with contextlib.suppress(OSError):  # a base may lack the file
        generation_config = GenerationConfig.from_pretrained(find_base(base), **code_options())
    return _end_ids(generation_config, config_of(base), tokenizer)


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The ids that end an answer: those of the generation config, the config and the tokenizer."""
    return _end_ids(getattr(model, "generation_config", None), model.config, tokenizer)


def _end_ids(generation_config: Any, config: Any, tokenizer: Any) -> frozenset[int]:
    sources, ids = (generation_config, config.get_text_config(), tokenizer), set[int | None]()
    for source in sources:
        end_ids = getattr(source, "eos_token_id", None)
        ids |= {*end_ids} if isinstance(end_ids, list | tuple) else {end_ids}
    return frozenset(token_id for token_id in ids if token_id is not None)


def changes_greedy_tokens(config: Any) -> bool:
    """Whether a generation config of transformers sets a field that changes which tokens greedy
    decoding chooses. ``temperature``, ``top_k`` and ``top_p`` are no such fields."""
    penalty = getattr(config, "repetition_penalty", None)
    return penalty not in (None, 1) or bool(_further_fields(config))


def _further_fields(config: Any) -> dict[str, Any]:
    """The fields of ``NEUTRAL_VALUES`` whose value in ``config`` has an effect."""
    fields = {name: getattr(config, name, None) for name in NEUTRAL_VALUES}
    return {
        name: value
        for name, value in fields.items()
        if value is not None and value not in NEUTRAL_VALUES[name]
    }


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
