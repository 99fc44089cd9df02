"""Tools for adapter folders and checkpoints that work without training, one package for each task.

    merge_checkpoint/   merge adapters into a checkpoint on disk, tensor by tensor, whatever its
                        size
    compose/            one adapter out of several: sums, a lower rank, task vectors; and repair
    extract/            an adapter from a full fine-tune, by the SVD of its change
    convert/            adapters between the formats of several libraries
    report/             examine one adapter, as numbers and as an HTML page
    compare             compare two adapters: norms, angles between their subspaces
    intruders           singular directions of W + ΔW that resemble none of W

Inputs are folders of adapters and models. The output is a folder, written atomically, and a report
of what was done and lost. Packages that write different kinds of folders do not import each other;
compare, intruders and report align weights as compose does.
"""

from veneer.registry import lazy_submodules

__getattr__ = lazy_submodules(
    __name__,
    ("compare", "compose", "convert", "extract", "intruders", "merge_checkpoint", "report"),
)
