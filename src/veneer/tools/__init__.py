"""What is made of adapter folders and checkpoints without training: one room a task.

    merge_checkpoint/   adapters into a checkpoint on disk, tensor by tensor, whatever its size
    compose/            one adapter out of several: sums, a lower rank, task vectors; a repaired one
    extract/            an adapter out of a full fine-tune, by the SVD of its change
    convert/            an adapter from one library's format to another's
    report/             a look inside an adapter, as numbers and as a page: ranks, where it changed what, forgetting
    compare             two adapters side by side: norms, angles between their subspaces
    intruders           directions of W + ΔW that W has none like

In: folders (of adapters, of models). Out: a folder written in one step, and a report of what was
done and lost. Rooms that write folders of different kinds do not know each other; compare,
intruders and report line weights up as compose does.
"""

from veneer.registry import lazy_submodules

__getattr__ = lazy_submodules(
    __name__,
    ("compare", "compose", "convert", "extract", "intruders", "merge_checkpoint", "report"),
)
