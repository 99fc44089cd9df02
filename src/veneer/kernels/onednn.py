"""Bound the memory of torch's and oneDNN's caches for products on a CPU.

oneDNN caches a kernel for each shape of a 16-bit product and of a convolution, and torch the
description of one, 250 KiB or more each, 1,024 of each by default. Calls with many different
numbers of tokens fill both with hundreds of MiB.
"""

from __future__ import annotations

import os

#: the variables that oneDNN and torch read when they compute the first such product
VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
#: kernels of a server: those of three to six numbers of tokens
SERVING = 48
#: kernels of a training run: those of ten numbers of tokens in forward and backward, or those of
#: all layers of most convolutional models
TRAINING = 256


def limit_kernel_caches(count: int) -> None:
    """Let the caches of this process keep ``count`` kernels, unless the variables are set. Has no
    effect after the first product. A step should not use more shapes than that: the kernels of all
    of them would be made anew in each step."""
    for variable in VARIABLES:
        os.environ.setdefault(variable, str(count))
