"""Prove on a live model that its output depends on every change of an adapter, as W + ΔW does.

In: an adapted model and an example of its inputs. Out: a report, or one error that names each layer
whose change does not reach the output, and why. One weight W + ΔW is formed at a time.
"""
