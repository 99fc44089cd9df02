"""Many adapters on one base: by name, under a budget of bytes, a different one for each row of a
batch.

    bank = veneer.Bank(model, capacity_bytes=2 << 30)
    bank.register("french", "adapters/french")      known; loaded when it is used
    with bank.rows(["french", None, {"french": 0.7, "german": 0.3}]):
        model(x)                                    row i of every input uses entry i

In: adapter folders, and a model. Out: calls of that model in which each row uses its own adapter.
"""

from veneer.bank.bank import Bank
from veneer.bank.lease import Lease, Status

__all__ = ["Bank", "Lease", "Status"]
