"""What `make gpu` proves before it measures anything: on a device, every path computes what it computes in float64 on a
processor, by the definition (the layer's own forward on W + ΔW).

``CHECKS`` maps a name to a function of a ``Place``, which returns what it saw in a few words and raises ``Wrong`` or
``Skipped``. The layers and variants are those of the registries. ``tests/cuda`` runs all of them on an emulated device,
and breaks Veneer to see them fail.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # tests/

import torch
import transformers.pytorch_utils  # noqa: F401 (the class of a kind that exists once this is imported)
from tests.support import moe
from tests.support.banks import saved
from tests.support.real_models import REAL
from tests.support.rows import ROWS, rows_of
from tests.support.tiny import tiny_model
from tests.support.toys import bits, calibration, error, example, flat, randomise
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import veneer
from gpu_place import LACKS, Place, Skipped, Watch, refuse_waits, unwatched, waits
from veneer.errors import VeneerError
from veneer.layers import LAYERS
from veneer.train.loss import causal_loss, token_loss
from veneer.variants import VARIANTS

Check = Callable[[Place], str]
CHECKS: dict[str, Check] = {}
#: relative errors that a dtype may bring, of outputs; gradients may have ten times as much, of the largest one
WITHIN = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 5e-3}
#: examples of a kind
EXAMPLES = 3
IDS = torch.randint(3, 250, (3, 17), generator=torch.Generator().manual_seed(5))
ARCHITECTURES = ("llama", "llama-tied-biased", "qwen3-moe", "mixtral", "gpt2", "vit", "resnet18")


class Wrong(AssertionError):  # noqa: N818 (no error of the program)
    """Another result than in float64."""


def check(name: str) -> Callable[[Check], Check]:
    def add(run: Check) -> Check:
        CHECKS[name] = run
        return run

    return add


# ---------------------------------------------------------------------------------------------- comparing


def on(device: Any, tree: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda one: one.detach().to(device), tree)


def wide(tree: Any) -> Any:
    return pytree.tree_map_only(
        torch.Tensor, lambda one: one.detach().cpu().double() if one.is_floating_point() else one.detach().cpu(), tree
    )


def exact(model: Any) -> Any:
    """A copy in float64 on the processor."""
    copies: dict[int, Any] = {}
    for parameter in model.parameters():
        copies[id(parameter)] = nn.Parameter(wide(parameter), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        copies[id(buffer)] = wide(buffer)
    made = copy.deepcopy(model, copies).cpu().double()
    if hasattr(made, "set_experts_implementation"):
        moe.set_way(made, "eager")  # grouped products have no float64
    return made


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 products in float32: cuDNN rounds the inputs of convolutions to 10 bits unless it is told not to."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    products, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before, products


def near(what: str, found: Tensor, wanted: Tensor, within: float) -> None:
    if found.shape != wanted.shape:
        raise Wrong(f"{what}: shape {tuple(found.shape)} for {tuple(wanted.shape)}")
    off = error(found.detach().cpu(), wanted.detach().cpu())
    if not off <= within:  # nor is nan
        raise Wrong(f"{what}: off by {off:.1e}, {within:.0e} is allowed")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def near_gradients(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], within: float) -> None:
    """All of them, each to a part of the largest."""
    if found.keys() != wanted.keys():
        raise Wrong(f"gradients of other parameters: {sorted(found.keys() ^ wanted.keys())[:4]}")
    largest = max((float(one.norm()) for one in wanted.values()), default=0.0)
    for name, one in wanted.items():
        off = float((found[name].detach().cpu().double() - one).norm())
        if not off <= 10 * within * largest:
            raise Wrong(f"gradient of {name}: off by {off / (largest or 1):.1e} of the largest")


def learn(model: Any, run: Callable[[Any], Tensor], watch: Watch = unwatched) -> tuple[Tensor, dict[str, Tensor]]:
    """(output, gradients of its mean square)."""
    if watch is not unwatched:
        run(model)  # the first call finds out what later ones know
    model.zero_grad(set_to_none=True)
    with watch("forward"):
        y = run(model)
    loss = (y.float() if y.itemsize < 4 else y).square().mean()
    with watch("backward"):
        loss.backward()
    return y, gradients(model)


def against_float64(
    place: Place, model: Any, inputs: Any, run: Callable[[Any, Any], Tensor], within: float, case: str = ""
) -> None:
    """The outputs and gradients of an adapted model beside those of its definition."""
    definition = exact(model)
    with veneer.use(definition, "default", path="materialised"):
        wanted, wanted_gradients = learn(definition, lambda one: run(one, wide(inputs)))
    found, found_gradients = learn(model, lambda one: run(one, inputs), named(place, case))
    near("output", found, wanted, within)
    near_gradients(found_gradients, wanted_gradients, within)


def named(place: Place, case: str) -> Watch:
    """The watch of one case of several."""
    return (lambda operation: place.watch(f"{case}-{operation}")) if case else place.watch


def logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def llama(place: Place, dtype: torch.dtype = torch.float32, name: str = "default", size: float = 0.1, **config: Any):
    """(a small Llama on the device with a random adapter, its handle)."""
    model = tiny_model().to(dtype).to(place.device)
    handle = veneer.attach(model, veneer.LoraConfig(rank=4, **{"targets": "all-linear", **config}), name=name)
    randomise(handle, size)
    return model.train(), handle


# ---------------------------------------------------------------------------------------------- layers × variants


def cell(place: Place, module: nn.Module, args: tuple, variant: str, watch: Watch = unwatched) -> None:
    """One layer with one variant: forward, backward, merge, unmerge. ``VeneerError`` if it refuses the variant."""
    device = place.device
    model, inputs = copy.deepcopy(module).to(device), on(device, args)
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
        if any(not torch.equal(one, before[name]) for name, one in bits(model).items()):
            raise Wrong("unmerged: other bits than before")


def lacking(problem: RuntimeError) -> bool:
    """Whether a device has no kernel for something, which is not Veneer's."""
    return any(words in str(problem) for words in LACKS)


