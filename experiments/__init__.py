"""What papers claim of LoRA, tried at a size that two cores can do. `make paper` runs all of it and
writes docs/paper/.

One file an experiment; `experiment.py` says what an experiment is, `run.py` runs them, `page.py`
writes the pages from what was recorded in `results/`. `full/` has the same at full size, as
configurations of `veneer train` and `veneer sweep`, for who has the weights and a GPU.
"""

from __future__ import annotations

import importlib

from experiments.experiment import Experiment

#: in the order of the summary; each is a module of this folder whose EXPERIMENT it is
NAMES: tuple[str, ...] = (
    "methods",
    "digits",
    "phonemes",
    "which",
    "subspaces",
    "latency",
    "counts",
    "rates",
    "variants",
    "capacity",
    "forgetting",
    "repair",
    "rounding",
    "rank_for_rl",
    "recipe",
)


def find(name: str) -> Experiment:
    if name not in NAMES:
        raise SystemExit(
            f"Found: the experiment {name!r}. Expected: one of {', '.join(NAMES)}. Do: name one of these."
        )
    return importlib.import_module(f"experiments.{name}").EXPERIMENT
