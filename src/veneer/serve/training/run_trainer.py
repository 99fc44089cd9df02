"""Train several runs on one base at once: forward and backward passes, optimizer steps, loading and
saving. Clients, queues and the disk's index are in other files.

    passes of several runs ─ data of similar length ─> one forward and backward of the base
                           ─> log-probabilities, gradients

A ``Pass`` is a forward, and a backward if requested, of one run over any number of data of any
length. Each datum becomes one row of a batch. ``compute`` pads the rows on the right to the longest
row, which does not affect a causal model. The step engine (``veneer/engine``) computes the batch.
If the pass of a run fails, for example because a gradient is not finite, the run gets back the
gradients that it had before the pass, and the other runs continue.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
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
    add_earlier_gradients,
    largest_magnitude,
    norms_in_float64,
    present_gradients,
    restore_gradients,
    take_gradients,
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

#: the largest number of tokens in a batch, with padding, on a CPU and on a GPU. Samples wait while
#: a batch is computed, so batches are small.
CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 512, 8192
#: names within a checkpoint's folder: the adapter folder, and the file of the optimizer's state
ADAPTER, OPTIMIZER = "adapter", "optimizer.safetensors"
#: the largest learning rate and the smallest epsilon: beyond these bounds, weights may overflow
MAX_LEARNING_RATE, MIN_EPSILON = 10.0, 1e-20
#: the largest magnitude in a gradient: AdamW stores squares, and float32 overflows above 3e38
MAX_GRADIENT = 1e18


class DivergenceError(TrainingError):
    """A step made the weights of a run too large for an adapter folder. The run fails until a
    checkpoint is loaded into it."""


class FairLock:
    """A lock that the thread that has waited longest gets next. Meant for two threads."""

    def __init__(self) -> None:
        self._next_in_line = threading.Lock()
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._next_in_line:
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


@dataclass(frozen=True)
class Adam:
    """The settings of one step of torch's AdamW. ``rate``: the learning rate; ``decay``: the weight
    decay; ``clip``: the largest norm of the gradient, or 0 for no limit."""

    rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    decay: float = 0.0
    clip: float = 0.0

    def check(self) -> None:
        bounds = (
            ("learning_rate", self.rate, 0.0, MAX_LEARNING_RATE),
            ("beta1", self.beta1, 0.0, 1 - 1e-9),
            ("beta2", self.beta2, 0.0, 1 - 1e-9),
            ("eps", self.eps, MIN_EPSILON, 1.0),
            ("weight_decay × learning_rate", self.decay * self.rate, 0.0, 1.0),
            ("grad_clip_norm", self.clip, 0.0, math.inf),
        )
        for name, setting, lower, upper in bounds:
            if not lower <= setting <= upper or math.isinf(setting):
                raise DataError(
                    f"{name} {setting:g}", f"a number from {lower:g} to {upper:g}", "change it"
                )


@dataclass(eq=False)
class Pass:
    """A forward of a run over some data, and a backward if ``backward`` is true.

    Fields:
        run: name of the run's adapter.
        loss, settings: name of the loss, in ``LOSSES``, and its settings.
        owner: name of the API key.
        loss_sum: the sum of the losses of the data that are computed.
        error: why the pass failed; None if it has not failed.
        remaining: indices of the data that are not computed yet, the longest data first.
        logprobs: for each datum, the log-probabilities of its targets, or None before it is
            computed.
        earlier_gradients: the gradients from earlier passes since the run's last step. They are set
            aside while this pass is computed.
    """

    run: str
    data: Sequence[Datum]
    loss: str
    settings: Mapping[str, float] = field(default_factory=dict)
    backward: bool = True
    owner: str = ""
    loss_sum: float = 0.0
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
    def is_over(self) -> bool:
        """Whether all data are computed, or the pass has failed."""
        return not self.remaining or self.error is not None


class Trainer:
    """The runs in memory, by the names of their adapters. Only one thread may call it.

    ``model``: the base, in eval mode; ``bank``: adapters for samples; ``model_lock``: held while
    the model is called or its layers are changed."""

    def __init__(
        self, model: nn.Module, bank: Any, model_lock: AbstractContextManager[Any] | None = None
    ) -> None:
        self.model, self._bank = model, bank
        self._model_lock = nullcontext() if model_lock is None else model_lock
        self.runs = Runs(model)
        self.engine = self.runs.engine
        self.device = next(model.parameters()).device
        self.batch_tokens = CPU_BATCH_TOKENS if self.device.type == "cpu" else GPU_BATCH_TOKENS
        #: by run, for each product scale · B @ A that changes a weight: the positions of A and B in
        #: the list of the run's parameters, and the scale
        self._products: dict[str, list[tuple[int, int, float]]] = {}

    def begin(self, run: str, config: LoraConfig, seed: int) -> None:
        """Create a run. ``TargetError``: the config does not fit the base."""
        with self._model_lock:
            self._add_optimizer(run, self.runs.add(run, config, seed=seed))

    def _add_optimizer(self, run: str, handle: Handle) -> None:
        adapter = self.engine.adapters[run]
        adapter.optimizer = torch.optim.AdamW(adapter.parameters, foreach=True)
        indices = {id(parameter): index for index, parameter in enumerate(adapter.parameters)}
        self._products[run] = []
        for *_, change in changes(self.model, run):
            factors = map(change.adapter_parameters.get, "AB")
            A_index, B_index = (indices.get(id(factor)) for factor in factors)
            if A_index is not None and B_index is not None:
                self._products[run].append((A_index, B_index, change.scale))

    def end(self, run: str) -> None:
        """Free the memory of a run."""
        with self._model_lock:
            self.runs.remove(run)
        self._products.pop(run, None)  # a load that failed may have added none

    def has_pending_gradients(self, run: str) -> bool:
        """Whether a run has gradients that no step has used."""
        return self.engine.adapters[run].has_gradients

    def compute(self, passes: Sequence[Pass]) -> dict[str, int]:
        """Compute one batch: as many data of the passes as fit, at least one of the first pass. The
        passes must be of different runs. If the first pass has a backward, passes without one are
        left out, and vice versa. Returns the number of tokens of each run in the batch."""
        passes = [
            training_pass
            for training_pass in passes
            if training_pass.backward == passes[0].backward
        ]
        rows = self._choose_data_indices(passes)
        batch_passes = [training_pass for training_pass in passes if training_pass.run in rows]
        if passes[0].backward:
            for training_pass in batch_passes:
                if training_pass.earlier_gradients is None:
                    parameters = self._parameters(training_pass.run)
                    training_pass.earlier_gradients = take_gradients(parameters)
        passes_by_run = {training_pass.run: training_pass for training_pass in batch_passes}
        result = isolate_failures(partial(self._run_passes, rows), passes_by_run)
        for training_pass in batch_passes:
            run = training_pass.run
            training_pass.error = result.failures.get(run)
            if training_pass.error is None:
                training_pass.loss_sum += float(result.values[run])
            computed_rows = set(rows[run])
            training_pass.remaining = [
                index for index in training_pass.remaining if index not in computed_rows
            ]
            if training_pass.is_over:
                self._finish_pass(training_pass)
        return {
            run: sum(len(training_pass.data[index].tokens) for index in rows[run])
            for run, training_pass in passes_by_run.items()
        }

    def _choose_data_indices(self, passes: Sequence[Pass]) -> dict[str, list[int]]:
        """The indices of the data in the next batch, by run. The passes take turns, each with its
        longest data first. A datum joins the batch if the batch then has at most ``batch_tokens``
        tokens and little padding (``fit_budget``)."""
        candidates = [
            (training_pass, training_pass.remaining[position])
            for position in range(max(len(training_pass.remaining) for training_pass in passes))
            for training_pass in passes
            if position < len(training_pass.remaining)
        ]
        lengths = [len(training_pass.data[index].tokens) for training_pass, index in candidates]
        rows: dict[str, list[int]] = {}
        for candidate in fit_budget(lengths, self.batch_tokens):
            training_pass, index = candidates[candidate]
            rows.setdefault(training_pass.run, []).append(index)
        return rows

    def _run_passes(
        self, rows: Mapping[str, Sequence[int]], passes: Mapping[str, Pass], keep_going: bool
    ) -> PassResult:
        """Compute one forward, and one backward if the passes have one, of data of these passes.
        ``rows``: by adapter name, the indices of a run's data; ``keep_going``: an error of one run
        does not stop the other runs (``StepEngine.backward``)."""
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
        requests = self.runs.requests(batches, losses)
        backward = next(iter(passes.values())).backward
        run_pass = self.engine.backward if backward else self.engine.forward
        with self._model_lock:
            return run_pass(requests, keep_going)

    def _pad(
        self, training_pass: Pass, indices: Sequence[int], width: int
    ) -> tuple[Tensor, Tensor]:
        """Token ids and labels, each [rows, width + 1] of int64, for the data ``indices``. A label
        is in the column of its own token, one column after the logits that predict it."""
        ids = torch.zeros(len(indices), width + 1, dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        for row, index in enumerate(indices):
            datum = training_pass.data[index]
            token_count = len(datum.tokens)
            ids[row, :token_count] = datum.tokens
            if datum.targets.dim() == 1:
                labels[row, 1 : token_count + 1] = datum.targets
        return ids.to(self.device), labels.to(self.device)

    def _parameters(self, run: str) -> list[nn.Parameter]:
        return self.engine.adapters[run].parameters

    def _finish_pass(self, training_pass: Pass) -> None:
        """Add the gradients of a pass to the gradients of the run's earlier passes. If the pass
        failed or the sum is too large, restore the earlier gradients."""
        earlier_gradients = training_pass.earlier_gradients
        if earlier_gradients is None:
            return
        parameters = self._parameters(training_pass.run)
        if training_pass.error is None:
            add_earlier_gradients(parameters, earlier_gradients)
            largest_gradient = largest_magnitude(present_gradients(parameters))
            if not largest_gradient <= MAX_GRADIENT:  # also true for NaN
                training_pass.error = TrainingError(
                    f"a gradient of up to {largest_gradient:.3g}",
                    f"numbers of at most {MAX_GRADIENT:g}",
                    "look at the data and their weights",
                )
        if training_pass.error is not None:
            restore_gradients(parameters, earlier_gradients)
        training_pass.earlier_gradients = None

    def step(self, run: str, adam: Adam) -> dict[str, float]:
        """A step of AdamW along the gradients of the passes since the last step.

        Raises:
            DataError: with these settings, weights would overflow. Nothing has changed.
            DivergenceError: the weights after the step are too large for an adapter folder.
        """
        adam.check()
        adapter = self.engine.adapters[run]
        norm = adapter.clip(adam.clip, in_float64=True)
        _adamw(adapter).param_groups[0].update(
            lr=adam.rate, betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=adam.decay
        )
        with self._model_lock:  # samples use a copy of the adapter, but the same base
            adapter.step()
        self._check_bounds(run)
        return {"unclipped_grad_l2:mean": norm}

    def _check_bounds(self, run: str) -> None:
        """Check that an adapter folder can hold a run's weights. ``DivergenceError``: a weight or a
        product of weights is too large."""
        parameters = self._parameters(run)
        norms = norms_in_float64(parameters)
        magnitudes = [
            abs(scale) * norms[A_index] * norms[B_index]
            for A_index, B_index, scale in self._products[run]
        ]
        # no entry exceeds the norm of its tensor, so entries are rarely compared one by one
        all_within = all(norm <= MAX_MAGNITUDE for norm in norms)
        magnitudes.append(0.0 if all_within else largest_magnitude(parameters))
        # ``not <=`` is also true for NaN
        excessive = next((size for size in magnitudes if not size <= MAX_MAGNITUDE), None)
        if excessive is not None:
            raise DivergenceError(
                f"a run that diverged: a step made numbers of up to {excessive:.3g}",
                f"weights, and changes of weights, of at most {MAX_MAGNITUDE:g}",
                "load a checkpoint into it and go on with a smaller learning rate, or begin a new "
                "run",
            )

    def save(self, run: str, folder: Path, base: str | None) -> None:
        """Write a run's adapter and its optimizer's state into one folder, which is replaced if it
        exists."""
        with new_folder(folder, overwrite=True, replaces=[EVERYTHING]) as new_checkpoint:
            self.export(run, new_checkpoint / ADAPTER, base)
            self.save_optimizer(run, new_checkpoint)

    def load(self, run: str, folder: Path, *, optimizer: bool, adapter: str = ADAPTER) -> None:
        """Load a saved run. If ``run`` is in memory, it is replaced. ``optimizer``: whether to load
        the optimizer's state too; ``adapter``: the path of the adapter folder within ``folder``.
        ``AdapterError``: it holds no valid adapter, and the run is unchanged."""
        with self._model_lock:
            if run in self.runs:  # load the adapter under another name first, since this may fail
                self.runs.add(f"{run}-new", folder / adapter)
                self.runs.remove(f"{run}-new")
            tensors = read_tensors(folder / OPTIMIZER)[0] if optimizer else {}
            if run in self.runs:
                self.runs.remove(run)
            handle = self.runs.add(run, folder / adapter)
        _widen_to_float32(handle)
        self._add_optimizer(run, handle)
        if tensors:
            names = [name for name, _ in handle.named_parameters()]
            load_optimizer_tensors(_adamw(self.engine.adapters[run]), names, tensors)

    def export(
        self, run: str, folder: Path, base: str | None, provenance: Mapping[str, Any] | None = None
    ) -> None:
        """Write a run's adapter without the optimizer's state. An existing folder is replaced."""
        self.runs[run].save(folder, base_name=base, provenance=provenance, overwrite=True)

    def save_optimizer(self, run: str, folder: Path) -> None:
        """Write the state of a run's optimizer into a folder."""
        names = [name for name, _ in self.runs[run].named_parameters()]
        save_file(optimizer_tensors(_adamw(self.engine.adapters[run]), names), folder / OPTIMIZER)

    @contextmanager
    def sampling(self, leases: Sequence[Any]) -> Iterator[nn.Module]:
        """A context in which row i of the model's input uses the adapter of the bank's lease
        ``leases[i]``, or the base for None. It takes leases, not names, because their adapters are
        in memory: a load inside the context could wait forever for memory of adapters that other
        threads use, while these threads wait for the model lock of this thread."""
        with self._model_lock, torch.inference_mode(), self._bank.rows(leases):
            yield self.model


