"""PEFT's own test models and configs, told again as rows of data, and what Veneer makes of each.

``python -m tests.peft_cases`` runs every row in every way, prints the table and writes
docs/peft-cases.md.

    models.py architectures.py   the models: small ones of each kind of layer; those of transformers at a toy's size
    rows.py                      what PEFT is asked to do on them: (model, tuner, fields of its config)
    translate.py                 the same as Veneer's config, by docs/from-peft.md
    ways.py                      one row in every way: equal, refused or wrong
    several.py matching.py       several adapters on one model; which modules a config means
    page.py                      the table, and every refusal by its reason
"""

from __future__ import annotations

import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def silence() -> None:
    """PEFT, transformers and Veneer warn of what these rows do on purpose."""
    import torch
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
