"""Train several runs on one base at once. This module has the arithmetic of the service; clients
and queues are elsewhere.

    passes of several runs ─ rows of similar length ─> one forward and backward of the base
                           ─> log-probabilities, gradients

A ``Pass`` is a forward, and a backward if requested, of one run over data of any number and length.
``compute`` takes rows of several passes, padded on the right to the longest; padding on the right
does not affect a causal model. The step engine (``veneer/engine``) computes them. If a run fails,
its gradients are restored and the others go on.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from veneer.adapter_files.number_checks import MAX_MAGNITUDE
from veneer.attach import changes, need_adapters
from veneer.config import LoraConfig
from veneer.engine import PassResult, TrainedAdapter, isolate_failures
from veneer.engine.gradients import (
    Gradients,
    add_earlier,
    largest_magnitude,
    present_gradients,
    restore_gradients,
    take_gradients,
    wide_norms,
)
from veneer.engine.optimizer_state import load_optimizer_tensors, optimizer_tensors
from veneer.errors import DataError, TrainingError
from veneer.fileio.atomic import EVERYTHING, new_folder
from veneer.formats._base import read_tensors
from veneer.handle import Handle
from veneer.serve.scheduler import fit_budget
from veneer.serve.training.losses import LOSSES, Datum
from veneer.train.many import LabelLoss, Runs
from veneer.train.tokens import IGNORED

#: the most tokens in a batch, on a CPU and on a device; samples wait while a batch is computed
TOKENS, DEVICE_TOKENS = 512, 8192
ADAPTER, OPTIMIZER = "adapter", "optimizer.safetensors"
#: bounds of the learning rate and of epsilon: beyond them, weights overflow sooner or later
MOST_RATE, LEAST_EPS = 10.0, 1e-20
#: the largest value of a gradient: AdamW stores squares, and float32 overflows above 3e38
MOST_GRADIENT = 1e18


class DivergenceError(TrainingError):
    """A step made the weights of a run too large for an adapter folder. The run needs a checkpoint
    to continue."""


class Turn:
    """Fair lock for two threads: the thread that has waited longest goes next."""

    def __init__(self) -> None:
        self._next = threading.Lock()
        self._now = threading.Lock()

    def __enter__(self) -> None:
        with self._next:
            self._now.acquire()

    def __exit__(self, *_: object) -> None:
        self._now.release()


@dataclass(frozen=True)
class Product:
    """Indices of the two factors of a weight's change among a run's parameters, and its scale."""

    A: int
    B: int
    scale: float


@dataclass(frozen=True)
class Adam:
    """The settings of one step of torch's AdamW. ``clip``: the largest norm of the gradient; 0 for
    no limit."""

    rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    decay: float = 0.0
    clip: float = 0.0

    def check(self) -> None:
        bounds = (
            ("learning_rate", self.rate, 0.0, MOST_RATE),
            ("beta1", self.beta1, 0.0, 1 - 1e-9),
            ("beta2", self.beta2, 0.0, 1 - 1e-9),
            ("eps", self.eps, LEAST_EPS, 1.0),
            ("weight_decay × learning_rate", self.decay * self.rate, 0.0, 1.0),
            ("grad_clip_norm", self.clip, 0.0, math.inf),
        )
        for name, value, least, most in bounds:
            if not least <= value <= most or math.isinf(value):
                raise DataError(
                    f"{name} {value:g}", f"a number from {least:g} to {most:g}", "change it"
                )


@dataclass(eq=False)
class Pass:
    """A forward of a run over some data, and a backward unless ``backward`` is False. ``left``:
    indices of data that are not computed yet, the longest first. ``logprobs``: of each datum's
    targets, as they become known. ``earlier_gradients``: of the run, from earlier passes."""

    run: str
    data: Sequence[Datum]
    loss: str
    settings: Mapping[str, float] = field(default_factory=dict)
    backward: bool = True
    owner: str = ""
    total: float = 0.0
    error: Exception | None = None
    remaining: list[int] = field(init=False)
    logprobs: list[Tensor | None] = field(init=False)
    earlier_gradients: Gradients | None = None

    def __post_init__(self) -> None:
        self.remaining = sorted(
            range(len(self.data)), key=lambda index: -len(self.data[index].tokens)
        )
        self.logprobs = [None] * len(self.data)

    @property
    def over(self) -> bool:
        return not self.remaining or self.error is not None


#: for each run in a batch, indices of its data
Rows = Mapping[str, Sequence[int]]


class Trainer:
    """Runs on one base by name. Only one thread may call it. ``turn``: a lock that is held while
    the model is called or its layers are changed. ``model`` is in eval mode."""

    def __init__(
        self, model: nn.Module, bank: Any, turn: AbstractContextManager[Any] | None = None
    ) -> None:
        self.model, self._bank, self._turn = model, bank, nullcontext() if turn is None else turn
        self.runs = Runs(model)
        self.engine = self.runs.engine
        self.device = next(model.parameters()).device
        self.tokens = TOKENS if self.device.type == "cpu" else DEVICE_TOKENS
        self._products: dict[str, list[Product]] = {}

    def begin(self, run: str, config: LoraConfig, seed: int) -> None:
        """Create a run. ``TargetError``: the config does not fit the base."""
        with self._turn:
            self._add_optimizer(run, self.runs.add(run, config, seed=seed))

    def _add_optimizer(self, run: str, handle: Handle) -> None:
        adapter = self.engine.adapters[run]
        adapter.optimizer = torch.optim.AdamW(adapter.parameters, foreach=True)
        indices = {id(parameter): index for index, parameter in enumerate(adapter.parameters)}
        self._products[run] = []
        for *_, change in changes(self.model, run):
            A, B = (indices.get(id(change.adapter_parameters.get(name))) for name in "AB")
            if A is not None and B is not None:
                self._products[run].append(Product(A, B, change.scale))

    def end(self, run: str) -> None:
        """Free the memory of a run."""
        with self._turn:
            self.runs.remove(run)
        del self._products[run]

    def pending(self, run: str) -> bool:
        """Whether a run has gradients that no step has used."""
        return self.engine.adapters[run].has_gradients

    def compute(self, passes: Sequence[Pass]) -> int:
        """Compute rows of some passes, of different runs, as many as fit into one batch; at least
        one of the first pass. Returns their number of tokens."""
        passes = [
            training_pass
            for training_pass in passes
            if training_pass.backward == passes[0].backward
        ]
        rows = self._choose_rows(passes)
        chosen = [training_pass for training_pass in passes if training_pass.run in rows]
        if passes[0].backward:
            for training_pass in chosen:
                if training_pass.earlier_gradients is None:
                    parameters = self._parameters(training_pass.run)
                    training_pass.earlier_gradients = take_gradients(parameters)
        passes_by_run = {training_pass.run: training_pass for training_pass in chosen}
        result = isolate_failures(partial(self._run_passes, rows), passes_by_run)
        for training_pass in chosen:
            run = training_pass.run
            training_pass.error = result.failures.get(run)
            if training_pass.error is None:
                training_pass.total += float(result.values[run])
            computed = set(rows[run])
            training_pass.remaining = [
                index for index in training_pass.remaining if index not in computed
            ]
            if training_pass.over:
                self._finish(training_pass)
        return sum(
            len(training_pass.data[index].tokens)
            for training_pass in chosen
            for index in rows[training_pass.run]
        )

    def _choose_rows(self, passes: Sequence[Pass]) -> dict[str, list[int]]:
        """By run, the indices of the data in the next batch: the longest of each pass first, within
        the budget of tokens."""
        order = [
            (training_pass, rank)
            for rank in range(max(len(training_pass.remaining) for training_pass in passes))
            for training_pass in passes
            if rank < len(training_pass.remaining)
        ]
        lengths = [
            len(training_pass.data[training_pass.remaining[rank]].tokens)
            for training_pass, rank in order
        ]
        rows: dict[str, list[int]] = {}
        for position in fit_budget(lengths, self.tokens):
            training_pass, rank = order[position]
            rows.setdefault(training_pass.run, []).append(training_pass.remaining[rank])
        return rows

    def _run_passes(self, rows: Rows, passes: Mapping[str, Pass], keep_going: bool) -> PassResult:
        """One forward of rows of these passes, and backward."""
        batches: dict[str, Any] = {}
        losses: dict[str, Any] = {}
        width = max(len(passes[run].data[index].tokens) for run in passes for index in rows[run])
        for run, training_pass in passes.items():
            indices = rows[run]
            ids, labels = self._pad(training_pass, indices, width)
            if all(training_pass.data[index].targets.dim() == 1 for index in indices):
                batches[run] = {"input_ids": ids, "labels": labels}
                losses[run] = LabelLoss(partial(_loss_of_labels, training_pass, indices))
            else:
                batches[run] = {"input_ids": ids}, None
                losses[run] = partial(_loss_of_logits, training_pass, indices)
        requests = self.runs.build_requests(batches, losses)
        backward = next(iter(passes.values())).backward
        run_pass = self.engine.backward if backward else self.engine.forward
        with self._turn:
            return run_pass(requests, keep_going)

    def _pad(
        self, training_pass: Pass, indices: Sequence[int], width: int
    ) -> tuple[Tensor, Tensor]:
        """Tokens and labels [rows, width + 1]. A label stands at its own token, one column after
        the logits that predict it."""
        ids = torch.zeros(len(indices), width + 1, dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        for row, index in enumerate(indices):
            datum = training_pass.data[index]
            size = len(datum.tokens)
            ids[row, :size] = datum.tokens
            if datum.targets.dim() == 1:
                labels[row, 1 : size + 1] = datum.targets
        return ids.to(self.device), labels.to(self.device)

    def _parameters(self, run: str) -> list[nn.Parameter]:
        return self.engine.adapters[run].parameters

    def _finish(self, training_pass: Pass) -> None:
        """Add the gradients of a pass to those of earlier passes. If it failed or the sum is out of
        bounds, restore the earlier ones."""
        earlier = training_pass.earlier_gradients
        if earlier is None:
            return
        parameters = self._parameters(training_pass.run)
        if training_pass.error is None:
            add_earlier(parameters, earlier)
            largest = largest_magnitude(present_gradients(parameters))
            if not largest <= MOST_GRADIENT:  # also true for NaN
                training_pass.error = TrainingError(
                    f"a gradient of up to {largest:.3g}",
                    f"numbers of at most {MOST_GRADIENT:g}",
                    "look at the data and their weights",
                )
        if training_pass.error is not None:
            restore_gradients(parameters, earlier)
        training_pass.earlier_gradients = None

    def step(self, run: str, adam: Adam) -> dict[str, float]:
        """A step of AdamW along the gradients of the passes since the last step.

        Raises:
            DataError: settings with which weights would overflow; nothing has changed.
            DivergenceError: after the step, no adapter folder can hold the weights.
        """
        adam.check()
        adapter = self.engine.adapters[run]
        norm = adapter.clip(adam.clip, wide=True)
        _adamw(adapter).param_groups[0].update(
            lr=adam.rate, betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=adam.decay
        )
        with self._turn:  # samples use a copy of the adapter, but the same base
            adapter.step()
        self._check_bounds(run)
        return {"unclipped_grad_l2:mean": norm}

    def _check_bounds(self, run: str) -> None:
        """``DivergenceError``: a run's weights exceed the bound of ``adapter_files.folder``."""
        parameters = self._parameters(run)
        norms = wide_norms(parameters)
        sizes = [abs(pair.scale) * norms[pair.A] * norms[pair.B] for pair in self._products[run]]
        # no value exceeds the norm of its tensor, so values are rarely compared one by one
        within = all(norm <= MAX_MAGNITUDE for norm in norms)
        sizes.append(0.0 if within else largest_magnitude(parameters))
        # ``not <=`` is also true for NaN
        worst = next((size for size in sizes if not size <= MAX_MAGNITUDE), None)
        if worst is not None:
            raise DivergenceError(
                f"a run that diverged: a step made numbers of up to {worst:.3g}",
                f"weights, and changes of weights, of at most {MAX_MAGNITUDE:g}",
                "load a checkpoint into it and go on with a smaller learning rate, or begin a new "
                "run",
            )

    def save(
        self,
        run: str,
        folder: Path,
        base: str | None,
        provenance: Mapping[str, Any] | None = None,
        check: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        """Write the adapter and its optimiser as one folder, replacing an existing one. If
        ``check`` raises an error for the new folder, nothing is replaced."""
        names = [name for name, _ in self.runs[run].named_parameters()]
        tensors = optimizer_tensors(_adamw(self.engine.adapters[run]), names)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder, overwrite=True, replaces=[EVERYTHING]) as temporary:
            self.runs[run].save(temporary / ADAPTER, base_name=base, provenance=provenance)
            save_file(tensors, temporary / OPTIMIZER)
            check(temporary)

    def load(self, run: str, folder: Path, *, optimizer: bool, adapter: str = ADAPTER) -> None:
        """Replace a run by a saved one. ``adapter``: the path of its adapter in the folder.
        ``AdapterError``: there is no adapter, and the run is unchanged."""
        with self._turn:
            if run in self.runs:  # load it under another name first: this may fail
                self.runs.add(f"{run}-new", folder / adapter)
                self.runs.remove(f"{run}-new")
            tensors = read_tensors(folder / OPTIMIZER)[0] if optimizer else {}
            if run in self.runs:
                self.runs.remove(run)
            handle = self.runs.add(run, folder / adapter)
        _widen(handle)
        self._add_optimizer(run, handle)
        if tensors:
            names = [name for name, _ in handle.named_parameters()]
            load_optimizer_tensors(_adamw(self.engine.adapters[run]), names, tensors)

    def export(
        self, run: str, folder: Path, base: str | None, provenance: Mapping[str, Any] | None = None
    ) -> None:
        """Write the adapter without its optimiser, replacing an existing folder."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.runs[run].save(folder, base_name=base, provenance=provenance, overwrite=True)

    @contextmanager
    def sampling(self, leases: Sequence[Any]) -> Iterator[nn.Module]:
        """A block in which row i of the model's input uses the adapter of the bank's lease
        ``leases[i]``; None is the base. The adapters must be in memory already: a load within the
        block could wait for memory whose holders wait for this thread's turn."""
        with self._turn, torch.inference_mode(), self._bank.rows(leases):
            yield self.model


