"""Many adapters on one base, by name, within a budget of memory. Each row of a batch selects the
adapter that it uses.

    bank = veneer.Bank(model, capacity_bytes=2 << 30)
    bank.register("french", "adapters/french")      loaded when it is first used
    with bank.rows(["french", None, {"french": 0.7, "german": 0.3}]):
        model(x)                                    row i of every input uses entry i

In: adapter folders, and a model. Out: calls of that model in which each row uses its own adapter.
"""

from veneer.bank.bank import Bank
from veneer.bank.lease import Lease, Status

__all__ = ["Bank", "Lease", "Status"]
