"""Files, below everything that knows what an adapter is: bytes come in carefully and go out whole.

    untrusted   headers of safetensors files, JSON and links of a folder that nobody vouches for
    atomic      write a folder or a file so that a crash leaves the old one or the new one
    hashing     digests of tensors and JSON, and the fingerprint of a base weight
    spill       put tensors aside outside of the memory that computes
    throttle    long loops that pause for a thread that must not wait

In: paths, tensors, JSON values. Out: the same, checked or written. It knows tensors, but no layer, adapter or model.
"""
