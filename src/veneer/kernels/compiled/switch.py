"""Which compiled loops are used: ``VENEER_COMPILED``, read here once, when veneer is imported."""

from __future__ import annotations

import functools
import os
from importlib.util import find_spec

from veneer.errors import ConfigError, sentence

VARIABLE = "VENEER_COMPILED"
#: what numba compiles, and what needs no numba
LOOPS = (
    "thin_matmul",
    "single_adapter_bf16",
    "mixed_rows",
    "bf16_dot",
    "expert_rows",
    "round_nearest",
)
NAMES = (*LOOPS, "saved_inputs")


def names(text: str) -> frozenset[str]:
    """The names that a value of the variable turns on: "1" all of them, "0" none, else those listed
    with commas.

    Raises:
        ConfigError: another name.
    """
    if text in ("", "1"):
        return frozenset(NAMES)
    if text == "0":
        return frozenset()
    listed = {name.strip() for name in text.split(",")}
    if unknown := sorted(listed - {*NAMES}):
        expected = f"0, 1, or some of {', '.join(NAMES)}, with commas"
        raise ConfigError(
            sentence(f"{VARIABLE}={text} (unknown: {', '.join(unknown)})", expected, "correct it")
        )
    return frozenset(listed)


#: what is turned on in this process
ON = names(os.environ.get(VARIABLE, "1"))


@functools.cache
def has_numba() -> bool:
    """Whether loops can be compiled (the extra ``fast``)."""
    return find_spec("numba") is not None


def on(name: str) -> bool:
    """Whether one of ``NAMES`` is turned on and can run here."""
    return name in ON and (name not in LOOPS or has_numba())
