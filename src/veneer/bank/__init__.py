"""Many adapters on one base model, by name, within a memory limit. Each row of a batch selects the
adapter that it uses.

    bank = veneer.Bank(model, capacity_bytes=2 << 30)
    bank.register("french", "adapters/french")      loaded when it is first used
    with bank.rows(["french", None, {"french": 0.7, "german": 0.3}]):
        model(x)                                    row i of x uses entry i: an adapter, the base
                                                    alone (None), or a weighted blend
"""

from veneer.bank.bank import Bank
from veneer.bank.lease import Lease, Status

__all__ = ["Bank", "Lease", "Status"]
