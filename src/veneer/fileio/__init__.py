"""Functions that read untrusted files and write files atomically.

The functions take paths, tensors and JSON values, and validate, read or write them. They do not
depend on layers, adapters or models.
"""
