"""From (model, config) to a plan: the rank of each weight that changes, the modules that hold or
read it, and the parameters that are trained in full.

In: a model, which is not changed, and a ``LoraConfig``. Out: ``Plans``, or one error with every
problem: targets that match nothing, weights that cannot change, ties and memory that two weights
share.
"""
