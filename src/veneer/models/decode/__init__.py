"""A causal language model, called on rows of keys and values: what decoding many prompts at a time
takes, whoever asks.

    slots.py, row_memory.py   memory for keys and values: rows, in size classes
    attention.py              attention of a call over such rows
    forward.py                the calls: prompts, one token of each row, or both
    continuations.py          the loop of training and evaluation; that of the server is its own

It comes with transformers, so nothing here is imported with ``veneer.models``.
"""
