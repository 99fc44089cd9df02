"""One call in which several adapters take part: one for each row of the batch, or a weighted blend.

Input: the ``ActiveAdapter`` of each row, or adapters with weights. Output: one ``ActiveAdapter``
for the call. Its layers split their inputs by adapter, or add up the weighted changes. The output
for a row equals the output of a call with only this row and its adapter.
"""
