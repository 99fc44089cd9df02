"""Train several runs on one base model at once: forward and backward passes, optimizer steps,
loading and saving. Clients, queues and the database are in other files.

    passes of several runs ─ data of similar length ─> one forward and backward of the base model
                           ─> log-probabilities, gradients

A run is one LoRA adapter that is trained. A ``Pass`` is a forward, and a backward if requested, of
one run over any number of data of any length. Each datum (token ids and their targets) becomes one
row of a batch. ``compute`` pads the rows on the right to the longest row, which does not change the
output for the other tokens, because the model is causal. The step engine (``veneer/engine``)
computes the batch. If the pass of a run fails, for example because a gradient is not finite, the
run gets back the gradients that it had before the pass, and the other runs continue.
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

#: the largest number of tokens in a batch, with padding, on a CPU and on a GPU. The engine cannot
#: generate samples while a batch is computed, so batches are small.
CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 512, 8192
#: names within a checkpoint's folder: the adapter folder, and the file of the optimizer's state
ADAPTER_FOLDER, OPTIMIZER_FILE = "adapter", "optimizer.safetensors"
#: the largest learning rate and smallest epsilon of AdamW: beyond them, weights may overflow
MAX_LEARNING_RATE, MIN_EPSILON = 10.0, 1e-20
#: the largest magnitude in a gradient. AdamW stores its square, and float32 overflows above 3e38.
MAX_GRADIENT = 1e18


class DivergenceError(TrainingError):
    """An optimizer step made the weights of a run too large to be saved. The run then accepts
    nothing but a checkpoint to load."""


class FairLock:
    """A lock for two threads. A thread that releases it and acquires it again at once cannot
    overtake the other thread, which a ``threading.Lock`` would allow."""

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
    decay; ``clip``: the largest norm of the gradient of all parameters, or 0 for no limit."""

    rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    decay: float = 0.0
    clip: float = 0.0

    def check(self) -> None:
        """``DataError``: a setting is out of its bounds, and weights could overflow."""
        bounds = (
            ("learning_rate", self.rate, 0.0, MAX_LEARNING_RATE),
            ("beta1", self.beta1, 0.0, 1 - 1e-9),
            ("beta2", self.beta2, 0.0, 1 - 1e-9),
            ("eps", self.eps, MIN_EPSILON, 1.0),
            ("weight_decay × learning_rate", self.decay * self.rate, 0.0, 1.0),
            ("grad_clip_norm", self.clip, 0.0, math.inf),
        )
        for setting_name, setting, lower, upper in bounds:
            if not lower <= setting <= upper or math.isinf(setting):
                raise DataError(
                    f"{setting_name} {setting:g}",
                    f"a number from {lower:g} to {upper:g}",
                    "change it",
                )


