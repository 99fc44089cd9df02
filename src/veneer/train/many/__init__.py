"""Train several adapters at once on one base: rows of one batch belong to different runs.

    runs = veneer.train_many(model, {"a": LoraConfig(rank=8), "b": LoraConfig(variant="dora")})
    losses = runs.backward({"a": (x, y), "b": (u, v)}, loss)    # the base is computed once for all

The caller passes a model, configs, and batches of each run, and gets the gradients of each run's
parameters, as a separate loop would compute them. The caller also provides each run's optimiser,
schedule, clipping, accumulation and order of the data.
"""

from veneer.train.many.runs import LabelLoss, Runs, train_many

__all__ = ["LabelLoss", "Runs", "train_many"]
