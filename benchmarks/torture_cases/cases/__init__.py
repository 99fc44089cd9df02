"""CASES: what LoRA libraries get wrong, each as a name, the row of the table that it belongs to,
and a function that runs it with a library."""

from torture_cases.cases import layers, merging, several, refusing, importing  # noqa: F401, I001  (their order)
from torture_cases.cases._case import CASES, Case, run

__all__ = ["CASES", "Case", "run"]
