"""Plan an adapter of a model from its config: the rank of each weight that changes, the modules
that hold or read it, and the parameters that are trained in full.

Input: a model, which is not changed, and a ``LoraConfig``. Output: ``Plans``, or one error with
every problem: targets that match nothing, weights that cannot change, tied weights with conflicting
settings, and distinct weights that share memory.
"""
