"""Train several adapters at once on one base: rows of one batch belong to different runs.

    runs = veneer.train_many(model, {"a": LoraConfig(rank=8), "b": LoraConfig(variant="dora")})
    losses = runs.backward({"a": (x, y), "b": (u, v)}, loss)    # the base is computed once for all

In: a model, configs, and batches of each run. Out: gradients of each run's own parameters, as its
own loop would compute them. The caller provides optimisers, schedules, clipping, accumulation and
the order of data for each run.
"""

from veneer.train.many.runs import LabelLoss, Runs, train_many

__all__ = ["LabelLoss", "Runs", "train_many"]
