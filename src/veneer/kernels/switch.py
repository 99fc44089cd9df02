"""``VENEER_COMPILED``: turn off optimisations that replace plain torch code on a CPU.

    VENEER_COMPILED=0                plain torch throughout
    VENEER_COMPILED=saved_inputs     this optimisation only
    VENEER_COMPILED=1                all optimisations, the default

round_nearest    A compiled loop rounds W + ΔW to bfloat16, with the same bits as torch's
                 operations, in a quarter of their time. It needs numba (the extra ``fast``), which
                 takes half a second and 100 MiB to load: the first large merged weight loads it.
saved_inputs     Not compiled: it edits the tensors that autograd's nodes save. A third of the
                 memory that a step over a frozen Llama keeps is then recomputed in backward, with
                 the same bits.

The variable is read once, when veneer is imported.
"""

from __future__ import annotations

import functools
import os
import warnings
from importlib.util import find_spec

from veneer.errors import ConfigError, sentence

VARIABLE = "VENEER_COMPILED"
#: the names that need numba, and all of them
LOOPS = ("round_nearest",)
NAMES = (*LOOPS, "saved_inputs")
#: names of earlier releases, which have no effect any more
REMOVED = ("thin_matmul", "single_adapter_bf16", "mixed_rows", "bf16_dot", "expert_rows")


def enabled_names(text: str) -> frozenset[str]:
    """The names that a value of the variable turns on: "1" all of them, "0" none, else the listed
    ones, separated by commas. A name of an earlier release causes a ``DeprecationWarning``.

    Raises:
        ConfigError: an unknown name.
    """
    if text in ("", "1"):
        return frozenset(NAMES)
    if text == "0":
        return frozenset()
    listed = {name.strip() for name in text.split(",")}
    if unknown := sorted(listed - {*NAMES, *REMOVED}):
        expected = f"0, 1, or some of {', '.join(NAMES)}, with commas"
        raise ConfigError(
            sentence(f"{VARIABLE}={text} (unknown: {', '.join(unknown)})", expected, "correct it")
        )
    if removed := sorted(listed & {*REMOVED}):
        message = f"{VARIABLE}={text}: {', '.join(removed)} no longer exist(s); leave it out"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
    return frozenset(listed & {*NAMES})


#: the optimisations that are on in this process
ON = enabled_names(os.environ.get(VARIABLE, "1"))


@functools.cache
def has_numba() -> bool:
    """Whether numba is installed (the extra ``fast``)."""
    return find_spec("numba") is not None


def on(name: str) -> bool:
    """Whether one of ``NAMES`` is turned on and can run here."""
    return name in ON and (name not in LOOPS or has_numba())