def cells(place: Place, kind: str, watch: Callable[[int, str], Watch] = lambda *_: unwatched) -> str:
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


def rows(place: Place, kind: str, watch: Watch = unwatched) -> str:
    """A batch whose rows use two adapters and none: in ``use`` and in a bank, each as in float64 alone."""
    if (kind, 0) not in ROWS:
        raise Skipped("its inputs hold no rows")
    module, args = example(kind)
    count, axis = rows_of(module, args)
    names = list(itertools.islice(itertools.cycle(["a", None, "b"]), count))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), full_precision():
        saved(module, Path(folder), "a", "b")
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


def _mixed(module: nn.Module, args: tuple, names: list, folder: Path, watch: Watch) -> dict[str, Tensor]:
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


# ---------------------------------------------------------------------------------------------- whole models


def architecture(place: Place, name: str) -> str:
    model, inputs, loss = REAL[name].build()
    model, inputs = model.to(place.device), on(place.device, inputs)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all" if name == "resnet18" else "all-linear"))
    randomise(handle, 0.1)

    def run(one: Any, given: Any) -> Tensor:
        output = one(**given)
        return loss(pytree.tree_map_only(torch.Tensor, lambda leaf: leaf.cpu(), output))[None]

    with full_precision():
        against_float64(place, model, inputs, run, 1e-4)
    return f"{len(handle.layers)} layers"


for _name in ARCHITECTURES:
    if _name in REAL:
        CHECKS[f"model, {_name}"] = lambda place, name=_name: architecture(place, name)


@check("a Llama in float32, bfloat16, float16, LoRA and DoRA")
def dtypes(place: Place) -> str:
    for dtype, variant in itertools.product(WITHIN, ("lora", "dora")):
        model, _ = llama(place, dtype, variant=variant)
        against_float64(place, model, IDS.to(place.device), logits, WITHIN[dtype], f"{dtype}-{variant}")
    return f"{len(WITHIN)} dtypes"


