"""``VENEER_COMPILED``: an environment variable that turns off optimisations on a CPU. Torch's own
operations are used in their place.

    VENEER_COMPILED=0                no optimisation
    VENEER_COMPILED=saved_inputs     this optimisation only
    VENEER_COMPILED=1                all optimisations, the default

mixed_rows       A compiled loop multiplies the tokens of a decoding step with the adapter of each
                 row, over a base in bfloat16 or float32. Its sums are as exact as those of torch's
                 operations, but not the same bits.
round_nearest    A compiled loop rounds W + ΔW to bfloat16, with the same bits as torch's
                 operations, in a quarter of their time.
saved_inputs     Not compiled. It changes which tensors autograd's nodes save. In a training step
                 over a frozen Llama, a third of the bytes that autograd would save is recomputed in
                 backward instead, with the same bits.
weight_first     Not compiled. For 2 to 64 rows that decode in float32, in the engine or in a bank,
                 x Wᵀ is computed as (W xᵀ)ᵀ on CPUs of AMD, in 0.3 to 0.9 of the time. Its sums are
                 as exact, but not the same bits.

Compiled loops need numba (the extra ``fast``), which takes half a second and 100 MiB to load. It is
loaded for the first batch with several adapters over such a base, and for the first large weight
that is merged. The variable is read once, when veneer is imported.
"""

from __future__ import annotations

import functools
import os
import warnings
from importlib.util import find_spec

from veneer.errors import ConfigError, sentence

VARIABLE = "VENEER_COMPILED"
#: the names of the optimisations that need numba; the names of all optimisations
LOOPS = ("mixed_rows", "round_nearest")
NAMES = (*LOOPS, "saved_inputs", "weight_first")
#: names of optimisations of earlier releases, which no longer exist
REMOVED = ("thin_matmul", "single_adapter_bf16", "bf16_dot", "expert_rows")


def enabled_names(setting: str) -> frozenset[str]:
    """The optimisations that a value of the variable turns on: "1" all of them, "0" none, else the
    optimisations that it names, separated by commas. A name of an earlier release causes a
    ``DeprecationWarning``.

    Raises:
        ConfigError: an unknown name.
    """
    if setting in ("", "1"):
        return frozenset(NAMES)
    if setting == "0":
        return frozenset()
    listed_names = {name.strip() for name in setting.split(",")}
    if unknown := sorted(listed_names - {*NAMES, *REMOVED}):
        problem = f"{VARIABLE}={setting} (unknown: {', '.join(unknown)})"
        expected = f"0, 1, or some of {', '.join(NAMES)}, with commas"
        raise ConfigError(sentence(problem, expected, "correct it"))
    if removed := sorted(listed_names & {*REMOVED}):
        message = f"{VARIABLE}={setting}: {', '.join(removed)} no longer exist(s); leave it out"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
    return frozenset(listed_names & {*NAMES})


#: the optimisations that are on in this process
ENABLED = enabled_names(os.environ.get(VARIABLE, "1"))


@functools.cache
def has_numba() -> bool:
    """Whether numba is installed (the extra ``fast``)."""
    return find_spec("numba") is not None


def is_on(name: str) -> bool:
    """Whether the optimisation ``name``, one of ``NAMES``, is turned on and can run here."""
    return name in ENABLED and (name not in LOOPS or has_numba())
