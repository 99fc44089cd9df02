"""One base model behind HTTP, with as many adapters as the disk holds.

    clients ── api.py ── engine.py ── bank ── model
               schemas   scheduler            one batch, an adapter a row
               access    slots
               answers   sampling, text

Routes know nothing of tensors, and the engine nothing of HTTP: they meet in ``requests.py``, three
values.
"""