@check("autocast, with a GradScaler for float16")
def autocast(place: Place) -> str:
    for base, cast in itertools.product((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)):
        model, handle = llama(place, base)
        wanted, grads = learn(exact(model), lambda one: logits(one, IDS))
        optimiser = torch.optim.SGD(handle.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(place.kind, init_scale=256.0, enabled=cast is torch.float16)
        ids, watch = IDS.to(place.device), named(place, f"{cast}-{base}")
        with torch.autocast(place.kind, dtype=cast):
            logits(model, ids)
            with watch("forward"):
                y = logits(model, ids)
        before = [p.detach().clone() for p in handle.parameters()]
        loss = scaler.scale(y.float().square().mean())
        with watch("backward"):
            loss.backward()
        scaler.unscale_(optimiser)
        near(f"{cast} over {base}", y, wanted, 0.05)
        near_gradients(gradients(model), grads, 0.05)
        scaler.step(optimiser)
        scaler.update()
        if all(torch.equal(one, p) for one, p in zip(before, handle.parameters(), strict=True)):
            raise Wrong(f"{cast} over {base}: a step moved nothing")
    return "4 pairs of dtypes"


@check("activation checkpointing, both kinds, with one of two adapters and dropout's seed")
def checkpointing(place: Place) -> str:
    ids = IDS.to(place.device)
    for reentrant in (False, True):
        model, _ = llama(place, name="a")
        handle = veneer.attach(model, veneer.LoraConfig(rank=4), name="b")
        randomise(handle, 0.1)
        definition = exact(model)
        with veneer.use(definition, "b", path="materialised"):
            _, wanted = learn(definition, lambda one: logits(one, IDS))
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        with veneer.use(model.train(), "b"):
            _, found = learn(model, lambda one: logits(one, ids), named(place, f"reentrant-{reentrant}"))
        near_gradients(found, wanted, 1e-4)
    return "2 kinds"


@check("dropout: backward drops what forward dropped, about as often as it should")
def dropout(place: Place) -> str:
    for p in (0.1, 0.5):
        module: Any = nn.Sequential(nn.Linear(64, 48, bias=False)).to(place.device)
        handle = veneer.attach(module, veneer.LoraConfig(rank=4, targets="all", dropout=p))
        change: Any = handle.changes["0.weight"]
        A, B = change.A[0], change.B[0]
        with torch.no_grad():
            A.uniform_(0.5, 1.0)
            B.uniform_(0.5, 1.0)
        x = torch.randn(33, 64, device=place.device, requires_grad=True)
        y = module.train()(x)
        y.sum().backward()
        assert x.grad is not None
        through = (x.grad - module[0].weight.sum(0)) * (1 - p) / change.scale
        whole = (B.sum(0) @ A).expand_as(x)
        kept = (through > whole / 2).float()
        near(f"p={p}, gradient", through, kept * whole, 1e-3)
        update = (kept * x) @ A.mT @ B.mT * (change.scale / (1 - p))
        near(f"p={p}, forward", y, x @ module[0].weight.mT + update, 1e-3)
        share = 1 - kept.mean().item()
        if not abs(share - p) < 0.05:
            raise Wrong(f"p={p}: {share:.2f} dropped")
    return "0.1 and 0.5"


@check("torch.compile and torch.export")
def compiled(place: Place) -> str:
    backend = "inductor" if place.kind == "cuda" and torch.version.cuda else "aot_eager"
    model, _ = llama(place, name="a")
    randomise(veneer.attach(model, veneer.LoraConfig(rank=4), name="b"), 0.1)
    ids, definition = IDS.to(place.device), exact(model)
    torch._dynamo.reset()
    run = torch.compile(lambda ids: logits(model, ids), fullgraph=True, backend=backend)
    for name in "ba":  # no graph is made anew
        with veneer.use(definition, name):
            wanted = logits(definition, IDS)
        with veneer.use(model, name):
            near(f"compiled by {backend}", run(ids), wanted, 1e-4)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return logits(self.model, ids)

    with veneer.use(model, "a"):
        exported = torch.export.export(Logits(), (ids,), strict=False)
    near("exported", exported.module()(ids), wanted, 1e-4)
    return backend


@check("merging into bfloat16 gives the bits that the processor gives; unmerging gives the old ones back")
def merge_bits(place: Place) -> str:
    models = [tiny_model().to(torch.bfloat16), tiny_model().to(torch.bfloat16).to(place.device)]
    handles = [veneer.attach(model, veneer.LoraConfig(rank=4)) for model in models]
    randomise(handles[0], 0.01)
    models[1].load_state_dict(models[0].state_dict())
    before = {name: p.clone() for name, p in models[1].named_parameters()}
    for handle in handles:
        handle.merge(rounding="nearest")
    for (name, one), (_, other) in zip(*(model.named_parameters() for model in models), strict=True):
        if not torch.equal(one, other.cpu()):
            raise Wrong(f"{name}: other bits than on the processor")
    handles[1].unmerge()
    if not all(torch.equal(p, before[name]) for name, p in models[1].named_parameters()):
        raise Wrong("unmerged: other bits than before")
    return f"{len(before)} tensors"


@check("blends and rows of a bank, behind a prompt too")
def blends(place: Place) -> str:
    choices: list[Any] = ["a", None, {"a": 0.5, "b": 0.25}, "b", "a", None]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model = tiny_model()
        for name, rank in (("a", 2), ("b", 5)):
            saved(model, Path(folder), name, config=veneer.LoraConfig(rank=rank), size=0.1)
        definition = exact(model)
        for name in "ab":
            veneer.load(definition, Path(folder) / name, name=name)
        bank = veneer.Bank(model.to(place.device))
        for name in "ab":
            bank.add(Path(folder) / name)
        for tokens in (1, 12):
            ids = torch.randint(3, 250, (6, tokens))
            ids_there = ids.to(place.device)
            with bank.rows(choices):
                logits(model, ids_there)
                with place.watch(f"{tokens}-tokens"):
                    mixed = logits(model, ids_there)
            for row, choice in enumerate(choices):
                with veneer.use(definition, choice):
                    near(f"row {row}", mixed[row], logits(definition, ids[row : row + 1])[0], 1e-4)
        bank.close()
    return f"{len(choices)} rows"


@check("the engine: prompts, and decoding behind them")
def engine(place: Place) -> str:
    from veneer.serve.forward import Forward
    from veneer.serve.slots import Slots

    model, _ = llama(place)
    model.eval()
    ids = [[4, 5, 6, 9], [7, 8, 3, 11]]
    wanted = logits(exact(model), torch.tensor(ids))
    forward, slots = Forward(model), Slots(2, 64, place.device)
    with torch.inference_mode():
        first = forward.fill(slots, 0, [row[:2] for row in ids])
        near("prompt", first, wanted[:, 1], 1e-4)
        for column in (2, 3):
            with place.watch(f"decode-{column}"):
                y = forward.decode(slots, [row[column] for row in ids], [column] * 2)
            near(f"column {column}", y, wanted[:, column], 1e-4)
    forward.close()
    return "2 rows"


@check("experts: eager, batched and grouped products, five architectures")
def experts(place: Place) -> str:
    seen = 0
    for name, way in itertools.product(moe.MODELS, moe.IMPLEMENTATIONS):
        dtype = torch.bfloat16 if way == "grouped_mm" and place.kind == "cuda" else torch.float32
        _, module = moe.attached(name, way, dtype)
        args = moe.inputs_for(module, dtype)
        y, leaves, x = moe.definition(module, args)
        wanted = torch.autograd.grad(y.square().sum(), [*leaves, x])
        module = module.to(place.device)
        inputs = on(place.device, args)
        inputs[0].requires_grad_()
        own = [p for _, p in module.named_parameters() if p.requires_grad]
        watch = named(place, f"{name}-{way}")
        module(*inputs)
        with watch("forward"):
            found_y = module(*inputs)
        loss = found_y.float().square().sum()
        with watch("backward"):
            found = torch.autograd.grad(loss, [*own, inputs[0]])
        near(f"{name}, {way}", found_y, y, WITHIN[dtype])
        names = [str(number) for number in range(len(wanted))]
        near_gradients(dict(zip(names, found, strict=True)), dict(zip(names, wanted, strict=True)), WITHIN[dtype])
        seen += 1
    return f"{seen} of {len(moe.MODELS)} × {len(moe.IMPLEMENTATIONS)}"


@check("4 bits (bitsandbytes): LoRA and DoRA, merge and unmerge")
def four_bits(place: Place) -> str:
    try:
        bnb: Any = importlib.import_module("bitsandbytes")
    except ImportError as problem:
        raise Skipped("bitsandbytes is not installed") from problem
    for nested, variant in itertools.product((False, True), ("lora", "dora")):
        more = {"quant_type": "nf4", "compress_statistics": nested}
        layer = bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, **more)
        layer.weight = bnb.nn.Params4bit(torch.randn(32, 64), requires_grad=False, **more)
        model = nn.Sequential(layer).to(place.device)
        plain = nn.Sequential(nn.Linear(64, 32, bias=False))
        plain[0].weight.data = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).cpu().float()
        handles = [
            veneer.attach(one, veneer.LoraConfig(rank=4, targets="all", variant=variant)) for one in (model, plain)
        ]
        randomise(handles[0], 0.1)
        for mine, theirs in zip(*(handle.parameters() for handle in handles), strict=True):
            theirs.data.copy_(mine.data)
        x = torch.randn(4, 8, 64)
        with veneer.use(definition := exact(plain), "default", path="materialised"):
            wanted, grads = learn(definition, lambda one, x=x: one(x.double()))
        there, watch = x.to(place.device), named(place, f"{variant}-{nested}")
        found, found_grads = learn(model, lambda one, there=there: one(there), watch)
        near(f"{variant}, double {nested}", found, wanted, 1e-3)
        near_gradients(found_grads, grads, 1e-3)
        before = bits(model)
        handles[0].merge()
        near("merged", model(x.to(place.device)), wanted, 0.2)  # as far as 16 levels go
        handles[0].unmerge()
        if any(not torch.equal(one, before[name]) for name, one in bits(model).items()):
            raise Wrong("unmerged: other bits than before")
    return "4 cases"