def _adamw(adapter: TrainedAdapter) -> torch.optim.Optimizer:
    assert adapter.optimizer is not None
    return adapter.optimizer


def _loss_of_labels(training_pass: Pass, indices: Sequence[int], losses: Tensor) -> Tensor:
    """The loss with one target per token. ``losses``: −log p of the targets of all rows, joined."""
    sizes = [len(training_pass.data[index].tokens) for index in indices]
    return _sum_losses(training_pass, indices, (-losses).split(sizes))


def _loss_of_logits(
    training_pass: Pass, indices: Sequence[int], output: Any, target: Any
) -> Tensor:
    """The loss with several targets per token."""
    logprobs = []
    for logits, index in zip(output.logits, indices, strict=True):
        targets = training_pass.data[index].targets.to(logits.device)
        wide = logits[: len(targets)].to(torch.promote_types(logits.dtype, torch.float32))
        target_logits = wide.gather(-1, targets.view(len(targets), -1))
        row_logprobs = target_logits - wide.logsumexp(-1, keepdim=True)
        logprobs.append(row_logprobs.view(targets.shape))
    return _sum_losses(training_pass, indices, logprobs)


def _sum_losses(training_pass: Pass, indices: Sequence[int], logprobs: Sequence[Tensor]) -> Tensor:
    """The loss of these rows. Their log-probabilities are stored in the pass for the answer."""
    total, loss = None, LOSSES[training_pass.loss]
    for index, row_logprobs in zip(indices, logprobs, strict=True):
        inputs = {
            name: values.to(row_logprobs.device)
            for name, values in training_pass.data[index].inputs.items()
        }
        value = loss.terms(row_logprobs, inputs, training_pass.settings).sum()
        training_pass.logprobs[index] = row_logprobs.detach().float().cpu()
        total = value if total is None else total + value
    assert total is not None
    if not torch.isfinite(total):
        do = "look at the data and the learning rate, and go on from a checkpoint"
        raise TrainingError(
            f"a {training_pass.loss} loss of {float(total.detach())}", "a finite number", do
        )
    return total


def _widen(handle: Handle) -> None:
    """Let an adapter that was saved in 16 bits train in float32: a step of usual size is lost in
    16-bit rounding."""
    if handle.config.dtype not in ("bfloat16", "float16"):
        return
    for parameter in handle.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    configs = need_adapters(handle.model, handle.name).configs
    configs[handle.name] = replace(handle.config, dtype="float32")
