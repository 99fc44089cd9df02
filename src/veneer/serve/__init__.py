"""The HTTP server. It serves one base model and many LoRA adapters, and loads an adapter from disk
when a request needs it.

    clients ── api.py ── engine.py ── bank (adapters in memory) ── model
               schemas   scheduler                                 each row of a batch has
               access    slots                                     its own adapters
               answers   sampling, text

Routes do not handle tensors, and the engine does not handle HTTP: they exchange the data classes of
``requests.py``.
"""

from veneer.registry import lazy_submodules

__getattr__ = lazy_submodules(__name__, ("cluster", "start"))
