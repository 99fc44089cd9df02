"""Checks of `make gpu` on whole models: every dtype and mode of precision, checkpointing,
compilation, experts, 4 bits, banks, the engine, several devices, and that the host does not wait.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from tests.cuda.gpu_compare import (
    CHECKS,
    IDS,
    WITHIN,
    Wrong,
    against_float64,
    check,
    exact,
    full_precision,
    gradients,
    learn,
    llama,
    logits,
    named,
    near,
    near_gradients,
    on,
    same_bits,
)  # fmt: skip
from tests.support import moe
from tests.support.banks import save_adapters
from tests.support.real_models import REAL
from tests.support.tiny import tiny_model
from tests.support.toys import bits, randomise
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import veneer
from gpu_place import Place, Skipped, import_library, refuse_waits, waits
from veneer.errors import VeneerError
from veneer.train.loss import causal_loss, token_loss

ARCHITECTURES = ("llama", "llama-tied-biased", "qwen3-moe", "mixtral", "gpt2", "vit", "resnet18")


def architecture(place: Place, name: str) -> str:
    model, inputs, loss = REAL[name].build()
    model, inputs = model.to(place.device), on(place.device, inputs)
    handle = veneer.attach(
        model, veneer.LoraConfig(rank=2, targets="all" if name == "resnet18" else "all-linear")
    )
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
        against_float64(
            place, model, IDS.to(place.device), logits, WITHIN[dtype], f"{dtype}-{variant}"
        )
    return f"{len(WITHIN)} dtypes"


@check("autocast, with a GradScaler for float16")
def autocast(place: Place) -> str:
    for base, cast in itertools.product(
        (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)
    ):
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


@check("activation checkpointing, both kinds, with one of two adapters")
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
            _, found = learn(
                model, lambda one: logits(one, ids), named(place, f"reentrant-{reentrant}")
            )
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
    # on CUDA, inductor's Triton needs a C compiler and Python's headers
    has_compiler = (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")) and (
        Path(sysconfig.get_paths()["include"], "Python.h").exists()
    )
    is_cuda = place.kind == "cuda" and torch.version.cuda
    backend = "inductor" if is_cuda and has_compiler else "aot_eager"
    model, _ = llama(place, name="a", layers=1)
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


@check(
    "merging into bfloat16 gives the bits that the processor gives; unmerging gives the old ones back"
)
def merge_bits(place: Place) -> str:
    models = [tiny_model().to(torch.bfloat16), tiny_model().to(torch.bfloat16).to(place.device)]
    handles = [veneer.attach(model, veneer.LoraConfig(rank=4)) for model in models]
    randomise(handles[0], 0.01)
    models[1].load_state_dict(models[0].state_dict())
    before = {name: p.clone() for name, p in models[1].named_parameters()}
    for handle in handles:
        handle.merge(rounding="nearest")
    for (name, one), (_, other) in zip(
        *(model.named_parameters() for model in models), strict=True
    ):
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
            save_adapters(model, Path(folder), name, config=veneer.LoraConfig(rank=rank), size=0.1)
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
    from veneer.models.decode.forward import Forward
    from veneer.models.decode.slots import Slots

    model, _ = llama(place)
    model.eval()
    ids = [[4, 5, 6, 9], [7, 8, 3, 11]]
    wanted = logits(exact(model), torch.tensor(ids))
    forward, slots = Forward(model), Slots(2, 64, place.device)
    with torch.inference_mode():
        rows: Any = [slots.allocate(64), slots.allocate(64)]
        first = forward.fill(slots, rows, [row[:2] for row in ids])
        near("prompt", first, wanted[:, 1], 1e-4)
        for column in (2, 3):
            with place.watch(f"decode-{column}"):
                y = forward.decode(slots, rows, [row[column] for row in ids], [column] * 2)
            near(f"column {column}", y, wanted[:, column], 1e-4)
    forward.close()
    return "2 rows"


@check("experts: eager, batched and grouped products, five architectures")
def experts(place: Place) -> str:
    seen = 0
    for name, way in itertools.product(moe.MODELS, moe.IMPLEMENTATIONS):
        dtype = torch.bfloat16 if way == "grouped_mm" and place.kind == "cuda" else torch.float32
        _, module = moe.attach_adapter(name, way, dtype)
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
        near_gradients(
            dict(zip(names, found, strict=True)),
            dict(zip(names, wanted, strict=True)),
            WITHIN[dtype],
        )
        seen += 1
    return f"{seen} of {len(moe.MODELS)} × {len(moe.IMPLEMENTATIONS)}"


@check("4 bits (bitsandbytes): LoRA and DoRA, merge and unmerge")
def four_bits(place: Place) -> str:
    bnb = import_library("bitsandbytes")
    for nested, variant in itertools.product((False, True), ("lora", "dora")):
        more = {"quant_type": "nf4", "compress_statistics": nested}
        layer = bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, **more)
        layer.weight = bnb.nn.Params4bit(torch.randn(32, 64), requires_grad=False, **more)
        model = nn.Sequential(layer).to(place.device)
        plain = nn.Sequential(nn.Linear(64, 32, bias=False))
        plain[0].weight.data = (
            bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            .cpu()
            .float()
        )
        case = f"{variant}, double {nested}", f"{variant}-{nested}"
        handle, x, wanted = beside_dense(place, *case, model, plain, variant=variant)
        before = bits(model)
        handle.merge()
        near("merged", model(x), wanted, 0.2)  # as far as 16 levels go
        handle.unmerge()
        same_bits(model, before)
    return "4 cases"


def beside_dense(
    place: Place, what: str, case: str, packed: nn.Module, plain: nn.Module, **config: Any
) -> tuple[veneer.Handle, Tensor, Any]:
    """A packed model beside the dense one of the same numbers and adapter: (its handle, x, the
    output in float64)."""
    handles = [
        veneer.attach(one, veneer.LoraConfig(rank=4, targets="all", **config))
        for one in (packed, plain)
    ]
    randomise(handles[0], 0.1)
    for mine, theirs in zip(*(handle.parameters() for handle in handles), strict=True):
        theirs.data.copy_(mine.data)
    x = torch.randn(4, 8, 64)
    there = x.to(place.device)
    with veneer.use(definition := exact(plain), "default", path="materialised"):
        wanted, grads = learn(definition, lambda one: one(x.double()))
    found, found_grads = learn(
        packed, lambda one: one(there), named(place, case) if case else place.watch
    )
    near(what, found, wanted, 1e-3)
    near_gradients(found_grads, grads, 1e-3)
    return handles[0], there, wanted


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


@check("activations kept in the processor's memory (save_on_cpu)")
def activations_elsewhere(place: Place) -> str:
    model, _ = llama(place)
    _, wanted = learn(exact(model), lambda one: logits(one, IDS))
    with torch.autograd.graph.save_on_cpu():
        _, found = learn(model, lambda one: logits(one, IDS.to(place.device)))
    near_gradients(found, wanted, 1e-4)
    return f"{len(found)} gradients"


@check("8 bits (torchao): forward and backward")
def eight_bits(place: Place) -> str:
    quantization = import_library("torchao.quantization")
    module = nn.Sequential(nn.Linear(64, 32, bias=False))
    quantization.quantize_(module, quantization.Int8WeightOnlyConfig())
    plain = nn.Sequential(nn.Linear(64, 32, bias=False))
    stored: Any = module[0].weight
    plain[0].weight.data = stored.dequantize().float()
    beside_dense(place, "output", "", module.to(place.device), plain)
    return "int8 weights"


@check("an adapter is saved, loaded and checked on the device")
def files(place: Place) -> str:
    model, handle = llama(place)
    model.eval()
    wanted = logits(exact(model), IDS)
    with tempfile.TemporaryDirectory() as folder:
        handle.save(Path(folder) / "a")
        handle.detach()
        veneer.load(model, Path(folder) / "a")
    near("loaded", logits(model, IDS.to(place.device)), wanted, 1e-4)
    veneer.check(model, {"input_ids": IDS.to(place.device), "use_cache": False})
    return f"{len(handle.layers)} layers"


@check("optimisers: AdaLoRA's budget of ranks, LoRA+, LoRA-FA")
def optimisers(place: Place) -> str:
    from veneer import optim

    ids = IDS.to(place.device)
    model, handle = llama(place, variant="adalora")
    budget = optim.RankBudget(handle, final_rank=2, total_steps=4, warmup=0, final=1)
    stepping: Any = torch.optim.SGD(handle.parameters(), lr=0.1)
    for number in range(1, 4):
        (logits(model, ids).square().mean() + 0.1 * optim.regulariser(handle)).backward()
        stepping.step()
        budget.step(number)
        stepping.zero_grad()
    near("after the budget", logits(model, ids), logits(exact(model), IDS), 1e-4)
    model, handle = llama(place)
    groups = optim.lora_plus(handle, lr=1e-3)
    optim.freeze_a(handle)
    logits(model, ids).square().mean().backward()
    frozen = [p for p in handle.parameters() if p.grad is None]
    if not frozen or len(frozen) != len(handle.parameters()) / 2:
        raise Wrong(f"LoRA-FA froze {len(frozen)} of {len(handle.parameters())}")
    return f"{len(list(groups))} groups of parameters"


# ----------------------------------------------------------------------------------------------
# several devices


@check("two GPUs by accelerate's device map: a step, merge, unmerge")
def spread(place: Place) -> str:
    if place.count < 2:
        raise Skipped(f"two GPUs are needed, and there is {place.count}")
    import accelerate

    model = tiny_model(tie_word_embeddings=False)
    first, second = (
        ("model.embed_tokens", "model.layers.0", "model.rotary_emb"),
        ("model.layers.1", "model.norm"),
    )
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

    model = accelerate.cpu_offload(
        tiny_model(tie_word_embeddings=False), execution_device=place.device
    )
    try:
        veneer.attach(model, veneer.LoraConfig(rank=4))
    except VeneerError:
        if any("veneer" in name for name, _ in model.named_modules()):
            raise Wrong("refused, and half attached") from None
        return "refused"
    raise Wrong("attached to weights that are on no device")


# ----------------------------------------------------------------------------------------------
# waits


@check("a training step: no wait of the host in forward and backward (set_sync_debug_mode)")
def no_waits(place: Place) -> str:
    ids = IDS.to(place.device)
    mask = torch.full((1, 1, ids.shape[1], ids.shape[1]), -1e9, device=place.device).triu(
        1
    )  # else transformers waits
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