def _adamw(adapter: TrainedAdapter) -> torch.optim.Optimizer:
    assert adapter.optimizer is not None
    return adapter.optimizer


def _loss_of_labels(training_pass: Pass, indices: Sequence[int], losses: Tensor) -> Tensor:
    """The loss of data with one target per token. ``losses`` [tokens of all data]: −log p of the
    targets."""
    token_counts = [len(training_pass.data[index].tokens) for index in indices]
    return _sum_losses(training_pass, indices, (-losses).split(token_counts))


def _loss_of_logits(
    training_pass: Pass, indices: Sequence[int], output: Any, target: Any
) -> Tensor:
    """The loss of data with several targets per token, from the model's output."""
    logprobs = []
    for logits, index in zip(output.logits, indices, strict=True):
        targets = training_pass.data[index].targets.to(logits.device)
        wide_logits = logits[: len(targets)].to(torch.promote_types(logits.dtype, torch.float32))
        target_logits = wide_logits.gather(-1, targets.view(len(targets), -1))
        row_logprobs = target_logits - wide_logits.logsumexp(-1, keepdim=True)
        logprobs.append(row_logprobs.view(targets.shape))
    return _sum_losses(training_pass, indices, logprobs)


def _sum_losses(training_pass: Pass, indices: Sequence[int], logprobs: Sequence[Tensor]) -> Tensor:
    """The summed losses of the data ``indices``. Stores the log-probabilities of their targets in
    the pass, for its answer."""
    loss_sum, loss = None, LOSSES[training_pass.loss]
    for index, row_logprobs in zip(indices, logprobs, strict=True):
        inputs = {
            name: values.to(row_logprobs.device)
            for name, values in training_pass.data[index].inputs.items()
        }
        datum_loss = loss.terms(row_logprobs, inputs, training_pass.settings).sum()
        training_pass.logprobs[index] = row_logprobs.detach().float().cpu()
        loss_sum = datum_loss if loss_sum is None else loss_sum + datum_loss
    assert loss_sum is not None
    if not torch.isfinite(loss_sum):
        raise TrainingError(
            f"a {training_pass.loss} loss of {float(loss_sum.detach())}",
            "a finite number",
            "look at the data and the learning rate, and go on from a checkpoint",
        )
    return loss_sum


def widen_config(config: LoraConfig) -> LoraConfig:
    """The config with which an adapter is trained: in float32 if it was saved in 16 bits, because a
    typical optimizer step is smaller than the rounding error of 16-bit numbers."""
    return replace(config, dtype="float32") if config.dtype in ("bfloat16", "float16") else config


def _widen_to_float32(handle: Handle) -> None:
    """Convert the 16-bit parameters of an adapter with a 16-bit config to float32."""
    config = widen_config(handle.config)
    if config == handle.config:
        return
    for parameter in handle.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    need_adapters(handle.model, handle.name).configs[handle.name] = config
