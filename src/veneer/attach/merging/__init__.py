"""Fold an adapter into the weights of a live model, and restore the old weights bit for bit.

Input: an adapted model and the name of an adapter. Output: the same model with gain ⊙ (W + ΔW),
rounded to the weight's dtype, in its weights (gain: a factor for each output, as in DoRA); and a
report of how much of each change survived rounding. A merge writes all weights or none. An
interrupted merge can be undone.
"""
