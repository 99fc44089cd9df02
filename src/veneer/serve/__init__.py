"""One base model behind HTTP, with as many adapters as the disk holds.

    clients ── api.py ── engine.py ── bank ── model
               schemas   scheduler            one batch, an adapter a row
               access    slots
               answers   sampling, text

Routes know nothing of tensors, and the engine nothing of HTTP: they exchange the data classes of
``requests.py``.
"""

from veneer.registry import lazy_submodules

__getattr__ = lazy_submodules(__name__, ("cluster", "start"))
