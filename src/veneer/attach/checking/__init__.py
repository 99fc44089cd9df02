"""Prove on a live model that its output depends on every change of an adapter, as if W + ΔW
were its weights.

Input: an adapted model and an example of its inputs. Output: a report, or one error that names each
layer whose change does not reach the output, and the reason. One weight W + ΔW is formed at a time,
so the check needs little memory.
"""
