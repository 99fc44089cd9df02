"""Fold an adapter into the weights of a live model, and take it out again to the very bits.

In: an adapted model and the name of an adapter. Out: the same model with round(gain ⊙ (W + ΔW)) in
its weights, and a report of how much of each change survived rounding. A merge writes all weights
or none; an interrupted one can be undone.
"""
