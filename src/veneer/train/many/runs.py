"""``train_many`` and ``Runs``: gradients of several adapters from one forward and one backward of
their base.

    Σ losses ─ backward ─> the base's products once for all rows, each adapter's thin products on
    its own rows

What is a run's alone: its adapter (any variant, rank, dtype), its random numbers (``streams.py``),
its rows and its loss. What is common: the base's forward and backward, a causal model's head.
Batches that differ in shape do not share a forward, so what a run computes never depends on the
others: padding, chosen by the longest, would change what dropout draws.

Rejected: the sum of the losses as one function of the joined output (a mean over rows would mix the
runs); a copy of the model for each run.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer import context
from veneer.attach.blend import same_weights
from veneer.attach.lookup import need_adapters, unwrap
from veneer.attach.select_rows import Parts, time_first
from veneer.attach.state import ActiveAdapter
from veneer.config import LoraConfig
from veneer.errors import (
    ConfigError,
    DataError,
    SelectionError,
    TargetError,
    VeneerError,
    raise_all,
)
from veneer.handle import Handle, attach, load
from veneer.train.loss import LabelLosses, causal_loss, label_losses
from veneer.train.many.shared_batch import Batch, join, read, split, try_rows
from veneer.train.many.streams import OwnDropout, Stream, dropouts, generators, same, states

#: (a run's rows of the output, its target) -> scalar
Loss = Callable[[Any, Any], Tensor]
#: how many ways to put runs into one batch are kept
SHARED = 64


class LabelLoss(NamedTuple):
    """A loss of a causal language model that reads no more of it than −log p of each label, [n],
    row after row: ``function`` makes the scalar of these."""

    function: Callable[[Tensor], Tensor]


def train_many(
    model: nn.Module,
    configs: Mapping[str, LoraConfig | str | Path],
    *,
    seeds: int | Mapping[str, int] = 0,
    keep_going: bool = False,
) -> Runs:
    """Attach an adapter for each config, to be trained at once: see ``Runs``.

    Args:
        model: any module that treats the rows of a batch alike whoever else is in it.
        configs: by the run's name; a path is an adapter folder to be trained further.
        seeds: of a run's start and dropout, one for all or by name. A run is that of
            ``torch.manual_seed(seed)``, ``veneer.attach`` and a loop of its own.
        keep_going: leave runs out that cannot begin, and losses that raise; ``Runs.failed`` has
            their errors.

    Raises:
        TargetError: with every problem of every config. The model is as it was.
    """
    if unwrap(model) is not model:
        found = f"a {type(model).__name__} around a {type(unwrap(model)).__name__}"
        raise ConfigError(
            found,
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
    """Runs by name, each the ``Handle`` of its adapter: ``runs["a"].parameters()`` go to an
    optimiser.

    ``failed``: the errors of runs that did not begin, and of losses that raised in the last
    ``backward``.
    """

    def __init__(self, model: nn.Module, keep_going: bool = False) -> None:
        self.model, self.keep_going = model, keep_going
        self.failed: dict[str, Exception] = {}
        self._handles: dict[str, Handle] = {}
        self._streams: dict[str, Stream] = {}
        # what takes a walk through the model is asked once
        self._parameters: dict[str, list[nn.Parameter]] = {}
        self._devices, self._dropouts = generators(model), dropouts(model)
        self._time_first = time_first(model)
        # keys and values would be kept of all rows
        self._defaults = (
            {"use_cache": False}
            if "use_cache" in inspect.signature(model.forward).parameters
            else {}
        )
        self._tried: set[Any] = set()
        self._shared: dict[Any, tuple[Any, Parts]] = {}

    def __getitem__(self, name: str) -> Handle:
        return self._handles[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def __len__(self) -> int:
        return len(self._handles)

    def add(
        self, name: str, config: LoraConfig | str | Path, *, seed: int = 0, **start: Any
    ) -> Handle:
        """Let another run join. ``start``: ``batches``, ``loss`` and ``original`` of
        ``veneer.attach``."""
        stream = Stream(seed, self._devices)
        with stream:
            if isinstance(config, LoraConfig):
                handle = attach(self.model, config, name, **start)
            else:
                handle = load(self.model, config, name=name, trainable=True, **start)
        self._handles[name], self._streams[name], self._parameters[name] = (
            handle,
            stream,
            handle.parameters(),
        )
        return handle

    def stream(self, name: str) -> Stream:
        """The random numbers of a run: a block in which torch's default generators are its own, and
        ``own``, where they have come to."""
        return self._streams[name]

    def restart(self, name: str, seed: int) -> None:
        """Let a run's random numbers begin again, as ``torch.manual_seed(seed)`` does."""
        self.stream(name).own = Stream(seed, self._devices).own

    def remove(self, name: str) -> None:
        """Let a run end: its adapter is detached. Save it first."""
        self[name].detach()
        del self._handles[name], self._streams[name], self._parameters[name]
        self._shared.clear()

    def backward(
        self,
        batches: Mapping[str, Any],
        loss: Loss | LabelLoss | Mapping[str, Loss | LabelLoss],
        *,
        weights: Mapping[str, float] | None = None,
    ) -> dict[str, Tensor]:
        """Add the gradients of each run's loss to its parameters, as ``loss.backward()`` of its own
        would.

        Args:
            batches: by run, any of them: ``(inputs, target)``, with inputs a tensor, a tuple of
                positional or a mapping of keyword arguments of the model; or a mapping of these
                with "labels", the target. All tensors of the inputs hold the run's rows along their
                first axis. Those of equal shapes but for the rows share a forward.
            loss: ``(output, target) -> scalar`` of the run's own rows, or one by run.
                ``veneer.train.loss.causal_loss`` stands for the mean loss a label of a causal
                language model, a ``LabelLoss`` for any other of them.
            weights: a factor of each run's gradient; 1 without.

        Returns:
            each run's loss, without its weight.

        Raises:
            DataError, ConfigError: a batch or a loss that is none. What a loss raises, with a note
                of the run's name.
            SelectionError: the model mixes rows. In each of these cases no gradient has changed.
        """
        unknown = [name for name in (*batches, *(weights or ())) if name not in self]
        if unknown:
            found = f"a batch or weight for {unknown[0]!r}"
            raise DataError(found, f"one of {', '.join(self) or 'no run'}", "add the run first")
        losses: dict[str, Any] = {
            name: loss.get(name) if isinstance(loss, Mapping) else loss for name in batches
        }
        if lacking := [
            name
            for name, own in losses.items()
            if not (callable(own) or isinstance(own, LabelLoss))
        ]:
            found = f"no loss for adapter {lacking[0]!r}"
            raise ConfigError(
                found,
                "(output, target) -> scalar for each batch",
                "pass one for all, or one by name",
            )
        groups: dict[Any, dict[str, Batch]] = {}
        for name, batch in batches.items():
            own = read(name, batch, self._defaults)
            groups.setdefault((_of_labels(losses[name]), own.like), {})[name] = own
        self.failed = {}
        before = self._take_gradients(batches)
        results: dict[str, Tensor] = {}
        try:
            for (causal, _), group in groups.items():
                results |= self._together(group, losses, weights or {}, causal)
        except BaseException:
            for parameter, gradient in before:
                parameter.grad = gradient
            raise
        for parameter, gradient in before:
            if gradient is not None:
                parameter.grad = (
                    gradient if parameter.grad is None else gradient.add_(parameter.grad)
                )
        return {name: results[name] for name in batches if name in results}

    def _take_gradients(self, names: Mapping[str, Any]) -> list[tuple[nn.Parameter, Tensor | None]]:
        """What the parameters of these have as gradients, which is gone from them."""
        found = []
        for name in names:
            for parameter in self._parameters[name]:
                found.append((parameter, parameter.grad))
                parameter.grad = None
        return found

    def _together(
        self,
        group: dict[str, Batch],
        losses: Mapping[str, Any],
        weights: Mapping[str, float],
        causal: bool,
    ) -> dict[str, Tensor]:
        """Forward and backward of runs whose batches share a forward."""
        with ExitStack() as stack:
            chosen, dropout = self._chosen(group)
            stack.enter_context(context.changed(chosen))
            if len(group) == 1:
                stack.enter_context(self._streams[next(iter(group))])
            outside = states(self._devices)
            with dropout:
                found = self._causal(group, losses) if causal else self._own(group, losses)
            if len(group) > 1 and not same(outside, states(self._devices)):
                names = ", ".join(map(repr, group))
                drawn = f"random numbers that the base drew for rows of {names} together"
                do = "set its own dropout to 0, or its modules to eval()"
                raise SelectionError(drawn, "numbers of each run's own", do)
            if found:
                factors = [
                    torch.full_like(value, weights.get(name, 1.0)) for name, value in found.items()
                ]
                torch.autograd.backward(list(found.values()), factors)
        return {name: value.detach() for name, value in found.items()}

    def _chosen(self, group: Mapping[str, Batch]) -> tuple[dict[str, ActiveAdapter], Any]:
        """What a call of these rows selects, and a block for the base's own dropout in it."""
        attached = need_adapters(self.model, walk=False)
        selections = [attached.selections[name] for name in group]
        if len(group) == 1:
            (name,) = group
            return {
                attached.uid: dataclasses.replace(selections[0], stream=self._streams[name])
            }, nullcontext()
        key = tuple((name, batch.rows) for name, batch in group.items())
        # what each layer does with these rows is worked out in the first call, and kept while the
        # adapters stay
        before, parts = self._shared.get(key, (None, None))
        if parts is None or before != selections:
            own = [
                dataclasses.replace(one, stream=self._streams[name])
                for name, one in zip(group, selections, strict=True)
            ]
            rows = torch.arange(sum(batch.rows for batch in group.values()), device="cpu")
            split_ = rows.split([batch.rows for batch in group.values()])
            parts = Parts(attached.uid, own, split_, len(rows), self._time_first)
            if len(self._shared) >= SHARED:
                self._shared.clear()
            self._shared[key] = selections, parts
        selected = {attached.uid: ActiveAdapter(None, parts, same_weights(parts.selections))}
        return selected, OwnDropout(parts) if self._may_drop() else nullcontext()

    def _may_drop(self) -> bool:
        """Whether the base has dropout of its own now."""
        return any(module.training and getattr(module, key) > 0 for module, key in self._dropouts)

    def _own(self, group: Mapping[str, Batch], losses: Mapping[str, Any]) -> dict[str, Tensor]:
        """Each run's loss of its rows of the output."""
        outputs = self._outputs(group)
        return self._each(
            {name: (losses[name], (outputs[name], batch.target)) for name, batch in group.items()}
        )

    def _outputs(self, group: Mapping[str, Batch]) -> dict[str, Any]:
        """Each run's rows of the output."""
        self._try_rows(group)
        args, kwargs = join(list(group.values()))
        output = self.model(*args, **kwargs)
        sizes = [batch.rows for batch in group.values()]
        return dict(zip(group, [output] if len(group) == 1 else split(output, sizes), strict=True))

    def _causal(self, group: Mapping[str, Batch], losses: Mapping[str, Any]) -> dict[str, Tensor]:
        """Each run's loss of its labels."""
        if len(group) == 1:
            ((name, batch),) = group.items()
            if losses[name] is causal_loss:
                return {
                    name: causal_loss(self.model, {**_named(name, batch), "labels": batch.target})
                }
        told = self._told(group)
        own = {
            name: losses[name] if isinstance(losses[name], LabelLoss) else _MEAN for name in group
        }
        return self._each({name: (own[name].function, (told[name].losses,)) for name in group})

    def _told(self, group: Mapping[str, Batch], accuracy: bool = False) -> dict[str, LabelLosses]:
        """−log p of each run's labels."""
        self._try_rows(group)
        _, inputs = join(
            [batch._replace(kwargs=_named(name, batch)) for name, batch in group.items()]
        )
        labels = torch.cat([batch.target for batch in group.values()])
        told = label_losses(self.model, {**inputs, "labels": labels}, accuracy=accuracy)
        counts = told.counts.split([batch.rows for batch in group.values()])
        sizes = [int(own.sum()) for own in counts]
        right = [None] * len(sizes) if told.right is None else told.right.split(sizes)
        own = zip(told.losses.split(sizes), counts, right, strict=True)
        return {name: LabelLosses(*parts) for name, parts in zip(group, own, strict=True)}

    def _each(
        self, calls: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]]
    ) -> dict[str, Tensor]:
        """The losses that these calls make, by run; with ``keep_going`` of those that make one."""
        found = {}
        for name, (function, args) in calls.items():
            try:
                value = function(*args)
                if not isinstance(value, Tensor) or value.dim() or not value.requires_grad:
                    shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    what = f"loss {shape} of adapter {name!r}"
                    raise ConfigError(what, "a scalar with a gradient", "return a mean or a sum")
            except Exception as error:
                error.add_note(f"in the loss of adapter {name!r}")
                if not self.keep_going:
                    raise
                self.failed[name] = error
                continue
            found[name] = value
        return found

    def label_losses(
        self, batches: Mapping[str, Any], *, accuracy: bool = False
    ) -> dict[str, LabelLosses]:
        """What `veneer.train.loss.label_losses` says of some runs' batches, in shared forwards
        without gradients.

        Args:
            batches: by run, as ``backward`` takes them of a causal language model.

        Raises:
            DataError: a batch that is none. SelectionError: the model mixes rows.
        """
        return self._forward(batches, partial(self._told, accuracy=accuracy))

    def outputs(self, batches: Mapping[str, Any]) -> dict[str, Any]:
        """What the model makes of some runs' batches, each its own rows, in shared forwards without
        gradients. Takes and raises what ``label_losses`` does, of any model."""
        return self._forward(batches, self._outputs)

    def _forward(
        self, batches: Mapping[str, Any], call: Callable[[dict[str, Batch]], Mapping[str, Any]]
    ) -> dict[str, Any]:
        groups: dict[Any, dict[str, Batch]] = {}
        for name, batch in batches.items():
            own = read(name, batch, self._defaults)
            groups.setdefault(own.like, {})[name] = own
        found: dict[str, Any] = {}
        for group in groups.values():
            chosen, dropout = self._chosen(group)
            with torch.no_grad(), context.changed(chosen), dropout:
                found |= call(group)
        return {name: found[name] for name in batches}

    def _try_rows(self, group: Mapping[str, Batch]) -> None:
        """Once for batches of this structure."""
        first = next(iter(group.values()))
        key = len(first.args), *first.kwargs
        if len(group) > 1 and key not in self._tried:
            some = list(group.values())[:2]  # another run's rows beside those of the first
            try_rows(self.model, need_adapters(self.model, walk=False).uid, some)
            self._tried.add(key)


def _named(name: str, batch: Batch) -> dict[str, Any]:
    """The keyword arguments of a batch of a language model."""
    if batch.args or not isinstance(batch.target, Tensor) or len(batch.target) != batch.rows:
        found = f"a batch of {name!r} without labels [{batch.rows}, tokens]"
        raise DataError(
            found, "keyword arguments of the model, with labels", "pass input_ids and labels"
        )
    return batch.kwargs


_MEAN = LabelLoss(lambda told: told.sum() / max(len(told), 1))


def _of_labels(loss: Any) -> bool:
    return loss is causal_loss or isinstance(loss, LabelLoss)
