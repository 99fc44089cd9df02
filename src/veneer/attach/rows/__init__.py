"""One call in which several adapters take part: each row of a batch its own, or a weighted blend.

In: the ``ActiveAdapter`` of each row, or adapters with weights. Out: one ``ActiveAdapter`` for the
call, whose layers split their inputs by adapter, or sum changes. The result for a row equals that
of a call with this row and its adapter alone.
"""
