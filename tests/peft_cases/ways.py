"""One row in every way.

    load      PEFT makes an adapter with random numbers and saves it. A fresh base with the folder by ``veneer.load``
              gives what a fresh base with the folder by PEFT gives
    merge     so do the merged weights
    off       without the adapter, unmerged and detached, the base's own outputs are back, and unmerged its very bits
    around    what we save of PEFT's folder, PEFT loads, and gives its first outputs
    save      ``veneer.attach`` by the translated config, random numbers, saved: PEFT loads it and gives our outputs
    targets   the translated config means the modules that PEFT adapts

A row that cannot be loaded ends there: it is refused once, and not for each way that would begin
with loading.
"""

from __future__ import annotations

import copy
import functools
import json
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from tests.support.toys import bits, error, flat, randomise
from torch import Tensor, nn

import veneer
from veneer.errors import VeneerError

from .architectures import ARCHITECTURES
from .models import MODELS
from .rows import Row
from .translate import UntranslatedError, translated

EQUAL, REFUSED, WRONG = "equal", "refused", "wrong"
NOISE = 0.3


@dataclass(frozen=True)
class Result:
    """What came of one case in one way; ``text`` says why, unless it is equal."""

    family: str
    name: str
    way: str
    status: str
    text: str = ""


class DiffersError(AssertionError):
    """Two outputs that must be equal are not."""


@functools.cache
def _built(name: str, single: bool) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], float]:
    """(a pristine model, arguments, keyword arguments, how far equal outputs may be apart)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name in MODELS:
            build, inputs = MODELS[name]
            dtype, within = (torch.float32, 2e-5) if single else (torch.float64, 1e-9)
            model, args = build().to(dtype).eval(), inputs()
            return (
                model,
                tuple(x.to(dtype) if x.is_floating_point() else x for x in args),
                {},
                within,
            )
        model, example = ARCHITECTURES[name]()
        return model, (), example, 2e-5


def built(row: Row) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], float]:
    return _built(row.model, row.single)


def fresh(row: Row) -> nn.Module:
    return copy.deepcopy(built(row)[0])


def near(row: Row) -> float:
    return built(row)[3]


@torch.no_grad()
def output(row: Row, model: nn.Module, **more: Any) -> Tensor:
    _, args, keywords, _ = built(row)
    return flat(model(*args, **keywords, **more)).clone()


def seed(row: Row, more: str = "") -> None:
    torch.manual_seed(zlib.crc32(f"{row.name} {more}".encode()))


def must_equal(actual: Tensor, expected: Tensor, within: float, what: str) -> None:
    if actual.shape != expected.shape or not error(actual, expected) <= within:
        apart = error(actual, expected) if actual.shape == expected.shape else float("nan")
        raise DiffersError(f"{what}: {apart:.1e} apart")


def must_change(actual: Tensor, base: Tensor, what: str) -> None:
    if not error(actual, base) > 1e-4:
        raise DiffersError(f"{what} changes nothing, so that the row shows nothing")


# ---- PEFT's side
# -------------------------------------------------------------------------------------------------


@torch.no_grad()
def noise(theirs: nn.Module, size: float) -> None:
    """Random numbers in everything that PEFT trains, so that nothing is hidden by a zero. What A
    has for a padding token stays: it has no gradient."""
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad and "ranknum" not in name.split(
            "."
        ):  # AdaLoRA's count of ranks is no number to train
            parameter.add_(torch.randn_like(parameter) * size)
    for module in theirs.modules():
        padding = (
            getattr(module.get_base_layer(), "padding_idx", None)
            if isinstance(module, LoraLayer)
            else None
        )
        for A in module.lora_embedding_A.values() if padding is not None else ():
            A[:, padding] = 0


def by_peft(row: Row, folder: Path) -> tuple[nn.Module, Path]:
    """(PEFT's model with the row's adapter, the folder that PEFT wrote)."""
    seed(row)
    model, start = fresh(row), None
    theirs = peft.get_peft_model(model, row.config()).eval()
    if row.converted:
        start = folder / "start"
        theirs.save_pretrained(start)
    noise(theirs, row.noise)
    if row.as_lora is not None:
        from peft import save_as_lora

        save_as_lora(folder / "theirs", theirs, rank=row.as_lora)
    elif row.converted:
        theirs.save_pretrained(
            folder / "theirs", path_initial_model_for_weight_conversion=str(start)
        )
    else:
        theirs.save_pretrained(folder / "theirs", save_embedding_layers=False)
    return theirs, folder / "theirs"


def peft_loads(row: Row, folder: Path) -> nn.Module:
    seed(row, "load")
    return peft.PeftModel.from_pretrained(fresh(row), folder).eval()


def adapted(theirs: nn.Module) -> set[str]:
    """The paths of the modules that PEFT wrapped for a low-rank change."""
    wrapped = theirs.base_model.model.named_modules()
    return {
        path.replace(".base_layer", "") for path, module in wrapped if isinstance(module, LoraLayer)
    }


# ---- the ways
# ----------------------------------------------------------------------------------------------------


def tried(family: str, name: str, way: str, run: Callable[[], Any]) -> Result:
    """What ``run`` comes to. Only Veneer's own errors are refusals; any other one is wrong."""
    try:
        run()
    except VeneerError as refusal:
        return Result(family, name, way, REFUSED, str(refusal))
    except DiffersError as difference:
        return Result(family, name, way, WRONG, str(difference))
    except (
        Exception
    ) as failure:  # of a case among hundreds: the table shows it, and the program fails
        return Result(family, name, way, WRONG, f"{type(failure).__name__}: {failure}")
    return Result(family, name, way, EQUAL)


