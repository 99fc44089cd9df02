"""What is made of adapter folders and checkpoints without training: one room a task.

    merge_checkpoint/   adapters into a checkpoint on disk, tensor by tensor, whatever its size
    compose/            one adapter out of several: sums, a lower rank, task vectors
    extract/            an adapter out of a full fine-tune, by the SVD of its change
    convert/            an adapter from one library's format to another's
    compare             two adapters side by side: norms, angles between their subspaces

In: folders (of adapters, of models). Out: a folder written in one step, and a report of what was done and lost. The
rooms do not know each other.
"""
