"""What a device computes is what the processor computes: every kind of layer with every variant, and whole models."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from tests.support.banks import saved
from tests.support.emulated_device import G0, without_float64
from tests.support.real_models import REAL
from tests.support.tiny import tiny_model
from tests.support.toys import calibration, error, example, flat, randomise
from torch import nn
from torch.utils import _pytree as pytree

import veneer
from veneer.layers import LAYERS
from veneer.train.loss import causal_loss
from veneer.variants import VARIANTS

# transformers' Conv1D is a kind only once transformers has been imported
import transformers.pytorch_utils  # noqa: F401  # isort: skip

from tests.support.rows import ROWS, rows_of  # isort: skip

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.randint(3, 250, (3, 17), generator=torch.Generator().manual_seed(5))
#: what the emulated device has no kernel for
LACKS = ("DispatchStub", "_thnn_fused", "_conv_depthwise2d")


def on(device, tree):
    return pytree.tree_map_only(torch.Tensor, lambda one: one.detach().to(device), tree)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def both(make, config, call, more=lambda model: {}, size=0.3):
    """Outputs and gradients of an adapted model on the processor and of its copy on the device."""
    found = []
    plain = make()
    for place in ("cpu", G0):
        model = copy.deepcopy(plain).to(place)
        handle = veneer.attach(model, config, **on(place, more(model)) if place == G0 else more(model))
        if found:
            handle.model.load_state_dict(found[0][2])
        else:
            randomise(handle, size)
        y = call(model, place)
        y.float().square().mean().backward()
        found.append((y, gradients(model), model.state_dict(), handle))
    return found


def same(found, within):
    (y, grads, *_), (other, others, *_) = found
    assert error(other.float().cpu(), y.float()) < within
    largest = max(float(one.norm()) for one in grads.values())
    for name, one in grads.items():
        assert others[name].device == G0
        assert float((others[name].cpu() - one).norm()) < 20 * within * largest, name


def logits(model, place):
    return model(input_ids=IDS.to(place), use_cache=False).logits


CELLS = [(kind.name, number) for kind in LAYERS for number, _ in itertools.islice(enumerate(kind.examples()), 3)]


@pytest.mark.parametrize("kind", [kind.name for kind in LAYERS])
def test_every_variant_on_every_kind(kind):
    for (name, number), variant in itertools.product(CELLS, VARIANTS.names()):
        if name != kind:
            continue
        module, args = example(kind, number)
        given = calibration(module, variant, args)
        try:
            veneer.detach(
                veneer.attach(
                    copy.deepcopy(module), veneer.LoraConfig(rank=1, targets="all", variant=variant), **given
                ).model
            )
        except veneer.errors.VeneerError:
            continue
        try:
            _cell(module, args, variant)
        except RuntimeError as problem:
            if not any(word in str(problem) for word in LACKS):
                raise AssertionError(f"{kind}[{number}] × {variant}: {problem}") from problem


def _cell(module, args, variant):
    config = veneer.LoraConfig(rank=1, targets="all", variant=variant)
    found = both(
        lambda: module,
        config,
        lambda model, place: flat(model(*on(place, args))),
        lambda model: calibration(model, variant, on(next(model.parameters()).device, args)),
    )
    same(found, 1e-4)
    handle = found[1][3]
    model = handle.model.eval()
    with torch.no_grad():
        y = flat(model(*on(G0, args)))
        handle.merge()
        assert error(flat(model(*on(G0, args))).cpu(), y.cpu()) < 1e-3
        handle.unmerge()
        assert torch.equal(flat(model(*on(G0, args))), y)


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in ROWS}))
def test_rows_and_banks_on_every_kind(kind, tmp_path):
    module, args = example(kind)
    if (kind, 0) not in ROWS:
        pytest.skip("whose inputs hold no rows")
    count, axis = rows_of(module, args)
    names = list(itertools.islice(itertools.cycle(["a", None, "b"]), count))
    saved(module, tmp_path, "a", "b")
    module, args = module.to(G0), on(G0, args)
    try:
        module(*args)
    except RuntimeError as problem:
        if any(word in str(problem) for word in LACKS):
            pytest.skip("whose kernel the emulated device lacks")
        raise
    handles = [veneer.load(module, tmp_path / name, name=name) for name in "ab"]
    whole, mixed = {}, []
    with torch.no_grad():
        for name in set(names):
            with veneer.use(module, name):
                whole[name] = pytree.tree_leaves(module(*args))[0]
        with veneer.use(module, names):
            mixed.append(pytree.tree_leaves(module(*args))[0])
        for handle in handles:
            handle.detach()
        bank = veneer.Bank(module)
        bank.add(tmp_path / "a")
        bank.add(tmp_path / "b")
        with bank.rows(names):
            mixed.append(pytree.tree_leaves(module(*args))[0])
        bank.close()
    for found in mixed:
        for row, name in enumerate(names):
            assert error(found.select(axis, row).cpu(), whole[name].select(axis, row).cpu()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 12])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_blends_of_a_bank(dtype, tokens, variant, tmp_path):
    model = tiny_model().to(dtype)
    for name, rank in (("a", 2), ("b", 5)):
        saved(model, tmp_path, name, config=veneer.LoraConfig(rank=rank, variant=variant), size=0.1)
    model.to(G0)
    choices = ["a", None, {"a": 0.5, "b": 0.25}, "b", "a", None]
    ids = torch.randint(3, 250, (6, tokens)).to(G0)
    bank = veneer.Bank(model)
    for name in "ab":
        bank.add(tmp_path / name)
    with torch.no_grad():
        with bank.rows(choices):
            mixed = model(input_ids=ids, use_cache=False).logits
        for row, choice in enumerate(choices):
            with bank.rows([choice]):
                alone = model(input_ids=ids[row : row + 1], use_cache=False).logits[0]
            assert error(mixed[row].float().cpu(), alone.float().cpu()) < (1e-4 if dtype is torch.float32 else 0.05)
    bank.close()


MODELS = ["llama", "llama-tied-biased", "qwen3-moe", "mixtral", "gpt2", "vit", "resnet18"]


@pytest.mark.parametrize("name", [name for name in MODELS if name in REAL])
def test_models(name):
    found = []
    for place in ("cpu", G0):
        model, inputs, loss = REAL[name].build()
        model.to(place)
        handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all-linear" if name != "resnet18" else "all"))
        if found:
            model.load_state_dict(found[0][2])
        else:
            randomise(handle, 0.1)
        output = model(**on(place, inputs))
        value = loss(pytree.tree_map_only(torch.Tensor, lambda one: one.cpu(), output))
        value.backward()
        found.append((value, gradients(model), model.state_dict()))
    same(found, 1e-4)


@pytest.mark.parametrize(
    ("dtype", "within"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)], ids=str
)
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_llama_in_every_dtype(dtype, within, variant):
    config = veneer.LoraConfig(rank=4, targets="all-linear", variant=variant)
    same(both(lambda: tiny_model().to(dtype), config, logits, size=0.1), within)


def test_16_bits_are_rounded_once_with_a_bias():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 256)).to(torch.bfloat16)
    x = torch.randn(32, 64).to(torch.bfloat16)
    handle = veneer.attach(module, veneer.LoraConfig(rank=4, targets="all"))
    randomise(handle, 0.005)  # its own roundings hardly move a number
    exact = copy.deepcopy(module).double()(x.double())
    found = copy.deepcopy(module).to(G0)(x.to(G0)).cpu()
    nearest = exact.to(torch.bfloat16)
    assert (found != nearest).float().mean() < 0.02  # of rounding twice, one in ten


def test_dropout_drops_the_same_in_backward_about_as_often_as_it_says():
    for p in (0.1, 0.5):
        module = nn.Sequential(nn.Linear(64, 48, bias=False)).to(G0)
        handle = veneer.attach(module, veneer.LoraConfig(rank=4, targets="all", dropout=p))
        change = handle.changes["0.weight"]
        A, B = change.A[0], change.B[0]
        with torch.no_grad():
            A.uniform_(0.5, 1.0), B.uniform_(0.5, 1.0)
        module.train()
        x = torch.randn(33, 64, device=G0, requires_grad=True)
        y = module(x)
        y.sum().backward()
        through, whole = (x.grad - module[0].weight.sum(0)) * (1 - p) / change.scale, (B.sum(0) @ A).expand_as(x)
        kept = (through > whole / 2).float()
        assert error((kept * whole).cpu(), through.cpu()) < 1e-3
        expected = x @ module[0].weight.mT + (kept * x) @ A.mT @ B.mT * (change.scale / (1 - p))
        assert error(y.cpu(), expected.cpu()) < 1e-3
        assert abs(1 - kept.mean().item() - p) < 0.05


def test_convolutions_with_dropout_in_both_layouts():
    for last, p in itertools.product((False, True), (0.0, 0.1)):
        module = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 8, 1, stride=2))
        x = torch.randn(4, 8, 72, 72)
        if last:
            module, x = module.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        config = veneer.LoraConfig(rank=2, targets="all", dropout=p)
        if p:
            model = module.to(G0)
            veneer.attach(model, config)
            model.train()(x.to(G0)).sum().backward()
        else:
            same(both(lambda m=module: m, config, lambda model, place, x=x: model(x.to(place))), 1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_meets_the_same_adapter_and_the_same_dropout(reentrant):
    found = []
    for checkpointed in (False, True):
        model = tiny_model().to(G0)
        for name in "ab":
            torch.manual_seed(ord(name))
            handle = veneer.attach(model, veneer.LoraConfig(rank=4), name=name)
            randomise(handle)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        with veneer.use(model, "b"):
            model(input_ids=IDS.to(G0), use_cache=False).logits.square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in handle.parameters()]))
    assert error(found[1].cpu(), found[0].cpu()) < 1e-4


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_a_scaler(base, cast):
    model = tiny_model().to(base)
    handle = veneer.attach(model, veneer.LoraConfig(rank=4, variant="lora"))
    randomise(handle, 0.1)
    exact = copy.deepcopy(model).float()(input_ids=IDS, use_cache=False).logits
    model.to(G0)
    optimiser = torch.optim.SGD(handle.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0, enabled=cast is torch.float16)
    with torch.autocast("cuda", dtype=cast):
        found = logits(model.train(), G0)
        node = model.model.layers[0].self_attn.o_proj(torch.randn(1, 2, 32, device=G0)).grad_fn
    assert found.dtype == cast
    assert "LinearsOnDevice" in node.name()
    assert error(found.float().cpu(), exact) < 0.1
    before = [p.detach().clone() for p in handle.parameters()]
    scaler.scale(found.float().square().mean()).backward()
    scaler.step(optimiser)
    scaler.update()
    assert all(p.grad.dtype == p.dtype for p in handle.parameters())
    assert any(not torch.equal(one, p) for one, p in zip(before, handle.parameters(), strict=True))


def test_a_gradient_of_a_gradient():
    module = nn.Sequential(nn.Linear(6, 5)).double().to(G0)
    randomise(veneer.attach(module, veneer.LoraConfig(rank=2, targets="all")))
    x = torch.randn(3, 6, dtype=torch.float64, device=G0, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,))
    assert torch.autograd.gradgradcheck(module, (x,))


def test_compile_and_export():
    model = tiny_model().to(G0)
    for name in "ab":
        randomise(veneer.attach(model, veneer.LoraConfig(rank=4), name=name))
    ids = IDS.to(G0)
    run = torch.compile(lambda ids: model(input_ids=ids, use_cache=False).logits, fullgraph=True, backend="aot_eager")
    for name in "ab":
        with veneer.use(model, name):
            expected = model(input_ids=ids, use_cache=False).logits
            assert error(run(ids).cpu(), expected.cpu()) < 1e-4

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits

    with veneer.use(model, "a"):
        exported = torch.export.export(Logits(), (ids,), strict=False)
        assert error(exported.module()(ids).cpu(), Logits()(ids).cpu()) < 1e-4


def test_a_loss_as_on_the_processor():
    labels = IDS.clone()
    labels[:, :4] = -100
    config = veneer.LoraConfig(rank=4, targets=["q_proj", "lm_head"])

    def call(model, place):
        return causal_loss(model, {"input_ids": IDS.to(place), "labels": labels.to(place)}, chunk=16)[None]

    same(both(lambda: tiny_model(tie_word_embeddings=False), config, call), 1e-4)


def test_merges_have_the_bits_of_the_processor():
    models = [tiny_model().to(torch.bfloat16), tiny_model().to(torch.bfloat16).to(G0)]
    handles = [veneer.attach(model, veneer.LoraConfig(rank=4)) for model in models]
    randomise(handles[0], 0.01)
    models[1].load_state_dict(models[0].state_dict())
    before = {name: p.clone() for name, p in models[1].named_parameters()}
    for handle in handles:
        handle.merge(rounding="nearest")
    for (name, one), (_, other) in zip(*(model.named_parameters() for model in models), strict=True):
        assert torch.equal(one, other.cpu()), name
    for handle in handles:
        handle.unmerge()
    assert all(torch.equal(p, before[name]) for name, p in models[1].named_parameters())


def test_a_device_without_float64():
    with without_float64(), warnings.catch_warnings():
        for variant in ("lora", "dora", "pissa", "olora", "lora_xs", "vera", "loha", "lokr"):
            model = tiny_model().to(torch.bfloat16).to(G0)
            handle = veneer.attach(model, veneer.LoraConfig(rank=4, variant=variant, dropout=0.1))
            model.train()
            causal_loss(model, {"input_ids": IDS.to(G0), "labels": IDS.to(G0)}).backward()
            if variant in ("lora", "dora"):
                veneer.check(model, {"input_ids": IDS.to(G0), "use_cache": False})
                handle.merge()
                handle.unmerge()
            handle.detach()