def _tried(row: Row, way: str, run: Callable[[], Any]) -> Result:
    return tried(row.family, row.name, way, run)


def results(row: Row) -> Iterator[Result]:
    """The results of one row, in the order of the ways above."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = output(row, fresh(row))
        try:
            made, written = by_peft(row, folder)
            reference = output(row, peft_loads(row, written))
            if not row.reloads:
                must_equal(reference, output(row, made), near(row) * 10, "PEFT's own reload")
            must_change(reference, base, row.name)
        except Exception as failure:  # the row is no case: PEFT itself cannot do it
            yield Result(
                row.family,
                row.name,
                "PEFT",
                WRONG,
                f"PEFT itself: {type(failure).__name__}: {failure}",
            )
            return
        yield from _from_peft(row, written, folder, base, reference)
        yield from _to_peft(row, folder, base, made)


def _from_peft(
    row: Row, written: Path, folder: Path, base: Tensor, reference: Tensor
) -> Iterator[Result]:
    model = fresh(row)
    before = bits(model)

    def load() -> None:
        veneer.load(model, written)
        must_equal(output(row, model), reference, near(row), "loaded")

    yield (loaded := _tried(row, "load", load))
    if loaded.status != EQUAL:
        return

    def around() -> None:
        ours = veneer.save(model, folder / "around")
        must_be_for_peft(ours)
        must_equal(output(row, peft_loads(row, ours)), reference, near(row), "around")

    yield _tried(row, "around", around)

    def merge() -> None:
        veneer.merge(model, "default")
        must_equal(output(row, model), reference, 10 * near(row), "merged")

    yield (merged := _tried(row, "merge", merge))
    if merged.status != EQUAL:
        return

    def off() -> None:
        veneer.unmerge(model)
        for key, value in bits(model).items():
            if not torch.equal(value, before[key]):
                raise DiffersError(f"unmerged: {key} has other bits")
        must_equal(output(row, model), reference, near(row), "unmerged")
        with veneer.use(model, None):
            must_equal(output(row, model), base, near(row), "switched off")
        veneer.detach(model)
        must_equal(output(row, model), base, near(row), "detached")

    yield _tried(row, "off", off)


def must_be_for_peft(folder: Path) -> None:
    """Raise VeneerError with the reason that a folder gives for not being PEFT's."""
    said = json.loads((folder / "adapter_config.json").read_text())["peft_type"]
    if said != "LORA":
        raise NotForPeftError(said)


class NotForPeftError(VeneerError):
    """A folder of ours that PEFT refuses, as it would compute something else: the text is the
    folder's own."""

    def __init__(self, said: str) -> None:
        Exception.__init__(self, said)


def _to_peft(row: Row, folder: Path, base: Tensor, made: nn.Module) -> Iterator[Result]:
    try:
        fields, start = translated(row, made)
    except UntranslatedError:
        return  # docs/from-peft.md has no config of ours that means this: the way does not exist
    seed(row, "ours")
    model = fresh(row)

    def attach() -> None:
        handle = veneer.attach(model, veneer.LoraConfig.from_dict(fields), **start(model))
        if row.tuner == "lora":
            expected = {_first_name(row, path) for path in adapted(made)}
            low = (
                path for path, change in handle.changes.items() if change.rank
            )  # rank 0: trained tokens alone
            changed = {_first_name(row, path.rpartition(".")[0]) for path in low}
            if changed != expected:
                raise DiffersError(
                    f"PEFT adapts {sorted(expected)}, this config means {sorted(changed)}"
                )

    yield (attached := _tried(row, "targets", attach))
    if attached.status != EQUAL:
        return

    def save() -> None:
        randomise(veneer.Handle(model, "default"), row.noise)
        ours = output(row, model)
        must_change(ours, base, "ours")
        path = veneer.save(model, folder / "ours")
        must_be_for_peft(path)
        must_equal(output(row, peft_loads(row, path)), ours, near(row), "saved")

    yield _tried(row, "save", save)


def _first_name(row: Row, path: str) -> str:
    """The first module with the weight of the one at ``path``: a tied weight has one change."""
    modules = dict(built(row)[0].named_modules())
    weight = modules[path]._parameters.get("weight")
    alike = (name for name, module in modules.items() if module._parameters.get("weight") is weight)
    return path if weight is None else next(alike)
