"""One call in which several adapters take part: one for each row of the batch, or a weighted blend.

Input: the ``ActiveAdapter`` of each row, or adapters with coefficients. Output: one
``ActiveAdapter`` for the call. With it, layers split their inputs by adapter, or add up the changes
times their coefficients. If rows have different adapters, the output for a row equals the output of
a call with only this row and its adapter.
"""