@check("float64 on the device itself, and a gradient of a gradient")
def double(place: Place) -> str:
    if not place.wide:
        raise Skipped("the device has no float64")
    module = nn.Sequential(nn.Linear(6, 5)).double().to(place.device)
    randomise(veneer.attach(module, veneer.LoraConfig(rank=2, targets="all")))
    x = torch.randn(3, 6, dtype=torch.float64, device=place.device, requires_grad=True)
    torch.autograd.gradcheck(module, (x,))
    torch.autograd.gradgradcheck(module, (x,))
    return "gradcheck, gradgradcheck"


# ---------------------------------------------------------------------------------------------- several devices


@check("two GPUs by accelerate's device map: a step, merge, unmerge")
def spread(place: Place) -> str:
    if place.count < 2:
        raise Skipped(f"two GPUs are needed, and there is {place.count}")
    import accelerate

    model = tiny_model(tie_word_embeddings=False)
    first, second = ("model.embed_tokens", "model.layers.0", "model.rotary_emb"), ("model.layers.1", "model.norm")
    where: dict[str, Any] = {**dict.fromkeys(first, 0), **dict.fromkeys((*second, "lm_head"), 1)}
    randomise(handle := veneer.attach(model, veneer.LoraConfig(rank=4)), 0.1)
    wanted, grads = learn(exact(model), lambda one: logits(one, IDS))
    model = accelerate.dispatch_model(model, where, force_hooks=True)
    ids = IDS.to(place.device)
    found, found_grads = learn(model, lambda one: logits(one, ids), place.watch)
    near("output", found, wanted, 1e-4)
    near_gradients(found_grads, grads, 1e-4)
    handle.merge()
    near("merged", logits(model, ids), wanted, 1e-3)
    handle.unmerge()
    return f"{place.count} GPUs"


