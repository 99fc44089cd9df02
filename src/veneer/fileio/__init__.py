"""Files, below everything that knows what an adapter is: bytes come in carefully and go out whole.

In: paths, tensors, JSON values. Out: the same, checked or written. It knows tensors, but no layer,
adapter or model.
"""
