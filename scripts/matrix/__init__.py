"""Write docs/support.md, the tables of what works with what. A run decides each cell.

    python -m scripts.matrix              run everything, print the page and write it
    python -m scripts.matrix --check      run everything, fail if the committed page differs
    python -m scripts.matrix linear gguf  run these layers and storages, print their rows

The layers, variants and storages come from the registries, the modules and their inputs from their
``examples``. All examples of a layer kind are modules of a single model, to which every variant is
attached as an adapter. So one file, one compilation and one PEFT model serve all of them. If this
fails, each example runs by itself, to find out which example fails and why.

    cases.py        the models: a variant on the examples of a layer kind
    definitions.py  the definition of each variant
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
    """Turn off network access, logs and warnings of libraries, before they are imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
