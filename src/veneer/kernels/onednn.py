"""Bound the memory of torch's and oneDNN's caches for products on a CPU.

For each shape of a 16-bit product or a convolution, oneDNN caches a compiled kernel, and torch
caches the description of the operation. An entry takes 250 KiB or more, and each of the two caches
holds 1,024 entries by default. Calls with many different numbers of tokens fill both caches with
hundreds of MiB.
"""

from __future__ import annotations

import os

#: the environment variables that set the capacity of the two caches, in entries. oneDNN and torch
#: read them when they compute the first 16-bit product or convolution
VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
#: entries of each cache for a server: enough for calls with three to six different numbers of
#: tokens
SERVING = 48
#: entries of each cache for a training run: enough for ten different numbers of tokens in forward
#: and backward, or for all layers of most convolutional models
TRAINING = 256


def limit_kernel_caches(entry_count: int) -> None:
    """Limit oneDNN's kernel cache and torch's cache of operations to ``entry_count`` entries each,
    by setting the environment variables ``VARIABLES``. A variable that is set already is kept. Has
    no effect after the first product of this process. ``entry_count`` should be at least the number
    of different shapes in a step. Otherwise every kernel is evicted before its next use, and
    compiled anew in each step."""
    for variable in VARIABLES:
        os.environ.setdefault(variable, str(entry_count))
