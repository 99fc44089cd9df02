"""Tools that read adapter folders and checkpoints, without training. Each task has a package or a
module of its own.

    merge_checkpoint/   merge adapters into a checkpoint on disk, tensor by tensor, so that the
                        checkpoint may be larger than the memory
    compose/            combine adapters into one: sums, truncation to a rank, merges of task
                        vectors; repair.py scales down intruder dimensions
    extract/            extract an adapter from a full fine-tune, by the SVD of each weight's change
    convert/            convert adapters between the formats of several libraries
    report/             measure one adapter, and write the numbers as an HTML page
    compare             compare two adapters: norms, angles between their subspaces
    intruders           find singular vectors of W + ΔW that resemble no singular vector of W

The inputs are folders of adapters and models. A tool that writes a folder writes it atomically, and
reports what it did and what the result lacks. Packages that write different kinds of folders do not
import each other. compare, intruders and report use compose/align.py to match the weights of
adapters.
"""

from veneer.registry import lazy_submodules

__getattr__ = lazy_submodules(
    __name__,
    ("compare", "compose", "convert", "extract", "intruders", "merge_checkpoint", "report"),
)
