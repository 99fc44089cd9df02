"""The adapted layer: a module whose class is a subclass that runs the selected adapter.

Input: a module, the changes of its weights, and the selection of the calling thread or task.
Output: the module's output with gain ⊙ (W + ΔW) in place of W. This folder also holds the state of
an adapted model, and finds the layers that an adapter changes. It reads neither configs nor plans;
``planning/`` and ``install.py`` do.
"""
