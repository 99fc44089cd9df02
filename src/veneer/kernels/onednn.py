"""Bound the memory of torch's and oneDNN's caches for products on a CPU.

For each shape of a 16-bit product or a convolution, oneDNN caches a kernel, and torch the
description of the operation. An entry takes 250 KiB or more, and each of the two caches holds 1,024
entries by default. Calls with many different numbers of tokens fill both with hundreds of MiB.
"""

from __future__ import annotations

import os

#: the environment variables with the numbers of entries, which oneDNN and torch read when they
#: compute the first such product
VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
#: entries for a server: enough for calls with three to six different numbers of tokens
SERVING = 48
#: entries for a training run: enough for ten different numbers of tokens in forward and backward,
#: or for all layers of most convolutional models
TRAINING = 256


def limit_kernel_caches(count: int) -> None:
    """Limit each of the two caches of this process to ``count`` entries, unless its variable is
    set. Has no effect after the first product. ``count`` should be at least the number of shapes in
    a step. Otherwise every kernel is evicted before its next use, and compiled anew in each
    step."""
    for variable in VARIABLES:
        os.environ.setdefault(variable, str(count))
