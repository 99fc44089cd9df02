"""Train several adapters at once on one base: rows of one batch belong to different runs.

    runs = veneer.train_many(model, {"a": LoraConfig(rank=8), "b": LoraConfig(variant="dora")})
    losses = runs.backward({"a": (x, y), "b": (u, v)}, loss)    # the base is computed once for all

The caller passes a model, configs, and batches of each run, and gets the gradients of each run's
parameters, as a separate loop would compute them. The caller also provides each run's optimiser,
schedule, clipping, accumulation and order of the data. The step engine (``veneer/engine``) computes
the passes.

For the losses of causal language models (``causal_loss``, ``LabelLoss``), this file has a forward
of its own. It computes −log p of the labels without holding all logits at once, and runs share the
output head in it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.attach import unwrap
from veneer.config import LoraConfig
from veneer.engine import PassRequest, RandomStream, StepEngine
from veneer.engine.batches import AdapterBatch, join_batches
from veneer.errors import ConfigError, DataError, TargetError, VeneerError, raise_all
from veneer.handle import Handle, attach, load
from veneer.train.loss import LabelLosses, causal_loss, label_losses

#: a loss function: (the model's output for a run's rows, the target of the run's batch) -> scalar
Loss = Callable[[Any, Any], Tensor]


class LabelLoss(NamedTuple):
    """A loss of a causal language model that needs only the values −log p of the n labels, [n], in
    the order of the rows. ``function`` maps these values to a scalar."""

    function: Callable[[Tensor], Tensor]

    def __call__(self, losses: Tensor, target: Any) -> Tensor:
        return self.function(losses)


def train_many(
    model: nn.Module,
    configs: Mapping[str, LoraConfig | str | Path],
    *,
    seeds: int | Mapping[str, int] = 0,
    keep_going: bool = False,
) -> Runs:
    """Attach an adapter for each config and train them at once: see ``Runs``.

    Args:
        model: any module that computes each row of a batch independently of the others.
        configs: by the run's name, the configuration of a new adapter, or the path of an adapter
            folder whose training continues.
        seeds: the seed of the initial values and the dropout of a run; one for all runs, or a seed
            by name. A run computes the same numbers as a separate loop after
            ``torch.manual_seed(seed)`` and ``veneer.attach``.
        keep_going: if a run cannot begin, or its loss raises in ``Runs.backward``, put the error
            into ``Runs.failed`` instead of raising it. The run is then missing from ``Runs``, or
            from the result of ``backward``.

    Raises:
        ConfigError: the model is inside a wrapper, such as DDP.
        TargetError: runs cannot begin; it lists the problems of all. With ``keep_going``, only if
            no run can begin. The model is unchanged.
    """
    if unwrap(model) is not model:
        raise ConfigError(
            f"a {type(model).__name__} around a {type(unwrap(model)).__name__}",
            "the model itself: what wraps it sees one call of all runs",
            "pass the model inside",
        )
    runs, problems = Runs(model, keep_going), []
    try:
        for name, config in configs.items():
            try:
                if isinstance(seeds, Mapping) and name not in seeds:
                    raise ConfigError("no seed", "one for each run", f"add {name!r} to seeds")
                runs.add(name, config, seed=seeds[name] if isinstance(seeds, Mapping) else seeds)
            except VeneerError as error:
                runs.failed[name] = error
                problems.append(f"adapter {name!r}: {error}")
        if not (keep_going and len(runs)):
            raise_all(TargetError, "No run was begun", problems)
    except BaseException:
        for name in list(runs):
            runs.remove(name)
        raise
    return runs


class Runs(Mapping[str, Handle]):
    """Runs by name, each the ``Handle`` of its adapter. Pass ``runs["a"].parameters()`` to an
    optimiser.

    ``failed``: by name, the errors of runs that did not begin, and of losses that raised in the
    last ``backward``. ``engine``: the ``StepEngine`` that computes the runs.
    """

    def __init__(self, model: nn.Module, keep_going: bool = False) -> None:
        self.model, self.keep_going = model, keep_going
        self.engine = StepEngine(model)
        self.failed: dict[str, Exception] = {}
        self._handles: dict[str, Handle] = {}

    def __getitem__(self, name: str) -> Handle:
        return self._handles[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def __len__(self) -> int:
        return len(self._handles)

    def add(
        self, name: str, config: LoraConfig | str | Path, *, seed: int = 0, **start_options: Any
    ) -> Handle:
        """Add another run and return the handle of its adapter.

        Args:
            config: the configuration of a new adapter, or the path of an adapter whose training
                continues.
            seed: the seed of the run's initial values and of its dropout.
            start_options: for a new adapter, the arguments ``batches``, ``loss`` and ``original``
                of ``veneer.attach``.

        Raises:
            ConfigError: ``start_options`` are given with a path.
        """
        if start_options and not isinstance(config, LoraConfig):
            raise ConfigError(
                f"{', '.join(start_options)} for run {name!r}, which continues {str(config)!r}",
                "arguments of a new adapter, with a LoraConfig",
                "leave them out, or pass a LoraConfig",
            )
        stream = self.engine.new_stream(seed)
        with stream:
            if isinstance(config, LoraConfig):
                handle = attach(self.model, config, name, **start_options)
            else:
                handle = load(self.model, config, name=name, trainable=True)
        self._handles[name] = handle
        self.engine.add(name, handle.parameters(), stream)
        return handle

    def stream(self, name: str) -> RandomStream:
        """The random numbers of a run: a context in which torch's default generators continue the
        run's own sequence. Its attribute ``states`` holds the state of the run's generator on each
        device."""
        return self.engine.adapters[name].stream

    def restart(self, name: str, seed: int) -> None:
        """Restart the sequence of a run's random numbers, as after ``torch.manual_seed(seed)``."""
        self.stream(name).restart(seed)

    def remove(self, name: str) -> None:
        """End a run and detach its adapter, whose parameters are then lost if it was not saved."""
        self[name].detach()
        del self._handles[name]
        self.engine.remove(name)

    def backward(
        self,
        batches: Mapping[str, Any],
        loss: Loss | LabelLoss | Mapping[str, Loss | LabelLoss],
        *,
        weights: Mapping[str, float] | None = None,
    ) -> dict[str, Tensor]:
        """Add the gradients of each run's loss to its parameters, as a separate ``loss.backward()``
        does.

        Args:
            batches: by run, for all or some of the runs: ``(inputs, target)``, where inputs are a
                tensor, a tuple of positional arguments or a mapping of keyword arguments of the
                model; or a mapping of keyword arguments with the target under "labels". The first
                axis of each tensor of the inputs is the run's rows. Batches whose shapes differ
                only in the number of rows share a forward.
            loss: ``(output, target) -> scalar`` of a run's rows; one for all runs, or one by run.
                ``veneer.train.loss.causal_loss`` is the mean loss of the labels of a causal
                language model. For another loss of a causal language model pass a ``LabelLoss``.
            weights: by run, the factor by which its gradient is multiplied; by default 1.

        Returns:
            each run's loss, without its weight.

        Raises:
            DataError, ConfigError: a batch or a loss has an unsupported form. An error that a loss
                raises gets a note with the run's name.
            SelectionError: the model computes across rows of a batch, so runs cannot share a
                forward. In all these cases the gradients are unchanged.
        """
        requests = self.requests(batches, loss, weights)
        self.failed = {}
        result = self.engine.backward(requests, self.keep_going)
        self.failed = result.failures
        return {name: result.values[name] for name in batches if name in result.values}

    def requests(
        self,
        batches: Mapping[str, Any],
        loss: Loss | LabelLoss | Mapping[str, Loss | LabelLoss],
        weights: Mapping[str, float] | None = None,
    ) -> dict[str, PassRequest]:
        """Convert the arguments of ``backward`` to requests of the engine. Raises ``DataError`` and
        ``ConfigError`` as ``backward`` does."""
        weights = weights or {}
        unknown_names = [name for name in (*batches, *weights) if name not in self]
        if unknown_names:
            raise DataError(
                f"a batch or weight for {unknown_names[0]!r}",
                f"one of {', '.join(self) or 'no run'}",
                "add the run first",
            )
        loss_by_run: dict[str, Any] = {
            name: loss.get(name) if isinstance(loss, Mapping) else loss for name in batches
        }
        for name, function in loss_by_run.items():
            if not callable(function):
                raise ConfigError(
                    f"no loss for adapter {name!r}",
                    "(output, target) -> scalar for each batch",
                    "pass one for all, or one by name",
                )
        mean_loss_names = {
            name for name, function in loss_by_run.items() if function is causal_loss
        }
        causal_forward = partial(_causal_forward, mean_loss_names)
        forward_names = mean_loss_names | {
            name for name, function in loss_by_run.items() if isinstance(function, LabelLoss)
        }
        return {
            name: PassRequest(
                self.engine.read_batch(name, batch),
                loss=_mean if name in mean_loss_names else loss_by_run[name],
                forward=causal_forward if name in forward_names else None,
                weight=weights.get(name, 1.0),
            )
            for name, batch in batches.items()
        }

    def label_losses(
        self, batches: Mapping[str, Any], *, accuracy: bool = False
    ) -> dict[str, LabelLosses]:
        """Compute `veneer.train.loss.label_losses` for the batches of some runs, in shared forwards
        without gradients.

        Args:
            batches: by run, in one of the forms that ``backward`` takes, with the labels [rows,
                tokens] of a causal language model as the target.
            accuracy: whether to find out which labels are the most likely token.

        Raises:
            DataError: a batch has an unsupported form.
            SelectionError: the model computes across rows of a batch, so runs cannot share a
                forward.
        """
        return self._forward(batches, partial(_label_losses, accuracy=accuracy))

    def outputs(self, batches: Mapping[str, Any]) -> dict[str, Any]:
        """By run, the output of the model, which may be any model, for the run's batch, computed in
        shared forwards without gradients. ``batches``: as in ``backward``; targets are ignored.
        Errors are those of ``label_losses``."""
        return self._forward(batches, None)

    def _forward(self, batches: Mapping[str, Any], forward: Any) -> dict[str, Any]:
        requests = {
            name: PassRequest(self.engine.read_batch(name, batch), forward=forward)
            for name, batch in batches.items()
        }
        outputs = self.engine.forward(requests).values
        return {name: outputs[name] for name in batches}


