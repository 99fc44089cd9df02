"""Write docs/support.md: what works with what, every cell decided by a run.

    python -m scripts.matrix              run everything, print the page and write it
    python -m scripts.matrix --check      run everything, fail if the committed page says something
                                          else
    python -m scripts.matrix linear gguf  run these layers and storages, print their part

The layers, variants and storages are those of the registries; the modules and inputs are their
``examples``. All examples of a kind stand side by side in one model, on which every variant is an
adapter: so one file, one compilation and one PEFT model serve them all. Where that fails, each
example runs alone, to find out which it was and why.

    cases.py        the models: a variant on the examples of a kind
    definitions.py  what each variant means
    operations.py   the columns: forward, gradient, merge, …
    storages.py     the second table: linear layers whose weight is stored in another way
    page.py         cells, footnotes, tables
"""

import logging
import os
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def silence() -> None:
    """Before the libraries are imported: nobody looks for a network, and nobody talks."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
