"""Reading untrusted files and writing files atomically.

The functions take paths, tensors and JSON values, and validate, read or write them. They do not
depend on layers, adapters or models.
"""
