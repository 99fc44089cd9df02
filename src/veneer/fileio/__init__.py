"""Reading untrusted files and writing files atomically.

In: paths, tensors, JSON values. Out: the same, validated or written. This folder knows tensors, but
no layers, adapters or models.
"""
