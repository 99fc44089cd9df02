"""Ways to break Veneer with pytest's monkeypatch, for tests that check that tests can fail."""

from __future__ import annotations

import torch

from veneer.attach import select
from veneer.attach.merging import stored_weights
from veneer.attach.rows import select_rows
from veneer.bank.batch_state import BatchState


def unmerge_loses_a_bit(patch):
    original = stored_weights.backup_of

    def corrupt_backup(weight):
        for tensor in original(weight).values():
            tensor.view(torch.uint8).view(-1)[0] ^= 1
        return original(weight)

    patch.setattr(stored_weights, "backup_of", corrupt_backup)


def first_row_decides(patch):
    patch.setattr(
        select,
        "by_rows",
        lambda model, group, names: select_rows.by_rows(model, group, [names[0]] * len(names)),
    )


def first_row_decides_for_a_bank(patch):
    original = BatchState.use
    patch.setattr(BatchState, "use", lambda self, uses: original(self, (uses[0],) * len(uses)))
