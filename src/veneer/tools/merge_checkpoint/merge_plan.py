"""What a merge does to each tensor of a checkpoint, found from names and shapes alone; and doing it
to one tensor.

    recipe_for(folder, adapters) -> MergePlan: the edits of each tensor (place in the model,
    weighted changes)
    apply(work, tensor)           ->  the merged part of the tensor, rounded once, and what rounding did to the change

The model is built without weights (``models.meta_model``) and the adapters are loaded onto it, by
the code that loads them onto a real one: whatever a live merge refuses is refused here.
transformers, which knows the names, is 140 MB of code: adapters of ours say enough of linear layers
(``linear_stub_model``), for all else a child process makes the plan.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer import models
from veneer.adapter_files.folder import AdapterFiles, read
from veneer.adapter_files.save_load import install_from
from veneer.attach.change import Change
from veneer.attach.install import detach
from veneer.attach.lookup import adapters as adapters_of
from veneer.attach.lookup import changes, parameter_path
from veneer.attach.merge import fold_change, no_weights_change
from veneer.attach.weight_tying import torn
from veneer.errors import CheckpointError, MergeError, VeneerError, listing, raise_all, sentence
from veneer.kernels.reference import round_once
from veneer.kernels.rounding import Folded
from veneer.layers import Layer
from veneer.lowrank import LowRank
from veneer.models.base_weights import slice_shape
from veneer.models.meta import without_meta
from veneer.models.safetensors_dir import Checkpoint, open_checkpoint
from veneer.tools.merge_checkpoint.growth import grow_model, grown
from veneer.tools.merge_checkpoint.head import Head, model_with_head, with_added

#: an adapter folder and how much of it is merged
Adapter = tuple[Path, float]
NOWHERE = models.Place("")


@dataclass(frozen=True)
class TensorEdit:
    """What happens to one tensor, or to the part ``place.within`` of it, which is the part
    ``place.index`` of the parameter ``path`` (its first name), of this ``shape``: ``changes`` with
    their weights, or ``full``, values that replace it."""

    path: str
    shape: torch.Size
    place: models.Place = NOWHERE
    changes: tuple[tuple[float, Change], ...] = ()
    full: tuple[tuple[float, Tensor], ...] = ()


@dataclass(frozen=True)
class MergePlan:
    """Everything that a merge does to a checkpoint."""

    works: Mapping[str, tuple[TensorEdit, ...]]  # by the name of a tensor
    # the tensors that hold a parameter, by its path, where these are several
    parts: Mapping[str, tuple[str, ...]]
    #: of a parameter, by its path: the tensors that hold it, in its order, its shape, what each
    #: adapter expects
    #: (a fingerprint, and the tokens whose rows it leaves out)
    fingerprints: Mapping[
        str, tuple[tuple[str, ...], torch.Size, Mapping[str, tuple[str, tuple[int, ...]]]]
    ]
    notes: tuple[str, ...]  # what a person should know
    #: how many rows tensors of a vocabulary that grows will have, by their names
    sizes: Mapping[str, int] = field(default_factory=dict)
    #: the shapes of tensors that the files lack and adapters train in full, and the head that
    #: these are
    added: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    head: Head | None = None
    by_prints: bool = (
        False  # it holds only if the fingerprints do, as ``linear_stub_model`` drew the model
    )


def recipe_for(
    folder: Path, adapters: Sequence[Adapter], model: nn.Module | None = None
) -> MergePlan:
    """What merging these adapters does to the checkpoint in ``folder``, which is of ``model``, with
    or without weights; None lets a child process build that from the folder's config.
    ``AdapterError``, ``TargetError``: an adapter that cannot be read, or that does not fit the
    model. ``CheckpointError``: the files lack a weight that an adapter changes, or hold it in a way
    that cannot be followed. ``MergeError``: a change that cannot be merged tensor by tensor."""
    if model is not None:
        return _recipe(folder, adapters, model)
    code = f"import sys; from {__name__} import answer; answer(sys.stdin.buffer, sys.stdout.buffer)"
    # -P: no code from the folder that the user happens to be in, which may be one that was
    # downloaded
    command, question = [sys.executable, "-P", "-c", code], pickle.dumps((folder, adapters))
    done = subprocess.run(command, input=question, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise RuntimeError(f"the process that reads the model's names ended with {done.returncode}")
    found = pickle.loads(done.stdout)
    if isinstance(found, VeneerError):
        raise found
    return found


def answer(questions: Any, answers: Any) -> None:
    """The child process: a pickled question in, a pickled recipe or error out."""
    folder, adapters = pickle.load(questions)
    out, sys.stdout = sys.stdout, sys.stderr  # whatever prints, prints elsewhere
    try:
        found: Any = _recipe(folder, adapters, None)
    except VeneerError as error:
        found = error
    finally:
        sys.stdout = out
    pickle.dump(found, answers)


def _recipe(folder: Path, adapters: Sequence[Adapter], model: nn.Module | None) -> MergePlan:
    saved_adapters = [read(path) for path, _ in adapters]
    whole, head = (
        model_with_head(folder, saved_adapters) if model is None else (without_meta(model), None)
    )
    checkpoint = open_checkpoint(folder)
    places = models.map_checkpoint_names(whole, checkpoint.where)
    own, sizes = model is None or whole is not model, {}
    if own and (rows := grow_model(whole, saved_adapters)) is not None:
        ends = {
            id(end.weight)
            for side in ("input", "output")
            if (end := _embeddings(whole, side)) is not None
        }
        into = {
            tensor
            for tensor, where in places.items()
            if {id(_at(whole, place.path)) for place in where} & ends
        }
        sizes = dict.fromkeys(sorted(into), rows)
        checkpoint = grown(checkpoint, sizes)
    attached: dict[str, Adapter] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for number, adapter in enumerate(adapters):
                install_from(
                    whole,
                    adapter[0],
                    f"merged{number}",
                    trainable=False,
                    verify_base=False,
                    untie=False,
                )
                attached[f"merged{number}"] = adapter
            notes = [*_precisions(adapters, saved_adapters), *(str(one.message) for one in caught)]
            notes += [f"The vocabulary grew to {rows} rows." for rows in {*sizes.values()}]
            found = _read_off(whole, attached, saved_adapters, places, checkpoint, notes)
            return replace(found, sizes=sizes, head=head)
        finally:
            for name in attached:
                detach(whole, name)


def _embeddings(model: Any, side: str) -> Any:
    return getattr(model, f"get_{side}_embeddings")()


def _precisions(
    adapters: Sequence[Adapter], saved_adapters: Sequence[AdapterFiles]
) -> Iterator[str]:
    """What a person should know of adapters whose base was packed as they were trained."""
    for (path, _), saved in zip(adapters, saved_adapters, strict=True):
        said = saved.metadata.get("base", {}).get("quantized")
        if said:
            kind = said.get("as", f"{said.get('by')}'s form")
            yield (
                f"{path} was trained on its base in {kind}; it is merged into the weights that this"
                " was made of."
            )


def _read_off(
    model: nn.Module, attached: Mapping[str, Adapter], saved_adapters: Sequence[AdapterFiles],
    places: Mapping[str, tuple[models.Place, ...]], checkpoint: Checkpoint, notes: Sequence[str],
) -> MergePlan:  # fmt: skip
    """The plan that a model with the adapters attached shows; ``places`` are those of each tensor
    in the model."""
    names = {id(value): path for path, value in (*model.named_buffers(), *model.named_parameters())}
    works = _wanted(model, attached, names)
    # the tensors that hold each, and where
    of: dict[str, dict[str, models.Place]] = {path: {} for path in works}
    for tensor, own in places.items():
        for place in own:
            path = names[id(_at(model, place.path))]  # ties go by their first name
            of.setdefault(path, {}).setdefault(tensor, place)
    added = {
        path: tuple(work.shape)
        for path, work in works.items()
        if not of[path] and _is_of_head(path, work)
    }
    of |= {path: {path: models.Place(path)} for path in added}
    checkpoint = with_added(checkpoint, added)
    problems = [
        problem
        for path, work in works.items()
        for problem in _unplaced(path, work, of[path], checkpoint)
    ]
    raise_all(
        CheckpointError, f"The adapters do not fit the files in {checkpoint.folder}", problems
    )
    placed: dict[str, list[TensorEdit]] = {}
    for path, work in works.items():
        for tensor, place in of[path].items():
            placed.setdefault(tensor, []).append(replace(work, place=place))
    fingerprints: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for (adapter, _), saved in zip(attached.values(), saved_adapters, strict=True):
        for at, expected in saved.metadata.get("base", {}).get("weights", {}).items():
            fingerprints.setdefault(names[id(_at(model, at))], {})[str(adapter)] = (
                expected,
                saved.token_ids(at),
            )
    return MergePlan(
        {tensor: tuple(own) for tensor, own in placed.items()},
        {
            path: _whole(of[path])
            for path in works
            if any(place.index for place in of[path].values())
        },
        {path: (_whole(of[path]), works[path].shape, said) for path, said in fingerprints.items()},
        tuple(dict.fromkeys([*notes, *_notes_of_added(model, added, of)])),
        added=added,
    )


def _is_of_head(path: str, work: TensorEdit) -> bool:
    """Whether a parameter may be one that a base without this head lacks: trained in full, outside
    of the blocks."""
    in_full = not work.changes and work.full[0][1].is_floating_point()
    return in_full and not any(part.isdigit() for part in path.split("."))


def _notes_of_added(
    model: nn.Module, added: Mapping[str, Any], of: Mapping[str, Any]
) -> Iterator[str]:
    if added:
        yield f"The base has no {listing(added, 4)}: added from the adapter."
        ids = {id(_at(model, path)) for path in of if of[path]}
        lacking = [path for path, own in model.named_parameters() if id(own) not in ids]
        if lacking:
            yield (
                f"Neither the base nor the adapter has {listing(lacking, 4)}: loading the result"
                " starts it anew."
            )


def _at(model: nn.Module, path: str) -> Tensor:
    above, _, name = path.rpartition(".")
    module = model.get_submodule(above)
    return module._parameters[name] if name in module._parameters else module._buffers[name]  # pyright: ignore[reportReturnType]


def _wanted(
    model: nn.Module, attached: Mapping[str, Adapter], names: Mapping[int, str]
) -> dict[str, TensorEdit]:
    """What happens to each parameter (and running statistic) that an adapter changes, by its
    path."""
    found: dict[str, TensorEdit] = {}
    problems = {name: (*torn(model, name), *no_weights_change(model, name)) for name in attached}
    ties = [f"{attached[name][0]}: {one}" for name, own in problems.items() for one in own]
    raise_all(MergeError, "Nothing was merged", ties)
    for adapter, (_, share) in attached.items():
        for at, module, weight, change in changes(model, adapter):
            target: Any = module._parameters.get(weight)
            rewrites = type(change.layer).apply_forward_rewrite is not Layer.apply_forward_rewrite
            rewrites = rewrites and getattr(module, "max_norm", None) is not None
            if target is None or change.storage.name != "plain" or rewrites:
                text = (
                    f"a change of {parameter_path(at, weight)!r}, which is computed or rewritten as"
                    " it is read"
                )
                do = "merge it in memory (veneer.merge), and save the model"
                raise MergeError(text, "weights that lie in the files as they are used", do)
            work = found.get(names[id(target)], TensorEdit(names[id(target)], target.shape))
            found[work.path] = replace(work, changes=(*work.changes, (share, change)))
        for _, module, part in adapters_of(model, adapter):
            for name, value in {**part.full._parameters, **part.full._buffers}.items():
                target = {**module._parameters, **module._buffers}[name]
                if value is None or target is None:
                    continue
                work = found.get(names[id(target)], TensorEdit(names[id(target)], target.shape))
                # a tie has one copy, under several names
                if not any(value is other for _, other in work.full):
                    found[work.path] = replace(work, full=(*work.full, (share, value.detach())))
    if both := [path for path, work in found.items() if work.changes and work.full]:
        text = f"{listing(both)}, which one adapter changes and another replaces"
        raise MergeError(text, "one or the other", "merge one adapter after the other")
    return found


def _unplaced(
    path: str, work: TensorEdit, places: Mapping[str, models.Place], checkpoint: Checkpoint
):
    """Why the files cannot be merged at one parameter: they lack it, in part or in whole, in
    another shape or dtype."""
    if not places and not work.changes and not work.full[0][1].is_floating_point():
        return  # a counter of a norm, which old files do not have
    covered = (
        torch.zeros(work.shape, dtype=torch.bool) if any(p.index for p in places.values()) else None
    )
    for tensor, place in places.items():
        shape, own = (
            slice_shape(work.shape, place.index),
            slice_shape(checkpoint.shape(tensor), place.within),
        )
        if shape.numel() != own.numel() or (not place.index and shape != own):
            yield sentence(
                f"{tensor!r} of shape {tuple(own)}",
                f"{tuple(shape)}",
                "name the base of the adapter",
            )
        dtype = checkpoint.dtype(tensor)
        if work.changes and dtype not in (
            torch.float64,
            torch.float32,
            torch.bfloat16,
            torch.float16,
        ):
            yield sentence(
                f"{tensor!r} in {dtype}",
                "a floating-point type of at least 16 bits",
                "dequantise it first",
            )
        if covered is not None:
            covered[place.index] = True
        if (
            place.index
            and work.changes
            and type(work.changes[0][1].layer).unfold is not Layer.unfold
        ):
            problem = f"{tensor!r}, a part of {path!r}"
            yield sentence(
                problem,
                "the whole of it in one tensor",
                "merge it in memory (veneer.merge), and save it",
            )
    if not places or (covered is not None and not covered.all()):
        problem = f"no tensor that is {path!r}" + (" as a whole" if places else "")
        yield sentence(
            problem, "every weight that the adapter changes", "name the base that it was trained on"
        )


def _whole(places: Mapping[str, models.Place]) -> tuple[str, ...]:
    """The tensors that hold a parameter, in its order; of several that each hold all of it, one."""
    ordered = sorted(places, key=lambda tensor: [part.start for part in places[tensor].index])
    return tuple(ordered if places[ordered[0]].index else ordered[:1])


class _NeedsBase(Exception):  # noqa: N818 (a question, not an error)
    """A variant asks for the frozen weight."""


def apply(
    work: TensorEdit,
    weight: Tensor,
    dtype: torch.dtype,
    rounding: str,
    compiled: bool,
) -> Folded:
    """The merged part ``weight`` of a tensor, which is not changed: what ``veneer.merge`` writes
    into a live model, bit for bit, with its ``rounding``. ``compiled=False`` leaves numba alone."""
    shape = slice_shape(work.shape, work.place.index)
    dense, lead = weight.reshape(shape), work.changes[0][1]
    dims = lead.dims if not work.place.index else lead.layer.dims(None, shape)
    held = lead.layer.unfold(dense, dims)
    low, gain = _sum([(share, *_resolved(change, work, held)) for share, change in work.changes])
    folded = fold_change(lead, held, low, gain, dtype=dtype, rounding=rounding, compiled=compiled)
    return replace(folded, weight=lead.layer.fold(folded.weight, shape).reshape(weight.shape))


def _resolved(change: Change, work: TensorEdit, held: Tensor) -> tuple[LowRank, Tensor | None]:
    """(ΔW, gain) of the part of the parameter that ``held`` is."""
    if not work.place.index:
        return change.resolve_float64(change.layer.fold(held, work.shape))
    if change.tokens is not None:
        problem = f"trained tokens of {work.path!r}, which the files hold in parts"
        raise MergeError(
            problem, "the whole of it in one tensor", "merge it in memory, and save the model"
        )
    every = slice(None)
    groups, rows = (
        (*work.place.index, every)[:2] if change.dims.groups > 1 else (every, work.place.index[0])
    )

    def need() -> Tensor:
        raise _NeedsBase

    numbers: dict[str, Any] = {
        name: value.double() for name, value in change.adapter_parameters.items()
    }
    try:
        low, _ = change.variant.resolve(numbers, change.scale, need)
    except _NeedsBase:
        if change.rows is not None or numbers.keys() - {"A", "B"} - set(change.variant.peft_keys):
            problem = (
                f"variant {change.variant.name!r} on {work.path!r}, which the files hold in parts"
            )
            raise MergeError(
                problem, "the whole of it in one tensor", "merge it in memory"
            ) from None
        shape = change.dims[:2]
        own = {
            name: value[groups] if name == "A" else value[groups, rows] if name == "B"
            else value.view(shape)[groups, rows].flatten()
            for name, value in numbers.items()
        }  # fmt: skip
        return change.variant.resolve(own, change.scale, lambda: held)
    if change.rows is not None:
        low = low.expand_rows(change.rows, change.dims.out)
    return LowRank(low.A[groups], low.B[groups, rows], low.scale), None


def _sum(parts: Sequence[tuple[float, LowRank, Tensor | None]]) -> tuple[LowRank, Tensor | None]:
    """Σ wᵢ (gᵢ ⊙ (W + ΔWᵢ) − W) as one change G ⊙ (W + ΔW) − W."""
    if len(parts) == 1 and parts[0][0] == 1:
        return parts[0][1:]
    shares, lows, given = zip(*parts, strict=True)
    if all(gain is None for gain in given):
        return LowRank.sum(lows, shares), None
    sizes = lows[0].B.shape[:2]
    gains = [
        torch.ones(sizes).double() if gain is None else gain.double().view(sizes) for gain in given
    ]
    whole = 1 + torch.stack(
        [share * (gain - 1) for share, gain in zip(shares, gains, strict=True)]
    ).sum(0)
    if whole.abs().min() < 1e-6:
        raise MergeError(
            "a row that these weights scale to nothing", "a gain that is not 0", "change them"
        )
    own = [
        low.to(torch.float64).scale_rows(gain / whole)
        for low, gain in zip(lows, gains, strict=True)
    ]
    return LowRank.sum(own, shares), whole.flatten()


def replaced(work: TensorEdit, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The part of a tensor that is trained in full, merged: W + Σ wᵢ (Pᵢ − W), rounded once."""
    values = [(share, value[work.place.index].reshape(weight.shape)) for share, value in work.full]
    if not weight.is_floating_point() or (len(values) == 1 and values[0][0] == 1):
        value = values[0][1]
        return round_once(value.double(), dtype) if value.is_floating_point() else value.to(dtype)
    base = weight.double()
    return round_once(base + sum(share * (value.double() - base) for share, value in values), dtype)
