"""Runs that train on one base at once: what the service computes, without clients, queues and files
of its own.

    passes of several runs ─ rows of like length ─> one forward and backward of the base ─>
    logprobs, gradients

A ``Pass`` is a forward, and a backward if asked, of one run over data of any number and length.
``compute`` takes rows of several of them, padded on the right to the longest, which a causal model
does not see. What fails of one run leaves its gradients as they were, and the others go on.
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

from veneer import precision
from veneer.adapter_files.folder import LARGEST
from veneer.attach.lookup import changes, need_adapters
from veneer.config import LoraConfig
from veneer.errors import DataError, TrainingError
from veneer.fileio.atomic import EVERYTHING, new_folder
from veneer.formats._base import read_tensors
from veneer.handle import Handle
from veneer.serve.scheduler import fit_budget
from veneer.serve.training.losses import LOSSES, Datum
from veneer.train.many import LabelLoss, Runs
from veneer.train.tokens import IGNORED

# : tokens of rows that share a batch, on a processor and on a device: what samples meanwhile waits
# for a batch
TOKENS, DEVICE_TOKENS = 512, 8192
ADAPTER, OPTIMIZER = "adapter", "optimizer.safetensors"
# : learning rates, and what a step may take of a weight by decay: beyond, numbers overflow sooner
# or later
MOST_RATE, LEAST_EPS = 10.0, 1e-20
#: of a gradient's numbers: AdamW keeps their squares, which float32 holds up to 3e38
MOST_GRADIENT = 1e18


class DivergenceError(TrainingError):
    """A step after which a run is no adapter any more: its numbers are of no use, and it can only
    be loaded anew."""


class Turn:
    """A lock that whoever waits has next: it goes back and forth between two threads, however often
    one asks."""

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
    """Which of a run's parameters are the two factors of a change, by their indices, and the
    change's scale."""

    A: int
    B: int
    scale: float


@dataclass(frozen=True)
class Adam:
    """The settings of one step, as torch's AdamW has them; ``clip``: the largest norm of a
    gradient, 0 for any."""

    rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    decay: float = 0.0
    clip: float = 0.0

    def check(self) -> None:
        for name, value, least, most in (
            ("learning_rate", self.rate, 0.0, MOST_RATE), ("beta1", self.beta1, 0.0, 1 - 1e-9),
            ("beta2", self.beta2, 0.0, 1 - 1e-9), ("eps", self.eps, LEAST_EPS, 1.0),
            ("weight_decay × learning_rate", self.decay * self.rate, 0.0, 1.0),
            ("grad_clip_norm", self.clip, 0.0, math.inf),
        ):  # fmt: skip
            if not least <= value <= most or math.isinf(value):
                raise DataError(
                    f"{name} {value:g}", f"a number from {least:g} to {most:g}", "change it"
                )


@dataclass(eq=False)
class Pass:
    """A forward of a run over some data, and a backward unless ``backward`` is False. ``left``:
    rows that were not computed yet, the longest first. ``logprobs``: of each datum's targets, as
    they become known."""

    run: str
    data: Sequence[Datum]
    loss: str
    settings: Mapping[str, float] = field(default_factory=dict)
    backward: bool = True
    owner: str = ""
    total: float = 0.0
    error: Exception | None = None
    left: list[int] = field(init=False)
    logprobs: list[Tensor | None] = field(init=False)
    before: list[Tensor | None] | None = None  # gradients of the run from earlier passes

    def __post_init__(self) -> None:
        self.left = sorted(range(len(self.data)), key=lambda number: -len(self.data[number].tokens))
        self.logprobs = [None] * len(self.data)

    @property
    def over(self) -> bool:
        return not self.left or self.error is not None