@check("offloaded weights are refused before anything changes")
def offloaded(place: Place) -> str:
    import accelerate

    model = accelerate.cpu_offload(tiny_model(tie_word_embeddings=False), execution_device=place.device)
    try:
        veneer.attach(model, veneer.LoraConfig(rank=4))
    except VeneerError:
        if any("veneer" in name for name, _ in model.named_modules()):
            raise Wrong("refused, and half attached") from None
        return "refused"
    raise Wrong("attached to weights that are on no device")


# ---------------------------------------------------------------------------------------------- waits


@check("a training step: no wait of the host in forward and backward (set_sync_debug_mode)")
def no_waits(place: Place) -> str:
    ids = IDS.to(place.device)
    mask = torch.full((1, 1, ids.shape[1], ids.shape[1]), -1e9, device=place.device).triu(1)  # else transformers waits
    labels = ids.clone()
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    cases: dict[str, dict[str, Any]] = {
        "plain": {}, "dropout": {"dropout": 0.1}, "DoRA": {"variant": "dora"}, "every layer": {"targets": "all"}
    }  # fmt: skip
    for what, config in cases.items():
        for dtype in (torch.float32, torch.bfloat16):
            model, _ = llama(place, dtype, **config)
            given = {**batch, "attention_mask": mask.to(dtype)}

            def step(model: Any = model, given: Any = given) -> None:
                token_loss(model, given, count=labels[:, 1:].numel()).total.backward()

            step()
            if places := waits(place, step):
                raise Wrong(f"{what}, {dtype}: {len(places)} waits, first at {places[0]}")
            refuse_waits(place, step)
    model, _ = llama(place)
    causal_loss(model, batch).backward()
    places = waits(place, lambda: causal_loss(model, batch).backward())
    if len(places) > 1:
        raise Wrong(f"causal_loss: {len(places)} waits, {', '.join(places)}")
    return f"{len(cases)} cases, and {len(places)} to find the labels"


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
            return {"check": name, "found": "wrong", "text": f"{type(problem).__name__}: {problem}"[:500]}
