"""The adapted layer: the same module of another class, whose forward runs the selected adapter.

In: a module, the changes of its weights, and the selection of the calling thread. Out: the output
with gain ⊙ (W + ΔW) in the place of W, in factors, fused, materialised or on a view. This folder
also holds the state of an adapted model, and finds the layers that an adapter changes. It reads
neither configs nor plans; ``planning/`` and ``install.py`` do.
"""
