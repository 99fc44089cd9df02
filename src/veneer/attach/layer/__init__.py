"""The adapted layer: the same module of another class, whose forward runs the selected adapter.

In: a module, the changes of its weights, and the selection of the calling thread. Out: the output
with gain ⊙ (W + ΔW) in the place of W, in factors, fused, materialised or on a view. This room also
holds the state of an adapted model, and finds in it the layers that an adapter changes. It knows no
config and no plan: it changes what it is given.
"""
