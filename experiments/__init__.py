"""Claims of papers about LoRA, tried at a size that two cores can do. `make paper` runs all of it
and writes docs/paper/.

One file is one page. `study.py` has the rule that decides a claim and keeps the records in
`results/`, `page.py` writes the pages. `training.py` has the loop that all
methods share; `words.py`, `snips.py` and `turned.py` have the tasks. `full/` has configurations
of `veneer train` and `veneer sweep` for the same at full size.
"""

from __future__ import annotations

import importlib

from experiments.study import Experiment
from veneer.errors import sentence

#: modules of this folder, each with an EXPERIMENT, in the order of the summary
NAMES: tuple[str, ...] = (
    "methods",
    "digits",
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
#: the order in which they run without a name, the most important first; latency is left out, as it
#: needs a machine without other work
RUN_ORDER: tuple[str, ...] = (
    "forgetting",
    "methods",
    "rank_for_rl",
    "capacity",
    "counts",
    "which",
    "rates",
    "variants",
    "rounding",
    "recipe",
    "subspaces",
    "digits",
    "repair",
)


def load_experiment(name: str) -> Experiment:
    if name not in NAMES:
        problem = f"the experiment {name!r}"
        raise SystemExit(sentence(problem, f"one of {', '.join(NAMES)}", "name one of these"))
    return importlib.import_module(f"experiments.{name}").EXPERIMENT
