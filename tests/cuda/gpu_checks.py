"""What `make gpu` proves before it measures anything: on a device, every path computes what it
computes in float64 on a processor, by the definition (the layer's own forward on W + ΔW). Here are
the layers and variants, which are those of the registries; whole models are in
``gpu_model_checks.py``.

``tests/cuda`` runs all of it on an emulated device, and breaks Veneer to see it fail.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers.pytorch_utils  # noqa: F401 (the class of a kind that exists once this is imported)
from tests.cuda import gpu_model_checks  # noqa: F401 (which adds its own)
from tests.cuda.gpu_compare import (
    CHECKS,
    Wrong,
    exact,
    full_precision,
    gradients,
    learn,
    near,
    near_gradients,
    on,
    same_bits,
    wide,
)
from tests.support.banks import save_adapters
from tests.support.rows import ROWS, rows_of
from tests.support.toys import bits, calibration, example, flat, randomise
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import veneer
from gpu_place import LACKS, Place, Skipped, Watch, no_watch
from veneer.errors import VeneerError
from veneer.layers import LAYERS
from veneer.variants import VARIANTS

#: examples of a kind
EXAMPLES = 3


def cell(
    place: Place, module: nn.Module, args: tuple, variant: str, watch: Watch = no_watch
) -> None:
    """One layer with one variant: forward, backward, merge, unmerge. ``VeneerError`` if it refuses
    the variant."""
    device = place.device
    model, inputs = copy.deepcopy(module).to(device), on(device, args)
    # cuDNN's RNNs have no backward in eval mode
    model.train(any(isinstance(part, nn.RNNBase) for part in module.modules()))
    config = veneer.LoraConfig(rank=1, targets="all", variant=variant)
    handle = veneer.attach(model, config, **calibration(model, variant, inputs))
    randomise(handle)
    definition = exact(model)
    with veneer.use(definition, "default", path="materialised"):
        wanted, wanted_gradients = learn(definition, lambda one: flat(one(*wide(args))))
    flat(model(*inputs))  # the first call may find out what later ones know
    with watch("forward"):
        y = model(*inputs)
    loss = flat(y).float().square().mean()
    with watch("backward"):
        loss.backward()
    near("output", flat(y), wanted, 1e-4)
    near_gradients(gradients(model), wanted_gradients, 1e-4)
    del y, loss
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        before = bits(model)
        with watch("merge"):
            handle.merge()
        near("merged", flat(model(*inputs)), wanted, 1e-3)
        with watch("unmerge"):
            handle.unmerge()
        same_bits(model, before)


def lacking(problem: RuntimeError) -> bool:
    """Whether a device has no kernel for something, which is not Veneer's."""
    return any(words in str(problem) for words in LACKS)


def cells(place: Place, kind: str, watch: Callable[[int, str], Watch] = lambda *_: no_watch) -> str:
    """Every variant on the examples of a kind: what came of the cells."""
    seen: Counter[str] = Counter()
    count = min(EXAMPLES, sum(1 for _ in LAYERS[kind].examples()))
    for number, variant in itertools.product(range(count), VARIANTS.names()):
        module, args = example(kind, number)
        try:
            with full_precision():
                cell(place, module, args, variant, watch(number, variant))
            seen["cells"] += 1
        except VeneerError:
            seen["refused, as everywhere"] += 1  # by the layer or the variant
        except RuntimeError as problem:
            if not lacking(problem):
                raise
            seen["without a kernel on this device"] += 1
        except Wrong as problem:
            raise Wrong(f"example {number} with {variant}, {problem}") from problem
    return ", ".join(f"{number} {what}" for what, number in seen.items())


def rows(place: Place, kind: str, watch: Watch = no_watch) -> str:
    """A batch whose rows use two adapters and none: in ``use`` and in a bank, each as in float64
    alone."""
    if (kind, 0) not in ROWS:
        raise Skipped("its inputs hold no rows")
    module, args = example(kind)
    count, axis = rows_of(module, args)
    names = list(itertools.islice(itertools.cycle(["a", None, "b"]), count))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), full_precision():
        save_adapters(module, Path(folder), "a", "b")
        definition = exact(module)
        for name in "ab":
            veneer.load(definition, Path(folder) / name, name=name)
        whole = {}
        for name in {*names}:
            with veneer.use(definition, name, path=None if name is None else "materialised"):
                whole[name] = pytree.tree_leaves(definition(*wide(args)))[0]
        module, args = module.to(place.device), on(place.device, args)
        try:
            module(*args)
        except RuntimeError as problem:
            if lacking(problem):
                raise Skipped("no kernel on this device") from problem
            raise
        found = _mixed(module, args, names, Path(folder), watch)
    for where, y in found.items():
        for row, name in enumerate(names):
            near(f"{where}, row {row}", y.select(axis, row), whole[name].select(axis, row), 1e-5)
    return f"{count} rows"


def _mixed(
    module: nn.Module, args: tuple, names: list, folder: Path, watch: Watch
) -> dict[str, Tensor]:
    def run(where: str) -> Tensor:
        pytree.tree_leaves(module(*args))
        with watch(where):
            return pytree.tree_leaves(module(*args))[0]

    found = {}
    handles = [veneer.load(module, folder / name, name=name) for name in "ab"]
    with veneer.use(module, names):
        found["rows"] = run("rows")
    for handle in handles:
        handle.detach()
    bank = veneer.Bank(module)
    for name in "ab":
        bank.add(folder / name)
    with bank.rows(names):
        found["bank"] = run("bank")
    bank.close()
    return found


for _kind in LAYERS.names():
    CHECKS[f"{_kind}: every variant"] = lambda place, kind=_kind: cells(place, kind)
    CHECKS[f"{_kind}: rows and bank"] = lambda place, kind=_kind: rows(place, kind)


def run(place: Place, name: str) -> dict[str, Any]:
    """One check, as a row of the result: "right", "wrong" or "skipped", and why."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return {"check": name, "found": "right", "text": CHECKS[name](place)}
        except Skipped as why:
            return {"check": name, "found": "skipped", "text": str(why)}
        except Wrong as why:
            return {"check": name, "found": "wrong", "text": str(why)}
        except Exception as problem:  # what a device does that nobody foresaw is a result too
            return {
                "check": name,
                "found": "wrong",
                "text": f"{type(problem).__name__}: {problem}"[:500],
            }
