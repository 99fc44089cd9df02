"""Ways to train an adapter's parameters: LoRA+, LoRA-FA, Riemannian gradients, and AdaLoRA's budget
of ranks, for any optimiser of torch.

Each function takes a ``Handle``, or what it reads from one: (name, parameter) pairs whose names end
in the parameter's name (``"layers.0.q_proj.weight.A"``), or modules that hold the parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError, listing, raise_all, sentence

__all__ = ["RankBudget", "freeze_a", "lora_plus", "precondition", "regulariser"]

Named = Iterable[tuple[str, nn.Parameter]]

#: the parameters of a triplet, and what else a variant may train beside A
_TRIPLET, _OTHER_FACTORS = ("A", "B", "E"), {"B", "C", "E", "R", "b", "d"}
#: A, or one of several such as A1 and A2
_IN_FACTOR = re.compile(r"A\d*")
#: rows of an embedding that are trained themselves, and are no factor of a change
_TOKEN_ROWS = "token_rows"


def lora_plus(
    named_parameters: Named | Any,
    lr: float,
    ratio: float = 16,
    weight_decay: float = 0.0,
    embedding_lr: float = 1e-6,
) -> list[dict[str, Any]]:
    """Parameter groups in which everything but A learns ``ratio`` times as fast as A: LoRA+. Hayou
    et al. 2024, arXiv:2402.12354. The paper's ratio of 16 suits LoRA's start and an ``lr`` about
    half the usual one.

        optimiser = torch.optim.AdamW(lora_plus(handle, lr=1e-4))

    Args:
        named_parameters: a handle, a module, or (name, parameter) pairs. Parameters that are not
            trained are left out.
        lr: learning rate of A (and of A1, A2 of a variant with several).
        ratio: learning rate of the rest over that of A.
        weight_decay: of every group.
        embedding_lr: learning rate of adapters of embeddings, which the authors' code trains apart.
            Only a handle tells which these are; given pairs, there is no such group.

    Raises:
        ConfigError: nothing to train, or a learning rate or ratio that is not above 0.
    """
    named = [
        (name, parameter) for name, parameter in _named(named_parameters) if parameter.requires_grad
    ]
    values = {"lr": lr, "ratio": ratio, "embedding_lr": embedding_lr}
    problems = [
        sentence(f"{name}={value!r}", "a number above 0", "use e.g. lr=1e-4, ratio=16")
        for name, value in values.items()
        if not value > 0
    ]
    if not named:
        problems.append(
            sentence(
                "no trained parameter", "those of an adapter", "pass a handle, or named parameters"
            )
        )
    raise_all(ConfigError, "LoRA+ cannot be used", problems)
    changes = _changes(named_parameters).values()
    embedding = [change for change in changes if change.layer.name.startswith("embedding")]
    embeddings = {id(parameter) for change in embedding for parameter in change.parameters()}
    groups: dict[float, list[nn.Parameter]] = {lr: [], lr * ratio: [], embedding_lr: []}
    for name, parameter in named:
        last = name.rpartition(".")[2]
        rate = lr if last == _TOKEN_ROWS or _IN_FACTOR.fullmatch(last) else lr * ratio
        if id(parameter) in embeddings and last != _TOKEN_ROWS:
            rate = embedding_lr
        groups[rate].append(parameter)
    return [
        {"params": own, "lr": rate, "weight_decay": weight_decay}
        for rate, own in groups.items()
        if own
    ]


def freeze_a(named_parameters: Named | Any) -> list[nn.Parameter]:
    """Freeze every A at its random start and train the rest: LoRA-FA. Zhang et al. 2023,
    arXiv:2308.03303.

        optimiser = torch.optim.AdamW(freeze_a(handle), lr=1e-3)

    B A x needs x for the gradient of A alone. With A frozen the factored path keeps only A x, rank
    values a token in place of ``in``; gradients of what is trained stay exact. Undo it with
    ``A.requires_grad_()``.

    Args:
        named_parameters: a handle, a module, or (name, parameter) pairs.

    Returns:
        the parameters that are still trained: every B, and what else is trained beside A and B.

    Raises:
        ConfigError: a layer for which this makes no sense, with every problem at once; nothing is
            frozen then. Such are variants that do not train both A and B, that train other factors
            between or beside them, or whose A is not a random start of full rank: B could then
            never reach some of its directions.
    """
    named = list(_named(named_parameters))
    low = _low(named)
    started = {path for path, part in _parts(named_parameters) if hasattr(part, "A0")}
    problems = [
        sentence(
            f"{reason} at {path or 'the top'}",
            "a random A and a B, both trained",
            'use variant "lora"',
        )
        for path, parameters in low.items()
        if (reason := _why_not_frozen(parameters, path in started))
    ]
    if not low:
        problems.append(
            sentence("no A and B", "those of an adapter", "pass a handle, or its named parameters")
        )
    raise_all(ConfigError, "A cannot be frozen", problems)
    for parameters in low.values():
        parameters["A"].requires_grad_(False)
        parameters["A"].grad = None
    return [parameter for _, parameter in named if parameter.requires_grad]


def precondition(
    optimizer: torch.optim.Optimizer, named_parameters: Named | Any, damping: float = 1e-2
) -> Any:
    """Let each step of ``optimizer`` see Riemannian gradients: that of A becomes (BᵀB + δI)⁻¹ dA,
    that of B becomes dB (AAᵀ + δI)⁻¹, with δ the damping. Both then learn at rates that suit each
    other, so one rate serves for both whatever the rank. Zhang and Pilanci 2024, arXiv:2402.02347.

        optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-3)
        veneer.optim.precondition(optimizer, handle)

    It is a hook of the optimiser itself, so it also serves in ``optimizers=(optimizer, None)`` of a
    trainer; clipping comes before it. The r × r matrices are computed in float32, or float64 where
    the parameters are. What is trained beside A and B (a gain, a head, rows of tokens) keeps its
    gradient.

    Args:
        named_parameters: a handle, a module, or (name, parameter) pairs.
        damping: δ, above 0.

    Returns:
        the handle of the hook; ``.remove()`` ends it.

    Raises:
        ConfigError: a damping that is not above 0, no A and B, a variant with other factors, or
            with one of both frozen, or parameters that ``optimizer`` does not train; nothing is
            changed then. In a step: a closure, which would compute the gradients anew after the
            hook.
    """
    low = _low(named_parameters)
    problems = [
        sentence(
            f"trained numbers {listing(names)} at {path or 'the top'}",
            "A and B, both trained",
            'use variant "lora"',
        )
        for path, own in low.items()
        if not {"A", "B"}
        <= set(names := [name for name, value in own.items() if value.requires_grad])
        or len(set(own) & (_OTHER_FACTORS | {"A"})) > 2
    ]
    if not low:
        problems.append(
            sentence("no A and B", "those of an adapter", "pass a handle, or its named parameters")
        )
    if not damping > 0:
        problems.append(sentence(f"damping={damping!r}", "a number above 0", "use e.g. 1e-2"))
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    pairs = [(own["A"], own["B"]) for own in low.values() if {"A", "B"} <= own.keys()]
    if any(id(parameter) not in known for pair in pairs for parameter in pair):
        do = "pass it handle.parameters(), and call precondition before anything wraps it"
        problems.append(
            sentence("an optimiser without some A or B", "one that trains all of them", do)
        )
    raise_all(ConfigError, "The gradients cannot be preconditioned", problems)

    @torch.no_grad()
    def hook(_: Any, args: Any, kwargs: Any) -> None:
        if any(value is not None for value in args[1:]) or kwargs.get("closure") is not None:
            problem = "a closure, which computes the gradients anew"
            raise ConfigError(
                f"A preconditioned step. {sentence(problem, 'none', 'call backward before step()')}"
            )
        for A, B in pairs:
            exact = torch.promote_types(A.dtype, torch.float32)
            left, right = B.to(exact), A.to(exact)
            eye = damping * torch.eye(A.shape[-2], dtype=exact, device=A.device)
            if A.grad is not None:
                A.grad.copy_(torch.linalg.solve(left.mT @ left + eye, A.grad.to(exact)))
            if B.grad is not None:
                B.grad.copy_(
                    torch.linalg.solve(right @ right.mT + eye, B.grad.to(exact), left=False)
                )

    return optimizer.register_step_pre_hook(hook)


def _why_not_frozen(parameters: dict[str, nn.Parameter], started: bool) -> str | None:
    trained = [name for name, value in parameters.items() if value.requires_grad or name == "A"]
    if not {"A", "B"} <= set(trained) or "E" in parameters:
        return f"trained numbers {listing(trained)}"
    if started:
        return "an A that did not start at random"
    if not parameters["A"].detach().any(dim=-1).all():
        return "an A with rows of zeros"
    return None


class RankBudget:
    """Which triplets each layer of an ``adalora`` adapter keeps. Zhang et al. 2023,
    arXiv:2303.10512, section 3.2.

        budget = RankBudget(handle, final_rank=8, total_steps=1000, warmup=100, final=300, every=10)
        loss = task_loss + 0.1 * regulariser(handle)
        loss.backward(); optimiser.step(); budget.step(number); optimiser.zero_grad()

    A triplet is a column of B, a row of A and the E between them. Its importance is s(E) + mean
    s(B) + mean s(A), with s = Ī · Ū for every number w: Ī is the moving average of the sensitivity
    |w · ∂loss/∂w|, Ū that of |I − Ī|. The budget of all layers together stays at its start for
    ``warmup`` steps, falls with the cube of what remains, and is final for the last ``final``
    steps, in which the choice no longer changes. The most important triplets keep mask = 1; the
    others get mask = 0 and E = 0. The gradient of E ignores the mask, so they may come back.

    Args:
        source: a handle, a module that contains the layers, or the layers: modules with parameters
            A [g, r, in], B [g, out, r] and E [g, r] and a buffer mask [g, r].
        final_rank: how many triplets a layer (and group) keeps in the end, on average.
        total_steps, warmup, final: optimiser steps of the run, before the budget falls, and after.
        every: steps between two choices.
        beta1, beta2: smoothing of sensitivity and uncertainty, in (0, 1).

    Raises:
        ConfigError: a layer of another variant, no layer, or numbers that do not fit each other.
    """

    def __init__(
        self,
        source: Any,
        *,
        final_rank: float,
        total_steps: int,
        warmup: int = 0,
        final: int = 0,
        every: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
    ) -> None:
        self.layers = dict(_triplets(source))
        self.total_steps, self.warmup, self.final, self.every = total_steps, warmup, final, every
        self.beta1, self.beta2 = beta1, beta2
        groups = sum(layer.mask.shape[0] for layer in self.layers.values())
        self.first_budget = sum(layer.mask.numel() for layer in self.layers.values())
        self.final_budget = round(final_rank * groups)
        problems = []
        if not 0 < self.final_budget <= self.first_budget:
            rank = self.first_budget / groups
            problems.append(
                sentence(
                    f"final_rank={final_rank!r}", f"above 0, at most {rank:g}", "choose a lower one"
                )
            )
        if not 0 <= warmup < total_steps - final or final < 0 or every < 1:
            problem = f"total_steps={total_steps}, warmup={warmup}, final={final}, every={every}"
            problems.append(
                sentence(
                    problem,
                    "warmup + final < total_steps and every ≥ 1",
                    "leave steps between them",
                )
            )
        if not (0 < beta1 < 1 and 0 < beta2 < 1):
            problems.append(
                sentence(f"beta1={beta1}, beta2={beta2}", "numbers in (0, 1)", "use 0.85")
            )
        raise_all(ConfigError, "This RankBudget cannot be used", problems)
        self.settled = False
        self._sensitivity, self._uncertainty = (
            {
                key: torch.zeros_like(
                    own, dtype=torch.promote_types(own.dtype, torch.float32), requires_grad=False
                )
                for key, own in self._parameters()
            }
            for _ in range(2)
        )

    def budget(self, step_number: int) -> int:
        """How many triplets all layers together keep at this step."""
        if step_number <= self.warmup:
            return self.first_budget
        left = (self.total_steps - self.final - step_number) / (
            self.total_steps - self.final - self.warmup
        )
        return int(
            self.final_budget + (self.first_budget - self.final_budget) * max(0.0, left) ** 3
        )

    @torch.no_grad()
    def step(self, step_number: int) -> int:
        """Judge the triplets by the gradients of this step, and choose anew where the schedule says
        so. Call it once a step, after ``backward`` (best after the optimiser's step too) and before
        ``zero_grad``.

        Args:
            step_number: steps since the start of the run, from 1.

        Returns:
            the budget at this step, in triplets.

        Raises:
            ConfigError: numbers without a gradient.
        """
        budget = self.budget(step_number)
        if self.settled:
            return budget
        missing = [key for key, parameter in self._parameters() if parameter.grad is None]
        if missing:
            do = "call step after backward and before zero_grad"
            raise ConfigError(f"no gradient at {listing(missing)}", "one", do)
        for key, parameter in self._parameters():
            smooth, unsure, gradient = (
                self._sensitivity[key],
                self._uncertainty[key],
                cast(Tensor, parameter.grad),
            )
            now = (parameter * gradient).abs().to(smooth)
            # a step that a gradient scaler skips teaches nothing
            now = torch.where(now.isfinite(), now, smooth)
            smooth.lerp_(now, 1 - self.beta1)
            unsure.lerp_((now - smooth).abs(), 1 - self.beta2)
        last = step_number >= self.total_steps - self.final
        if last or (step_number > self.warmup and step_number % self.every == 0):
            self._choose(budget)
            self.settled = last
        return budget

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on: the averages, and whether the choice is final. Masks are in
        the model's state."""
        averages = {
            name: {key: value.clone() for key, value in own.items()}
            for name, own in self._averages()
        }
        return {**averages, "settled": self.settled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict`` of a budget over the same layers.

        Raises:
            ConfigError: other layers, or other sizes. Nothing was loaded.
        """
        for name, own in self._averages():
            theirs = {key: tuple(value.shape) for key, value in state.get(name, {}).items()}
            ours = {key: tuple(value.shape) for key, value in own.items()}
            if theirs != ours:
                odd = sorted(
                    key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)
                )
                do = "make the RankBudget of the adapter that this state is of"
                raise ConfigError(
                    f"a state that differs at {listing(odd)}", "the same layers and sizes", do
                )
        for name, own in self._averages():
            for key, value in own.items():
                value.copy_(state[name][key])
        self.settled = bool(state["settled"])

    def _averages(self) -> list[tuple[str, dict[str, Tensor]]]:
        return [("sensitivity", self._sensitivity), ("uncertainty", self._uncertainty)]

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        for path, layer in self.layers.items():
            yield from ((f"{path}.{name}".lstrip("."), getattr(layer, name)) for name in _TRIPLET)

    def _choose(self, budget: int) -> None:
        scores = []
        for path in self.layers:
            keys = [f"{path}.{name}".lstrip(".") for name in _TRIPLET]
            A, B, E = (self._sensitivity[key] * self._uncertainty[key] for key in keys)
            scores.append((E + A.mean(dim=2) + B.mean(dim=1)).flatten())  # [g · r]
        device = scores[0].device
        whole = torch.cat([score.to(device) for score in scores])
        order = torch.argsort(whole, descending=True, stable=True)
        masks = torch.zeros_like(whole).index_fill_(0, order[:budget], 1)
        for layer, mask in zip(
            self.layers.values(), masks.split([len(score) for score in scores]), strict=True
        ):
            layer.mask.copy_(mask.view_as(layer.mask))
            layer.E.mul_(layer.mask)


def regulariser(source: Any) -> Tensor:
    """How far the B and A of an ``adalora`` adapter are from orthogonal: the mean of ‖BᵀB − I‖² and
    ‖AAᵀ − I‖² (squared Frobenius norms, [r, r]) over all layers and groups, a scalar to add to the
    loss with a weight of about 0.1. The paper's R is their sum; the mean gives a weight the same
    meaning for models of every depth.

    Raises:
        ConfigError: a layer of another variant, or no layer.
    """
    grams = [
        gram
        for _, layer in _triplets(source)
        for gram in (layer.A @ layer.A.mT, layer.B.mT @ layer.B)
    ]
    off = [(gram - torch.eye(gram.shape[-1]).to(gram)).square().sum(dim=(-2, -1)) for gram in grams]
    return torch.cat([part.to(off[0].device) for part in off]).mean()


def _named(source: Any) -> Iterator[tuple[str, nn.Parameter]]:
    own = getattr(source, "named_parameters", None)
    yield from own() if own else source


def _low(source: Any) -> dict[str, dict[str, nn.Parameter]]:
    """The trained numbers of each low-rank change by its path, and by their names."""
    layers: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in _named(source):
        path, _, last = name.rpartition(".")
        layers.setdefault(path, {})[last] = parameter
    return {
        path: own
        for path, own in layers.items()
        if own.keys() & _OTHER_FACTORS or any(map(_IN_FACTOR.fullmatch, own))
    }


def _parts(source: Any) -> Iterator[tuple[str, Any]]:
    """(path, module) of everything in ``source`` that may hold adapter parameters, each once."""
    if isinstance(source, nn.Module):
        pairs: Any = source.named_modules()
    elif isinstance(getattr(source, "changes", None), Mapping):  # a handle's
        pairs = source.changes.items()
    else:
        pairs = [
            item if isinstance(item, tuple) else (str(index), item)
            for index, item in enumerate(source)
        ]
    seen: set[int] = set()
    for path, part in pairs:
        if id(part) not in seen:
            seen.add(id(part))
            yield path, part


def _changes(source: Any) -> Mapping[str, Any]:
    """The low-rank changes of a handle by path; of another source none."""
    changes = getattr(source, "changes", None)
    return changes if isinstance(changes, Mapping) else {}


def _triplets(source: Any) -> Iterator[tuple[str, Any]]:
    """(path, module) of every layer with A, B, E and mask; other low-rank layers are an error."""
    found, others = [], []
    for path, part in _parts(source):
        if all(hasattr(part, name) for name in (*_TRIPLET, "mask")):
            found.append((path, part))
        elif any(hasattr(part, name) for name in ("A", "B", "A2", "B2")):
            others.append(path or "the top")
    if others or not found:
        at = (
            f"numbers of another variant at {listing(others)}"
            if others
            else "no layer with A, B, E and mask"
        )
        problem = sentence(
            at, "an adapter of variant 'adalora'", 'attach with LoraConfig(variant="adalora")'
        )
        raise ConfigError(f"Ranks can only be allocated to adalora. {problem}")
    yield from found
