"""The sampling fields of a base's ``generation_config.json``: the defaults for requests without
these fields."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from veneer.errors import ConfigError, raise_all, sentence

FILE = "generation_config.json"
#: fields that change which tokens are sampled, and the values with which they have no effect
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "min_p": (0,), "top_h": (1,), "typical_p": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,),
    "num_beams": (1,), "penalty_alpha": (0,), "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,), "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],), "suppress_tokens": ([],), "begin_suppress_tokens": ([],),
    "sequence_bias": ([], {}), "min_length": (0,), "min_new_tokens": (0,),
    "forced_bos_token_id": (), "forced_eos_token_id": (), "exponential_decay_length_penalty": (),
    "guidance_scale": (1,), "stop_strings": ([],), "watermarking_config": (),
}  # fmt: skip
#: the fields of ``NEUTRAL_VALUES`` that only transformers' sampler supports; `veneer generate` uses
#: another sampler
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
    """The sampling fields in the file; a missing field is None.

    Fields:
        samples: whether the file enables sampling instead of greedy decoding.
        further_fields: other fields that change which tokens are sampled.
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
    """The sampling defaults of a model of transformers. ``ConfigError``: the file holds a value
    that no sampler supports."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return SamplingDefaults()
    checks = {
        "temperature": ("a number, 0 or more", lambda value: _finite(value) and value >= 0),
        "top_k": ("a whole number, 0 or more", lambda value: type(value) is int and value >= 0),
        "top_p": ("a number above 0, at most 1", lambda value: _finite(value) and 0 < value <= 1),
        "repetition_penalty": ("a number above 0", lambda value: _finite(value) and value > 0),
    }
    values = {name: value for name in checks if (value := getattr(config, name, None)) is not None}
    problems = [
        sentence(f"{name} {value!r} in the base's {FILE}", checks[name][0], "correct the file")
        for name, value in values.items()
        if not checks[name][1](value)
    ]
    raise_all(ConfigError, f"The base's {FILE} was not taken", problems)
    if values.get("repetition_penalty") == 1:
        del values["repetition_penalty"]
    return SamplingDefaults(
        **values,
        samples=bool(getattr(config, "do_sample", False)),
        further_fields=_further_fields(config),
    )


def changes_greedy_tokens(config: Any) -> bool:
    """Whether a generation config changes which tokens greedy decoding chooses. Temperature, top_k
    and top_p do not."""
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


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