@dataclass(eq=False)
class Pass:
    """A forward of a run over some data, and a backward if ``backward`` is true.

    Fields:
        adapter_name: name of the run's adapter on the model.
        loss, settings: name of the loss (a key of ``LOSSES``), and its settings by name.
        owner: name of the API key; "" on a server without keys.
        loss_sum: the sum of the losses of the data that are computed so far.
        error: why the pass failed; None if it has not failed.
        remaining: indices of the data that are not computed yet, the longest data first.
        logprobs: for each datum, the log-probabilities of its targets, or None before it is
            computed.
        earlier_gradients: the gradients from earlier passes since the run's last optimizer step.
            They are set aside while this pass is computed, so that they can be restored if it
            fails. None before and after that, and if the pass has no backward.
    """

    adapter_name: str
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
    """The runs in memory, each known by the name of its adapter. Only one thread may call the
    methods.

    ``model``: the base model, in eval mode; ``bank``: the adapters from which the engine samples;
    ``model_lock``: a lock that is held while the model is called or its layers are changed; None if
    no other thread uses the model."""

    def __init__(
        self, model: nn.Module, bank: Any, model_lock: AbstractContextManager[Any] | None = None
    ) -> None:
        self.model, self._bank = model, bank
        self._model_lock = nullcontext() if model_lock is None else model_lock
        self.runs = Runs(model)
        self.engine = self.runs.engine
        self.device = next(model.parameters()).device
        self.batch_tokens = CPU_BATCH_TOKENS if self.device.type == "cpu" else GPU_BATCH_TOKENS
        #: by adapter name, for each weight that changes by scale · B @ A: (index of A, index of B,
        #: scale), where the indices are positions in the list of the adapter's parameters
        self._product_factors: dict[str, list[tuple[int, int, float]]] = {}

    def begin(self, adapter_name: str, config: LoraConfig, seed: int) -> None:
        """Create a run with a new adapter. ``seed``: of the adapter's initial values.
        ``TargetError``: the config does not fit the base model."""
        with self._model_lock:
            self._add_optimizer(adapter_name, self.runs.add(adapter_name, config, seed=seed))

    def _add_optimizer(self, adapter_name: str, handle: Handle) -> None:
        """Give a run an AdamW optimizer without state, and record its products B @ A."""
        adapter = self.engine.adapters[adapter_name]
        adapter.optimizer = torch.optim.AdamW(adapter.parameters, foreach=True)
        indices = {id(parameter): index for index, parameter in enumerate(adapter.parameters)}
        self._product_factors[adapter_name] = []
        for *_, change in changes(self.model, adapter_name):
            factor_parameters = map(change.adapter_parameters.get, "AB")
            A_index, B_index = (indices.get(id(factor)) for factor in factor_parameters)
            if A_index is not None and B_index is not None:
                self._product_factors[adapter_name].append((A_index, B_index, change.scale))

    def end(self, adapter_name: str) -> None:
        """Remove the adapter of a run from the model, and free its memory. Nothing is saved."""
        with self._model_lock:
            self.runs.remove(adapter_name)
        self._product_factors.pop(adapter_name, None)  # none if a load has failed

    def has_pending_gradients(self, adapter_name: str) -> bool:
        """Whether a run has gradients that no optimizer step has used yet."""
        return self.engine.adapters[adapter_name].has_gradients

    def compute(self, passes: Sequence[Pass]) -> dict[str, int]:
        """Compute one batch with as many data of the passes as fit, at least one datum of the first
        pass, and update the fields of the passes. The passes must be of different runs. If the
        first pass has a backward, passes without one are not computed, and vice versa. Returns the
        number of tokens of each run in the batch, by adapter name, without padding."""
        passes = [
            training_pass
            for training_pass in passes
            if training_pass.backward == passes[0].backward
        ]
        data_indices = self._choose_data_indices(passes)
        batch_passes = [
            training_pass for training_pass in passes if training_pass.adapter_name in data_indices
        ]
        if passes[0].backward:
            for training_pass in batch_passes:
                if training_pass.earlier_gradients is None:
                    parameters = self._parameters(training_pass.adapter_name)
                    training_pass.earlier_gradients = take_gradients(parameters)
        passes_by_adapter = {
            training_pass.adapter_name: training_pass for training_pass in batch_passes
        }
        result = isolate_failures(partial(self._run_passes, data_indices), passes_by_adapter)
        for training_pass in batch_passes:
            adapter_name = training_pass.adapter_name
            training_pass.error = result.failures.get(adapter_name)
            if training_pass.error is None:
                training_pass.loss_sum += float(result.values[adapter_name])
            computed_indices = set(data_indices[adapter_name])
            training_pass.remaining = [
                index for index in training_pass.remaining if index not in computed_indices
            ]
            if training_pass.is_over:
                self._finish_pass(training_pass)
        return {
            name: sum(len(training_pass.data[index].tokens) for index in data_indices[name])
            for name, training_pass in passes_by_adapter.items()
        }

    def _choose_data_indices(self, passes: Sequence[Pass]) -> dict[str, list[int]]:
        """The indices of the data in the next batch, by adapter name. Data are considered in this
        order: the longest remaining datum of each pass, then the second longest of each, and so on.
        A datum joins the batch if the batch then has at most ``batch_tokens`` tokens and little
        padding (``fit_budget``)."""
        candidates = [
            (training_pass, training_pass.remaining[position])
            for position in range(max(len(training_pass.remaining) for training_pass in passes))
            for training_pass in passes
            if position < len(training_pass.remaining)
        ]
        lengths = [len(training_pass.data[index].tokens) for training_pass, index in candidates]
        data_indices: dict[str, list[int]] = {}
        for candidate_number in fit_budget(lengths, self.batch_tokens):
            training_pass, index = candidates[candidate_number]
            data_indices.setdefault(training_pass.adapter_name, []).append(index)
        return data_indices

    def _run_passes(
        self,
        data_indices: Mapping[str, Sequence[int]],
        passes: Mapping[str, Pass],
        keep_going: bool,
    ) -> PassResult:
        """Compute one forward over some data of each pass, and one backward if the passes have one
        (all do, or none). ``data_indices``, ``passes``: by adapter name. ``keep_going``: an error
        of one run does not stop the others, but is returned in ``PassResult.failures``."""
        batches: dict[str, Any] = {}
        losses: dict[str, Any] = {}
        width = max(
            len(passes[adapter_name].data[index].tokens)
            for adapter_name in passes
            for index in data_indices[adapter_name]
        )
        for adapter_name, training_pass in passes.items():
            indices = data_indices[adapter_name]
            ids, labels = self._pad(training_pass, indices, width)
            if all(training_pass.data[index].targets.dim() == 1 for index in indices):
                batches[adapter_name] = {"input_ids": ids, "labels": labels}
                losses[adapter_name] = LabelLoss(partial(_loss_of_labels, training_pass, indices))
            else:
                batches[adapter_name] = {"input_ids": ids}, None
                losses[adapter_name] = partial(_loss_of_logits, training_pass, indices)
        requests = self.runs.requests(batches, losses)
        backward = next(iter(passes.values())).backward
        run_pass = self.engine.backward if backward else self.engine.forward
        with self._model_lock:
            return run_pass(requests, keep_going)

    def _pad(
        self, training_pass: Pass, indices: Sequence[int], width: int
    ) -> tuple[Tensor, Tensor]:
        """Token ids and labels, each [number of data, width + 1] of int64, for the data
        ``indices``. As usual for causal language models, a label stands one column after the logits
        that predict it. Padding has the id 0; without a label, an entry is ``IGNORED``."""
        ids = torch.zeros(len(indices), width + 1, dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        for row_number, index in enumerate(indices):
            datum = training_pass.data[index]
            token_count = len(datum.tokens)
            ids[row_number, :token_count] = datum.tokens
            if datum.targets.dim() == 1:
                labels[row_number, 1 : token_count + 1] = datum.targets
        return ids.to(self.device), labels.to(self.device)

    def _parameters(self, adapter_name: str) -> list[nn.Parameter]:
        return self.engine.adapters[adapter_name].parameters

    def _finish_pass(self, training_pass: Pass) -> None:
        """Add the gradients of a computed pass to those of the run's earlier passes. If the sum is
        too large, the pass fails. If the pass has failed, restore the earlier gradients."""
        earlier_gradients = training_pass.earlier_gradients
        if earlier_gradients is None:
            return
        parameters = self._parameters(training_pass.adapter_name)
        if training_pass.error is None:
            add_earlier_gradients(parameters, earlier_gradients)
            largest_gradient = largest_magnitude(present_gradients(parameters))
            if not largest_gradient <= MAX_GRADIENT:  # unlike ``>``, this is true for NaN too
                training_pass.error = TrainingError(
                    f"a gradient of up to {largest_gradient:.3g}",
                    f"numbers of at most {MAX_GRADIENT:g}",
                    "look at the data and their weights",
                )
        if training_pass.error is not None:
            restore_gradients(parameters, earlier_gradients)
        training_pass.earlier_gradients = None

    def step(self, adapter_name: str, adam: Adam) -> dict[str, float]:
        """Make one AdamW step with the gradients of all passes since the last step. Returns the
        step's metrics: the norm of the gradient before clipping. ``DataError``: a setting is out of
        its bounds, and nothing has changed. ``DivergenceError``: the new weights are too large to
        be saved."""
        adam.check()
        adapter = self.engine.adapters[adapter_name]
        gradient_norm = adapter.clip(adam.clip, in_float64=True)
        _adamw(adapter).param_groups[0].update(
            lr=adam.rate, betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=adam.decay
        )
        with self._model_lock:  # samples use a copy of the adapter, but the same base model
            adapter.step()
        self._check_bounds(adapter_name)
        return {"unclipped_grad_l2:mean": gradient_norm}

    def _check_bounds(self, adapter_name: str) -> None:
        """Check that a run's weights can be saved. ``DivergenceError``: an entry of a parameter, or
        the bound |scale| · ‖B‖ · ‖A‖ on the entries of a weight's change, exceeds ``MAX_MAGNITUDE``
        or is NaN."""
        parameters = self._parameters(adapter_name)
        norms = norms_in_float64(parameters)
        magnitudes = [
            abs(scale) * norms[A_index] * norms[B_index]
            for A_index, B_index, scale in self._product_factors[adapter_name]
        ]
        # No entry exceeds the norm of its tensor, so if all norms are small, skip the entries.
        all_within = all(norm <= MAX_MAGNITUDE for norm in norms)
        magnitudes.append(0.0 if all_within else largest_magnitude(parameters))
        # ``not <=``, unlike ``>``, is true for NaN too
        excessive_magnitude = next(
            (magnitude for magnitude in magnitudes if not magnitude <= MAX_MAGNITUDE), None
        )
        if excessive_magnitude is not None:
            raise DivergenceError(
                f"a run that diverged: a step made numbers of up to {excessive_magnitude:.3g}",
                f"weights, and changes of weights, of at most {MAX_MAGNITUDE:g}",
                "load a checkpoint into it and go on with a smaller learning rate, or begin a new "
                "run",
            )

    def save(self, adapter_name: str, folder: Path, base_name: str | None) -> None:
        """Write a run's adapter and its optimizer's state into one folder, which is replaced if it
        exists."""
        with new_folder(folder, overwrite=True, replaces=[EVERYTHING]) as new_checkpoint:
            self.export(adapter_name, new_checkpoint / ADAPTER_FOLDER, base_name)
            self.save_optimizer(adapter_name, new_checkpoint)

    def load(
        self, adapter_name: str, folder: Path, *, optimizer: bool, subfolder: str = ADAPTER_FOLDER
    ) -> None:
        """Load a saved adapter into a run. The run is created; if it is in memory already, it is
        replaced, and its gradients are dropped. ``optimizer``: whether to load the optimizer's
        state too, from ``folder``; ``subfolder``: the path of the adapter folder within ``folder``,
        or "" if they are the same. ``AdapterError``: the adapter is not valid; a run in memory is
        unchanged."""
        with self._model_lock:
            # try to load under another name first: if it fails, the run in memory must not change
            if adapter_name in self.runs:
                self.runs.add(f"{adapter_name}-new", folder / subfolder)
                self.runs.remove(f"{adapter_name}-new")
            tensors = read_tensors(folder / OPTIMIZER_FILE)[0] if optimizer else {}
            if adapter_name in self.runs:
                self.runs.remove(adapter_name)
            handle = self.runs.add(adapter_name, folder / subfolder)
        _widen_to_float32(handle)
        self._add_optimizer(adapter_name, handle)
        if tensors:
            names = [name for name, _ in handle.named_parameters()]
            load_optimizer_tensors(_adamw(self.engine.adapters[adapter_name]), names, tensors)

    def export(
        self,
        adapter_name: str,
        folder: Path,
        base_name: str | None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a run's adapter, without the optimizer's state, to ``folder``, which is replaced if
        it exists. ``base_name`` and ``provenance`` are recorded in the adapter folder."""
        self.runs[adapter_name].save(
            folder, base_name=base_name, provenance=provenance, overwrite=True
        )

    def save_optimizer(self, adapter_name: str, folder: Path) -> None:
        """Write the state of a run's optimizer into the file ``OPTIMIZER_FILE`` of a folder."""
        names = [name for name, _ in self.runs[adapter_name].named_parameters()]
        save_file(
            optimizer_tensors(_adamw(self.engine.adapters[adapter_name]), names),
            folder / OPTIMIZER_FILE,
        )

    @contextmanager
    def sampling(self, leases: Sequence[Any]) -> Iterator[nn.Module]:
        """A context in which row i of the model's input uses the adapter of ``leases[i]``, a lease
        of the bank, or the base model for None. A lease keeps its adapter in memory. With names,
        this method would have to load adapters and could deadlock: it holds the model lock, and
        would wait for memory that is leased by threads that wait for the model lock."""
        with self._model_lock, torch.inference_mode(), self._bank.rows(leases):
            yield self.model


def _adamw(adapter: TrainedAdapter) -> torch.optim.Optimizer:
    assert adapter.optimizer is not None
    return adapter.optimizer


def _loss_of_labels(training_pass: Pass, indices: Sequence[int], losses: Tensor) -> Tensor:
    """The summed loss of the data ``indices`` of a pass, with one target per token. ``losses``
    [number of tokens of these data, one datum after the other]: −log p of the targets."""
    token_counts = [len(training_pass.data[index].tokens) for index in indices]
    return _sum_losses(training_pass, indices, (-losses).split(token_counts))


def _loss_of_logits(
    training_pass: Pass, indices: Sequence[int], output: Any, target: Any
) -> Tensor:
    """The summed loss of the data ``indices`` of a pass, where a datum may have several targets per
    token. ``output.logits`` has one row per datum. The step engine passes a ``target`` of None."""
    logprobs = []
    for logits, index in zip(output.logits, indices, strict=True):
        targets = training_pass.data[index].targets.to(logits.device)
        wide_logits = logits[: len(targets)].to(torch.promote_types(logits.dtype, torch.float32))
        target_logits = wide_logits.gather(-1, targets.view(len(targets), -1))
        row_logprobs = target_logits - wide_logits.logsumexp(-1, keepdim=True)
        logprobs.append(row_logprobs.view(targets.shape))
    return _sum_losses(training_pass, indices, logprobs)


def _sum_losses(training_pass: Pass, indices: Sequence[int], logprobs: Sequence[Tensor]) -> Tensor:
    """The sum of the losses of the data ``indices`` of a pass, a scalar. ``logprobs``: for each of
    these data, the log-probabilities of its targets, of the shape of ``Datum.targets``. They are
    also stored in the pass, for its answer. ``TrainingError``: the sum is not finite."""
    loss_sum, loss_function = None, LOSSES[training_pass.loss]
    for index, row_logprobs in zip(indices, logprobs, strict=True):
        loss_inputs = {
            input_name: values.to(row_logprobs.device)
            for input_name, values in training_pass.data[index].inputs.items()
        }
        datum_loss = loss_function.terms(row_logprobs, loss_inputs, training_pass.settings).sum()
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
    """The config with which an adapter is trained: 16-bit dtypes become float32, because a typical
    optimizer step is smaller than the rounding error of 16-bit numbers and would be lost."""
    return replace(config, dtype="float32") if config.dtype in ("bfloat16", "float16") else config


def _widen_to_float32(handle: Handle) -> None:
    """If an adapter's config has a 16-bit dtype, make it and its 16-bit parameters float32."""
    config = widen_config(handle.config)
    if config == handle.config:
        return
    for parameter in handle.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    need_adapters(handle.model, handle.name).configs[handle.name] = config
