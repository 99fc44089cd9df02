"""Training: data, configuration, loss, trainer, generation. Import the part that you use. This file
imports no part by itself, so that the command line can read the configuration without loading
torch."""

from veneer.registry import lazy_submodules

__getattr__ = lazy_submodules(__name__, ("evaluate", "generate", "loss", "many", "sweep"))
