"""Ways to train an adapter's parameters with any torch optimiser: LoRA+, LoRA-FA, Riemannian
gradients, and AdaLoRA's rank budget.

Each function accepts a ``Handle``, an iterable of (name, parameter) pairs with names such as
``"layers.0.q_proj.weight.A"``, or modules that hold the parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError, listing, raise_all, sentence

__all__ = ["RankBudget", "freeze_a", "lora_plus", "precondition", "regulariser"]

NamedParameters = Iterable[tuple[str, nn.Parameter]]

#: names of AdaLoRA's parameters (see ``RankBudget``), and of parameters that variants train with A
_TRIPLET_NAMES, _NAMES_BESIDE_A = ("A", "B", "E"), {"B", "C", "E", "R", "b", "d"}
#: matches the name of A, or of one of several A, such as A1 and A2
_A_NAME = re.compile(r"A\d*")
#: the name of a parameter with embedding rows that are trained in full, which is no low-rank factor
_TOKEN_ROWS = "token_rows"
#: the texts of the error for a source without low-rank changes
_NO_FACTORS = ("no A and B", "those of an adapter", "pass a handle, or its named parameters")


def lora_plus(
    named_parameters: NamedParameters | Any,
    lr: float,
    ratio: float = 16,
    weight_decay: float = 0.0,
    embedding_lr: float = 1e-6,
) -> list[dict[str, Any]]:
    """Parameter groups in which A has the learning rate ``lr`` and every other parameter ``ratio``
    times as much: LoRA+, Hayou et al. 2024, arXiv:2402.12354. The paper's ratio of 16 suits LoRA's
    initialisation, with an ``lr`` of about half the usual one.

        optimiser = torch.optim.AdamW(lora_plus(handle, lr=1e-4))

    Args:
        named_parameters: a handle, a module, or (name, parameter) pairs. Frozen parameters are left
            out.
        lr: learning rate of A (and of A1, A2 of a variant with several).
        ratio: learning rate of the other parameters, divided by ``lr``.
        weight_decay: weight decay of every group.
        embedding_lr: learning rate of adapters of embeddings, which the authors' code also trains
            in a separate group. Only a handle identifies them; pairs get no such group.

    Raises:
        ConfigError: no trainable parameter, or a learning rate or ratio that is not above 0.
    """
    trainable = [pair for pair in _named_parameters(named_parameters) if pair[1].requires_grad]
    arguments = {"lr": lr, "ratio": ratio, "embedding_lr": embedding_lr}
    problems = [
        sentence(f"{name}={value!r}", "a number above 0", "use e.g. lr=1e-4, ratio=16")
        for name, value in arguments.items()
        if not value > 0
    ]
    if not trainable:
        problems.append(
            sentence(
                "no trained parameter", "those of an adapter", "pass a handle, or named parameters"
            )
        )
    raise_all(ConfigError, "LoRA+ cannot be used", problems)
    embedding_ids = {
        id(parameter)
        for change in _changes(named_parameters).values()
        if change.layer.name.startswith("embedding")
        for parameter in change.parameters()
    }
    groups: dict[float, list[nn.Parameter]] = {lr: [], lr * ratio: [], embedding_lr: []}
    for name, parameter in trainable:
        parameter_name = name.rpartition(".")[2]
        is_token_rows = parameter_name == _TOKEN_ROWS
        group_lr = lr if is_token_rows or _A_NAME.fullmatch(parameter_name) else lr * ratio
        if id(parameter) in embedding_ids and not is_token_rows:
            group_lr = embedding_lr
        groups[group_lr].append(parameter)
    return [
        {"params": group_parameters, "lr": group_lr, "weight_decay": weight_decay}
        for group_lr, group_parameters in groups.items()
        if group_parameters
    ]


def freeze_a(named_parameters: NamedParameters | Any) -> list[nn.Parameter]:
    """Freeze every A at its random start and train the rest: LoRA-FA, Zhang et al. 2023,
    arXiv:2308.03303.

        optimiser = torch.optim.AdamW(freeze_a(handle), lr=1e-3)

    A gets no gradient and no state of the optimiser; the gradients of the trained parameters stay
    exact. The fused kernels save x for backward all the same. Where torch computes B A x, as under
    ``torch.compile``, it saves A x instead of x. Undo it with ``A.requires_grad_()``.

    Args:
        named_parameters: a handle, a module, or (name, parameter) pairs.

    Returns:
        the parameters that remain trainable: every B, and parameters other than A and B.

    Raises:
        ConfigError: a layer that cannot be trained with A frozen; the error lists all problems, and
            nothing is frozen. Such a layer has no A or no trained B, has AdaLoRA's factor E, or has
            an A that did not start at random or has rows of zeros, so that B A misses directions.
    """
    pairs = list(_named_parameters(named_parameters))
    low_rank_parameters = _low_rank_parameters(pairs)
    subtracting_paths = {
        path for path, module in _adapter_modules(named_parameters) if hasattr(module, "A0")
    }
    problems = [
        sentence(
            f"{reason} at {path or 'the top'}",
            "a random A and a B, both trained",
            'use variant "lora"',
        )
        for path, parameters in low_rank_parameters.items()
        if (reason := _freeze_problem(parameters, path in subtracting_paths))
    ]
    if not low_rank_parameters:
        problems.append(sentence(*_NO_FACTORS))
    raise_all(ConfigError, "A cannot be frozen", problems)
    for parameters in low_rank_parameters.values():
        parameters["A"].requires_grad_(False)
        parameters["A"].grad = None
    return [parameter for _, parameter in pairs if parameter.requires_grad]


def precondition(
    optimizer: torch.optim.Optimizer, named_parameters: NamedParameters | Any, damping: float = 1e-2
) -> Any:
    """Let each step of ``optimizer`` use Riemannian gradients: the gradient dA of A becomes (BᵀB +
    δI)⁻¹ dA, and dB becomes dB (AAᵀ + δI)⁻¹, with the damping δ. A and B then need the same
    learning rate for every rank. Zhang and Pilanci 2024, arXiv:2402.02347.

        optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-3)
        veneer.optim.precondition(optimizer, handle)

    The function registers a hook that runs before each step of the optimiser, so it also works in
    ``optimizers=(optimizer, None)`` of a trainer; clipping happens before the hook. The r × r
    matrices are computed in float32, or in float64 for float64 parameters. Other parameters (a
    gain, a head, rows of an embedding) keep their gradients.

    Args:
        optimizer: an optimiser that trains every A and B.
        named_parameters: a handle, a module, or (name, parameter) pairs.
        damping: δ, above 0.

    Returns:
        the handle of the hook; ``.remove()`` removes it.

    Raises:
        ConfigError: a damping that is not above 0, no A and B, a variant with other factors, a
            frozen A or B, or an A or B that ``optimizer`` does not train; no hook is registered.
            Also in ``optimizer.step(closure)``, which would recompute gradients after the hook.
    """
    low_rank_parameters = _low_rank_parameters(named_parameters)
    problems = [
        sentence(
            f"trained numbers {listing(trained_names)} at {path or 'the top'}",
            "A and B, both trained",
            'use variant "lora"',
        )
        for path, parameters in low_rank_parameters.items()
        if not {"A", "B"}
        <= set(trained_names := [name for name, value in parameters.items() if value.requires_grad])
        or len(set(parameters) & (_NAMES_BESIDE_A | {"A"})) > 2
    ]
    optimizer_ids = {
        id(parameter) for group in optimizer.param_groups for parameter in group["params"]
    }
    factor_pairs = [
        (parameters["A"], parameters["B"])
        for parameters in low_rank_parameters.values()
        if {"A", "B"} <= parameters.keys()
    ]
    checks = [
        (not low_rank_parameters, *_NO_FACTORS),
        (not damping > 0, f"damping={damping!r}", "a number above 0", "use e.g. 1e-2"),
        (
            any(id(parameter) not in optimizer_ids for pair in factor_pairs for parameter in pair),
            "an optimiser without some A or B",
            "one that trains all of them",
            "pass it handle.parameters(), and call precondition before anything wraps it",
        ),
    ]
    problems += [sentence(*texts) for failed, *texts in checks if failed]
    raise_all(ConfigError, "The gradients cannot be preconditioned", problems)

    @torch.no_grad()
    def precondition_gradients(_: Any, args: Any, kwargs: Any) -> None:
        if any(value is not None for value in args[1:]) or kwargs.get("closure") is not None:
            problem = "a closure, which computes the gradients anew"
            raise ConfigError(
                f"A preconditioned step. {sentence(problem, 'none', 'call backward before step()')}"
            )
        for A, B in factor_pairs:
            dtype = torch.promote_types(A.dtype, torch.float32)
            wide_B, wide_A = B.to(dtype), A.to(dtype)
            delta_I = damping * torch.eye(A.shape[-2], dtype=dtype, device=A.device)
            if A.grad is not None:
                A.grad.copy_(torch.linalg.solve(wide_B.mT @ wide_B + delta_I, A.grad.to(dtype)))
            if B.grad is not None:
                B.grad.copy_(
                    torch.linalg.solve(wide_A @ wide_A.mT + delta_I, B.grad.to(dtype), left=False)
                )

    return optimizer.register_step_pre_hook(precondition_gradients)


def _freeze_problem(parameters: dict[str, nn.Parameter], subtracts_start: bool) -> str | None:
    """Why A of a layer cannot be frozen; None if it can. ``subtracts_start``: the layer has a copy
    A0 of its first A, which it subtracts, so that A did not start at random."""
    trained_names = [name for name in parameters if name == "A" or parameters[name].requires_grad]
    if not {"A", "B"} <= set(trained_names) or "E" in parameters:
        return f"trained numbers {listing(trained_names)}"
    if subtracts_start:
        return "an A that did not start at random"
    if not parameters["A"].detach().any(dim=-1).all():
        return "an A with rows of zeros"
    return None


class RankBudget:
    """Chooses the triplets that each layer of an ``adalora`` adapter keeps. Zhang et al. 2023,
    arXiv:2303.10512, section 3.2.

        budget = RankBudget(handle, final_rank=8, total_steps=1000, warmup=100, final=300, every=10)
        loss = task_loss + 0.1 * regulariser(handle)
        loss.backward(); optimiser.step(); budget.step(step_number); optimiser.zero_grad()

    A triplet is a column of B, a row of A and the element of E between them. Its importance is s(E)
    + mean s(B) + mean s(A), with s = Ī · Ū for every element w: Ī is the moving average of the
    sensitivity I = |w · ∂loss/∂w|, and Ū the moving average of |I − Ī|. The budget, a number of
    triplets in all layers, is constant for ``warmup`` steps, then falls to the final budget with
    the cube of the remaining share of the steps, and is constant for the last ``final`` steps. The
    most important triplets have mask = 1; all others get mask = 0 and E = 0. The gradient of E
    ignores the mask, so a triplet may be chosen again, but not in the last ``final`` steps.

    Args:
        source: a handle, a module that contains the layers, or the layers. A layer of g groups has
            parameters A [g, r, in], B [g, out, r] and E [g, r], and a buffer mask [g, r].
        final_rank: number of triplets that a layer (and group) keeps in the end, on average.
        total_steps: optimiser steps of the run.
        warmup: steps before the budget decreases.
        final: steps at the end with the final budget.
        every: steps between two choices of the triplets to keep.
        beta1, beta2: smoothing of sensitivity and uncertainty, in (0, 1).

    Raises:
        ConfigError: a layer of another variant, no layer, or arguments that contradict each other.
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
        group_count = sum(layer.mask.shape[0] for layer in self.layers.values())
        self.first_budget = sum(layer.mask.numel() for layer in self.layers.values())
        self.final_budget = round(final_rank * group_count)
        checks = [
            (
                not 0 < self.final_budget <= self.first_budget,
                f"final_rank={final_rank!r}",
                f"above 0, at most {self.first_budget / group_count:g}",
                "choose a lower one",
            ),
            (
                not 0 <= warmup < total_steps - final or final < 0 or every < 1,
                f"total_steps={total_steps}, warmup={warmup}, final={final}, every={every}",
                "warmup + final < total_steps and every ≥ 1",
                "leave steps between them",
            ),
            (
                not (0 < beta1 < 1 and 0 < beta2 < 1),
                f"beta1={beta1}, beta2={beta2}",
                "numbers in (0, 1)",
                "use 0.85",
            ),
        ]
        problems = [sentence(*texts) for failed, *texts in checks if failed]
        raise_all(ConfigError, "This RankBudget cannot be used", problems)
        self.settled = False
        # moving averages, by their key in the state and then by the path of a parameter
        self._averages = {
            name: {
                key: torch.zeros_like(
                    parameter,
                    dtype=torch.promote_types(parameter.dtype, torch.float32),
                    requires_grad=False,
                )
                for key, parameter in self._parameters()
            }
            for name in ("sensitivity", "uncertainty")
        }

    def budget(self, step_number: int) -> int:
        """The number of triplets that all layers together keep at this step."""
        if step_number <= self.warmup:
            return self.first_budget
        remaining_share = (self.total_steps - self.final - step_number) / (
            self.total_steps - self.final - self.warmup
        )
        return int(
            self.final_budget
            + (self.first_budget - self.final_budget) * max(0.0, remaining_share) ** 3
        )

    @torch.no_grad()
    def step(self, step_number: int) -> int:
        """Update the importance of the triplets from the gradients of this step. In the steps that
        ``warmup``, ``every`` and ``final`` define, also choose the triplets again. Call it in every
        step after ``backward`` and before ``zero_grad``, preferably after the optimiser's step.

        Args:
            step_number: steps since the start of the run, from 1.

        Returns:
            the budget at this step, in triplets.

        Raises:
            ConfigError: parameters without a gradient.
        """
        budget = self.budget(step_number)
        if self.settled:
            return budget
        without_gradient = [key for key, parameter in self._parameters() if parameter.grad is None]
        if without_gradient:
            advice = "call step after backward and before zero_grad"
            raise ConfigError(f"no gradient at {listing(without_gradient)}", "one", advice)
        for key, parameter in self._parameters():
            sensitivity = self._averages["sensitivity"][key]
            uncertainty = self._averages["uncertainty"][key]
            gradient = cast(Tensor, parameter.grad)
            new_sensitivity = (parameter * gradient).abs().to(sensitivity)
            # ignore gradients that are not finite: a gradient scaler would skip the step
            new_sensitivity = torch.where(new_sensitivity.isfinite(), new_sensitivity, sensitivity)
            sensitivity.lerp_(new_sensitivity, 1 - self.beta1)
            uncertainty.lerp_((new_sensitivity - sensitivity).abs(), 1 - self.beta2)
        is_final = step_number >= self.total_steps - self.final
        if is_final or (step_number > self.warmup and step_number % self.every == 0):
            self._update_masks(budget)
            self.settled = is_final
        return budget

    def state_dict(self) -> dict[str, Any]:
        """The moving averages, and whether the masks are final ("settled"), for a checkpoint. The
        masks are buffers of the layers, so the model's state dict holds them."""
        averages = {
            name: {key: value.clone() for key, value in averages_of_parameters.items()}
            for name, averages_of_parameters in self._averages.items()
        }
        return {**averages, "settled": self.settled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the ``state_dict`` of a budget over the same layers.

        Raises:
            ConfigError: ``state`` is of other layers or sizes; nothing is loaded then.
        """
        for name, averages in self._averages.items():
            loaded_shapes = {key: tuple(value.shape) for key, value in state.get(name, {}).items()}
            shapes = {key: tuple(value.shape) for key, value in averages.items()}
            if loaded_shapes != shapes:
                different_keys = sorted(
                    key
                    for key in loaded_shapes.keys() | shapes.keys()
                    if loaded_shapes.get(key) != shapes.get(key)
                )
                problem = f"a state that differs at {listing(different_keys)}"
                advice = "make the RankBudget of the adapter that this state is of"
                raise ConfigError(problem, "the same layers and sizes", advice)
        for name, averages in self._averages.items():
            for key, average in averages.items():
                average.copy_(state[name][key])
        self.settled = bool(state["settled"])

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(path, parameter) of each A, B and E."""
        for path, layer in self.layers.items():
            for name in _TRIPLET_NAMES:
                yield f"{path}.{name}".lstrip("."), getattr(layer, name)

    def _update_masks(self, budget: int) -> None:
        """Set mask = 1 for the ``budget`` most important triplets of all layers, else 0."""
        sensitivity, uncertainty = self._averages.values()
        scores = []
        for path in self.layers:
            keys = [f"{path}.{name}".lstrip(".") for name in _TRIPLET_NAMES]
            A, B, E = (sensitivity[key] * uncertainty[key] for key in keys)
            scores.append((E + A.mean(dim=2) + B.mean(dim=1)).flatten())  # [g · r]
        device = scores[0].device
        all_scores = torch.cat([score.to(device) for score in scores])
        most_important_first = torch.argsort(all_scores, descending=True, stable=True)
        masks = torch.zeros_like(all_scores).index_fill_(0, most_important_first[:budget], 1)
        for layer, mask in zip(
            self.layers.values(), masks.split([len(score) for score in scores]), strict=True
        ):
            layer.mask.copy_(mask.view_as(layer.mask))
            layer.E.mul_(layer.mask)


def regulariser(source: Any) -> Tensor:
    """How far A and B of an ``adalora`` adapter are from orthogonal: the mean of ‖BᵀB − I‖² and
    ‖AAᵀ − I‖² (squared Frobenius norms, [r, r]) over all layers and groups. Add this scalar to the
    loss with a weight of about 0.1. The paper takes the sum; with the mean, a weight has the same
    effect in models of every depth.

    Raises:
        ConfigError: a layer of another variant, or no layer.
    """
    grams = [
        gram
        for _, layer in _triplets(source)
        for gram in (layer.A @ layer.A.mT, layer.B.mT @ layer.B)
    ]
    distances = [
        (gram - torch.eye(gram.shape[-1]).to(gram)).square().sum(dim=(-2, -1)) for gram in grams
    ]
    return torch.cat([distance.to(distances[0].device) for distance in distances]).mean()


def _named_parameters(source: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) pairs of a handle, a module, or an iterable of such pairs."""
    named_parameters = getattr(source, "named_parameters", None)
    yield from named_parameters() if named_parameters else source


def _low_rank_parameters(source: Any) -> dict[str, dict[str, nn.Parameter]]:
    """{path of a low-rank change: {name, such as "A": parameter}} of a handle, module or pairs."""
    parameters_by_path: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in _named_parameters(source):
        path, _, parameter_name = name.rpartition(".")
        parameters_by_path.setdefault(path, {})[parameter_name] = parameter
    return {
        path: parameters
        for path, parameters in parameters_by_path.items()
        if parameters.keys() & _NAMES_BESIDE_A or any(map(_A_NAME.fullmatch, parameters))
    }


def _adapter_modules(source: Any) -> Iterator[tuple[str, Any]]:
    """(path, module), once for each module in ``source`` that may hold adapter parameters."""
    if isinstance(source, nn.Module):
        pairs: Any = source.named_modules()
    elif isinstance(getattr(source, "changes", None), Mapping):  # a handle
        pairs = source.changes.items()
    else:
        pairs = [
            entry if isinstance(entry, tuple) else (str(index), entry)
            for index, entry in enumerate(source)
        ]
    visited_ids: set[int] = set()
    for path, module in pairs:
        if id(module) not in visited_ids:
            visited_ids.add(id(module))
            yield path, module


def _changes(source: Any) -> Mapping[str, Any]:
    """The low-rank changes of a handle by path; empty for another source."""
    changes = getattr(source, "changes", None)
    return changes if isinstance(changes, Mapping) else {}


def _triplets(source: Any) -> Iterator[tuple[str, Any]]:
    """(path, layer) of every layer with A, B, E and mask. ``ConfigError``: none, or others."""
    triplet_layers, wrong_paths = [], []
    for path, layer in _adapter_modules(source):
        if all(hasattr(layer, name) for name in (*_TRIPLET_NAMES, "mask")):
            triplet_layers.append((path, layer))
        elif any(hasattr(layer, name) for name in ("A", "B", "A2", "B2")):
            wrong_paths.append(path or "the top")
    if wrong_paths or not triplet_layers:
        reason = "no layer with A, B, E and mask"
        if wrong_paths:
            reason = f"parameters of another variant at {listing(wrong_paths)}"
        advice = 'attach with LoraConfig(variant="adalora")'
        problem = sentence(reason, "an adapter of variant 'adalora'", advice)
        raise ConfigError(f"Ranks can only be allocated to adalora. {problem}")
    yield from triplet_layers