class Trainer:
    """Runs on one base by name. One thread calls it; ``turn`` is a block around whatever calls the
    model or changes its layers. ``model`` is in eval mode."""

    def __init__(
        self, model: nn.Module, bank: Any, turn: AbstractContextManager[Any] | None = None
    ) -> None:
        self.model, self._bank, self._turn = model, bank, nullcontext() if turn is None else turn
        self.runs = Runs(model, keep_going=True)
        self.device = next(model.parameters()).device
        self.tokens = TOKENS if self.device.type == "cpu" else DEVICE_TOKENS
        self._optimizers: dict[str, torch.optim.AdamW] = {}
        self._products: dict[str, list[Product]] = {}

    def begin(self, run: str, config: LoraConfig, seed: int) -> None:
        """``TargetError``: the config does not fit the base."""
        with self._turn:
            self._adopt(run, self.runs.add(run, config, seed=seed))

    def _adopt(self, run: str, handle: Handle) -> None:
        parameters = handle.parameters()
        indices = {id(parameter): index for index, parameter in enumerate(parameters)}
        self._products[run] = []
        for *_, change in changes(self.model, run):
            A, B = (indices.get(id(change.adapter_parameters.get(name))) for name in "AB")
            if A is not None and B is not None:
                self._products[run].append(Product(A, B, change.scale))
        self._optimizers[run] = torch.optim.AdamW(parameters, foreach=True)

    def end(self, run: str) -> None:
        """Let go of a run's numbers."""
        with self._turn:
            self.runs.remove(run)
        del self._optimizers[run], self._products[run]

    def pending(self, run: str) -> bool:
        """Whether a run has gradients that no step has used."""
        return any(parameter.grad is not None for parameter in self._parameters(run))

    def _parameters(self, run: str) -> list[nn.Parameter]:
        return self._optimizers[run].param_groups[0]["params"]

    def compute(self, passes: Sequence[Pass]) -> int:
        """Compute rows of some passes, of different runs, as many as fit into one batch; those of
        the first one always do. How many tokens these were."""
        passes = [one for one in passes if one.backward == passes[0].backward]
        order = [(one, place) for place in range(max(len(one.left) for one in passes)) for one in passes
                 if place < len(one.left)]  # fmt: skip
        taken = fit_budget(
            [len(one.data[one.left[place]].tokens) for one, place in order], self.tokens
        )
        rows: dict[str, list[int]] = {}
        for one, place in (order[number] for number in taken):
            rows.setdefault(one.run, []).append(one.left[place])
        chosen = [one for one in passes if one.run in rows]
        tokens = sum(len(one.data[number].tokens) for one in chosen for number in rows[one.run])
        try:
            self._together(chosen, rows)
        except Exception as error:
            if len(chosen) == 1:
                chosen[0].error = error
            for one in chosen if len(chosen) > 1 else ():  # whose failure it is
                try:
                    self._together([one], rows)
                except Exception as own:
                    one.error = own
        for one in chosen:
            done = set(rows[one.run])
            one.left = [number for number in one.left if number not in done]
            if one.over:
                self._finish(one)
        return tokens

    def _together(self, passes: Sequence[Pass], rows: Mapping[str, Sequence[int]]) -> None:
        """One forward of rows of these passes, and backward."""
        width = max(len(one.data[number].tokens) for one in passes for number in rows[one.run])
        batches, losses = {}, {}
        for one in passes:
            own = rows[one.run]
            ids, labels = self._padded(one, own, width)
            if all(one.data[number].targets.dim() == 1 for number in own):
                batches[one.run] = {"input_ids": ids, "labels": labels}
                losses[one.run] = LabelLoss(partial(self._of_labels, one, own))
            else:
                batches[one.run] = {"input_ids": ids}, None
                losses[one.run] = partial(self._of_logits, one, own)
        with self._turn:
            if not passes[0].backward:
                self._forward(passes, rows, batches)
                return
            for one in passes:
                if one.before is None:
                    one.before = [parameter.grad for parameter in self._parameters(one.run)]
                    for parameter in self._parameters(one.run):
                        parameter.grad = None
            self.runs.backward(batches, losses)
        for one in passes:
            one.error = self.runs.failed.get(one.run, one.error)

    def _forward(
        self, passes: Sequence[Pass], rows: Mapping[str, Sequence[int]], batches: Mapping[str, Any]
    ) -> None:
        simple = {one.run: batches[one.run] for one in passes if isinstance(batches[one.run], dict)}
        told = self.runs.label_losses(simple) if simple else {}
        for one in passes:
            if one.run in told:
                self._of_labels(one, rows[one.run], told[one.run].losses)
                continue
            ids = batches[one.run][0]["input_ids"]
            with torch.no_grad(), self.runs[one.run].use():
                self._of_logits(
                    one, rows[one.run], self.model(input_ids=ids, use_cache=False), None
                )

    def _padded(self, one: Pass, rows: Sequence[int], width: int) -> tuple[Tensor, Tensor]:
        """Tokens and labels [rows, width + 1]: labels stand at the token that they are, one place
        on."""
        ids = torch.zeros(len(rows), width + 1, dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        for place, number in enumerate(rows):
            datum = one.data[number]
            size = len(datum.tokens)
            ids[place, :size] = datum.tokens
            if datum.targets.dim() == 1:
                labels[place, 1 : size + 1] = datum.targets
        return ids.to(self.device), labels.to(self.device)

    def _of_labels(self, one: Pass, rows: Sequence[int], told: Tensor) -> Tensor:
        sizes = [len(one.data[number].tokens) for number in rows]
        return self._summed(one, rows, (-told).split(sizes))

    def _of_logits(self, one: Pass, rows: Sequence[int], output: Any, target: Any) -> Tensor:
        """Of several targets a token."""
        logprobs = []
        for own, number in zip(output.logits, rows, strict=True):
            targets = one.data[number].targets.to(own.device)
            wide = own[: len(targets)].to(torch.promote_types(own.dtype, torch.float32))
            told = wide.gather(-1, targets.view(len(targets), -1)) - wide.logsumexp(
                -1, keepdim=True
            )
            logprobs.append(told.view(targets.shape))
        return self._summed(one, rows, logprobs)

    def _summed(self, one: Pass, rows: Sequence[int], logprobs: Sequence[Tensor]) -> Tensor:
        """The loss of these rows; what it was made of is kept."""
        total, loss = None, LOSSES[one.loss]
        for number, own in zip(rows, logprobs, strict=True):
            inputs = {
                name: values.to(own.device) for name, values in one.data[number].inputs.items()
            }
            value = loss.terms(own, inputs, one.settings).sum()
            one.logprobs[number] = own.detach().float().cpu()
            total = value if total is None else total + value
        assert total is not None
        if not torch.isfinite(total):
            do = "look at the data and the learning rate, and go on from a checkpoint"
            raise TrainingError(
                f"a {one.loss} loss of {float(total.detach())}", "a finite number", do
            )
        one.total += float(total.detach())
        return total

    def _finish(self, one: Pass) -> None:
        """The gradients of a pass join those from before it; one that fails, or whose sum with
        these is out of bounds, leaves them as they were."""
        if one.before is None:
            return
        parameters = self._parameters(one.run)
        if one.error is None:
            for parameter, before in zip(parameters, one.before, strict=True):
                if parameter.grad is None:
                    parameter.grad = before
                elif before is not None:
                    parameter.grad += before
            largest = _largest(
                [parameter.grad for parameter in parameters if parameter.grad is not None]
            )
            if not largest <= MOST_GRADIENT:  # NaN is not, either
                found, do = (
                    f"a gradient of up to {largest:.3g}",
                    "look at the data and their weights",
                )
                one.error = TrainingError(found, f"numbers of at most {MOST_GRADIENT:g}", do)
        if one.error is not None:
            for parameter, before in zip(parameters, one.before, strict=True):
                parameter.grad = before
        one.before = None

    def step(self, run: str, adam: Adam) -> dict[str, float]:
        """A step of AdamW along the gradients of the passes since the last one.

        Raises:
            DataError: settings that would not end in numbers; nothing has changed.
            DivergenceError: the step made numbers that no adapter folder can hold. The run is of no
                use any more.
        """
        adam.check()
        optimizer, parameters = self._optimizers[run], self._parameters(run)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = math.hypot(*_norms(gradients))
        if adam.clip and norm > adam.clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, adam.clip, torch.tensor(norm))
        optimizer.param_groups[0].update(
            lr=adam.rate, betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=adam.decay
        )
        with self._turn:  # what is sampled from is a copy, but the base of a call is common
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self._check_bounds(run)
        return {"unclipped_grad_l2:mean": norm}

    def _check_bounds(self, run: str) -> None:
        """``DivergenceError``: a run's numbers are such as ``adapter_files.folder`` neither writes
        nor reads."""
        norms = _norms(self._parameters(run))
        sizes = [abs(pair.scale) * norms[pair.A] * norms[pair.B] for pair in self._products[run]]
        # no number is larger than the norm of its tensor, so that few runs are looked at number by
        # number
        largest = 0.0 if all(norm <= LARGEST for norm in norms) else _largest(self._parameters(run))
        worst = next(
            (size for size in (*sizes, largest) if not size <= LARGEST), None
        )  # NaN is not, either
        if worst is not None:
            found = f"a run that diverged: a step made numbers of up to {worst:.3g}"
            do = "load a checkpoint into it and go on with a smaller learning rate, or begin a new run"
            raise DivergenceError(
                found, f"weights, and changes of weights, of at most {LARGEST:g}", do
            )

    def save(
        self,
        run: str,
        folder: Path,
        base: str | None,
        provenance: Mapping[str, Any] | None = None,
        check: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        """The adapter and its optimiser, as one folder, over what is there, unless ``check`` raises
        for it."""
        names = [name for name, _ in self.runs[run].named_parameters()]
        state = self._optimizers[run].state_dict()["state"]
        tensors = {
            f"{key}:{names[place]}": value.detach().cpu().contiguous()
            for place, own in state.items() for key, value in own.items()
        }  # fmt: skip
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder, overwrite=True, replaces=[EVERYTHING]) as made:
            self.runs[run].save(made / ADAPTER, base_name=base, provenance=provenance)
            save_file(tensors, made / OPTIMIZER)
            check(made)

    def load(self, run: str, folder: Path, *, optimizer: bool, adapter: str = ADAPTER) -> None:
        """A run from a saved one, in place of what it was; ``adapter``: where in the folder its
        adapter is. ``AdapterError``: there is none; the run is as it was."""
        with self._turn:
            if run in self.runs:  # tried beside it first
                self.runs.add(f"{run}-new", folder / adapter)
                self.runs.remove(f"{run}-new")
            state = read_tensors(folder / OPTIMIZER)[0] if optimizer else {}
            if run in self.runs:
                self.runs.remove(run)
            handle = self.runs.add(run, folder / adapter)
        _widen(handle)
        self._adopt(run, handle)
        if state:
            own = self._optimizers[run]
            places = _by_place(state, [name for name, _ in handle.named_parameters()])
            own.load_state_dict({**own.state_dict(), "state": places})

    def export(
        self, run: str, folder: Path, base: str | None, provenance: Mapping[str, Any] | None = None
    ) -> None:
        """The adapter alone, over what is there."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.runs[run].save(folder, base_name=base, provenance=provenance, overwrite=True)

    @contextmanager
    def sampled(self, leases: Sequence[Any]) -> Iterator[nn.Module]:
        """A block in which the model answers as samples would be drawn, for a row of each of these
        leases of the bank; None is the base. To load an adapter here would keep the turn from those
        who hold the memory for it."""
        with self._turn, torch.inference_mode(), self._bank.rows(leases):
            yield self.model


def _widen(handle: Handle) -> None:
    """Let an adapter that was saved in 16 bits train in float32: a step of usual size is lost in
    their rounding."""
    if handle.config.dtype not in ("bfloat16", "float16"):
        return
    for parameter in handle.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    configs = need_adapters(handle.model, handle.name).configs
    configs[handle.name] = replace(handle.config, dtype="float32")


def _by_place(tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[int, dict[str, Tensor]]:
    """The state of an optimiser whose parameters have these names, in their order."""
    state: dict[int, dict[str, Tensor]] = {}
    places = {name: place for place, name in enumerate(names)}
    for key, value in tensors.items():
        kind, _, name = key.partition(":")
        state.setdefault(places[name], {})[kind] = value
    return state


def _norms(tensors: Sequence[Tensor]) -> list[float]:
    """The norm of each tensor, in float64 where the device has that: float32 cannot hold the
    squares of large ones."""
    if not tensors:
        return []
    device = tensors[0].device  # a base may be spread over several
    wide = torch.float64 if precision.has_float64(device) else torch.float32
    with torch.no_grad():
        norms = torch._foreach_norm(list(tensors), 2, dtype=wide)  # pyright: ignore[reportPrivateImportUsage]
        return torch.stack([norm.to(device) for norm in norms]).tolist()


def _largest(tensors: Sequence[Tensor]) -> float:
    """The largest number by size; NaN where one is."""
    if not tensors:
        return 0.0
    with torch.no_grad():
        return float(torch.nn.utils.get_total_norm(tensors, torch.inf))
