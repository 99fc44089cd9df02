"""Which of the two ways to compute an adapted layer: "factored" or "materialised".

- factored: ``op(x; W) + op(x; ΔW)`` with ΔW kept as two thin matrices. tokens · r · (in + out) more multiplications.
- materialised: ``op(x; W + ΔW)``, which defines the meaning and is right for every layer whatever its forward does.
  It forms W + ΔW in at least float32, as a 16-bit sum would lose a small ΔW.
"""

from __future__ import annotations

FACTORED = "factored"
MATERIALISED = "materialised"


def choose(*, gain_fits: bool, forced: str | None) -> str:
    """The path of one call of a layer that has both.

    Args:
        gain_fits: False where rows of ΔW are rescaled along what this layer (tied to the adapted one) reads as inputs.
        forced: the caller's choice, which counts wherever both paths are right.
    """
    return (forced or FACTORED) if gain_fits else MATERIALISED
