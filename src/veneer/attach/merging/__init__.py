"""Fold an adapter into the weights of a live model, and restore the old weights bit for bit.

Input: an adapted model and the name of an adapter. Output: the same model with
round(gain ⊙ (W + ΔW)) in its weights, and a report of how much of each change survived rounding. A
merge writes all weights or none. An interrupted merge can be undone.
"""
