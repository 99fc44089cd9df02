"""``VENEER_COMPILED``: an environment variable that turns off optimisations on a CPU, so that
torch's own operations are used instead.

    VENEER_COMPILED=0                no optimisation
    VENEER_COMPILED=saved_inputs     only the optimisation "saved_inputs"
    VENEER_COMPILED=1                all optimisations, the default

mixed_rows       A compiled loop multiplies each row of a decoding step with its own adapter, over a
                 base in bfloat16 or float32. The results are as exact as those of torch's
                 operations, but not bitwise equal to them.
round_nearest    A compiled loop rounds W + ΔW to bfloat16, with the same bits as torch's
                 operations, in a quarter of their time.
saved_inputs     Not compiled. It changes which tensors autograd's nodes save. In a training step
                 over a frozen Llama, a third of the bytes that autograd would save is recomputed in
                 backward instead, with the same bits.
weight_first     Not compiled. For 2 to 64 rows that decode in float32, in the engine or in a bank,
                 x Wᵀ is computed as (W xᵀ)ᵀ on CPUs of AMD, in 0.3 to 0.9 of the time. The results
                 are as exact, but not bitwise equal.

Compiled loops need numba (the extra ``fast``), which takes half a second and 100 MiB to load. It is
loaded at the first batch with several adapters over a base in bfloat16 or float32, and at the first
merge of a large weight. The variable is read once, when veneer is imported.
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
    """The names of the optimisations that ``setting``, a value of ``VENEER_COMPILED``, turns on:
    all for "1" or an empty text, none for "0", else those that it lists, separated by commas.
    Listed names of earlier releases are left out, with a ``DeprecationWarning``.

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


def is_on(optimisation: str) -> bool:
    """Whether ``optimisation``, one of ``NAMES``, is turned on by ``VENEER_COMPILED`` and, if it is
    a compiled loop, numba is installed."""
    return optimisation in ENABLED and (optimisation not in LOOPS or has_numba())