def _causal_forward(
    mean_loss_names: set[str], model: nn.Module, batches: Mapping[str, AdapterBatch]
) -> dict[str, Tensor]:
    """By run, −log p of its n labels, [n], from one forward of all batches. If there is only one
    run, and it is in ``mean_loss_names`` (the runs whose loss is the mean over the labels), the
    value is the mean instead, which ``causal_loss`` computes with less memory."""
    if len(batches) == 1 and not mean_loss_names.isdisjoint(batches):
        ((name, batch),) = batches.items()
        return {name: causal_loss(model, {**_keyword_inputs(name, batch), "labels": batch.target})}
    return {
        name: label_losses_of_run.losses
        for name, label_losses_of_run in _label_losses(model, batches).items()
    }


def _label_losses(
    model: nn.Module, batches: Mapping[str, AdapterBatch], accuracy: bool = False
) -> dict[str, LabelLosses]:
    """By run, the ``LabelLosses`` of its batch, from one forward of all batches."""
    batches_without_labels = [
        batch._replace(kwargs=_keyword_inputs(name, batch)) for name, batch in batches.items()
    ]
    _, inputs = join_batches(batches_without_labels)
    labels = torch.cat([batch.target for batch in batches.values()])
    joined_losses = label_losses(model, {**inputs, "labels": labels}, accuracy=accuracy)
    row_label_counts = joined_losses.counts.split([batch.row_count for batch in batches.values()])
    label_counts = [int(counts_of_run.sum()) for counts_of_run in row_label_counts]
    is_correct = (
        [None] * len(row_label_counts)
        if joined_losses.right is None
        else joined_losses.right.split(label_counts)
    )
    fields_by_run = zip(
        joined_losses.losses.split(label_counts), row_label_counts, is_correct, strict=True
    )
    return {name: LabelLosses(*fields) for name, fields in zip(batches, fields_by_run, strict=True)}


def _keyword_inputs(name: str, batch: AdapterBatch) -> dict[str, Any]:
    """The keyword arguments of a language model's batch. Raises ``DataError`` for positional
    arguments or missing labels."""
    if batch.args or not isinstance(batch.target, Tensor) or len(batch.target) != batch.row_count:
        raise DataError(
            f"a batch of {name!r} without labels [{batch.row_count}, tokens]",
            "keyword arguments of the model, with labels",
            "pass input_ids and labels",
        )
    return batch.kwargs


def _mean(losses: Tensor, target: Any) -> Tensor:
    """The mean of the losses [n] of labels. A scalar is already the mean, which ``_causal_forward``
    computes for a single run, and is returned unchanged. ``target`` is not used."""
    return losses if not losses.dim() else losses.sum() / max(len(losses), 1)
