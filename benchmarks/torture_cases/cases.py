"""CASES: what is asked of a LoRA library, each as a name, a sentence and a function of it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from torture_cases.judges import (
    NEAR,
    add_noise,
    attach_random,
    base_error,
    capture_warnings,
    copy_weights,
    count_misrounded,
    describe_error,
    distance,
    is_refusal,
    judge_base,
    judge_error,
    judge_layer,
    judge_refusal,
    judge_refused,
    shorten_text,
)
from torture_cases.library import (
    REFUSES,
    RIGHT,
    UNCHECKED,
    WRONG,
    Adapter,
    Library,
    Result,
)
from torture_cases.models import Holder, Stack, Tied, TwoNames


@dataclass(frozen=True)
class Case:
    """One thing to get right. ``judge`` takes a library and may raise what the library raises."""

    name: str
    about: str
    judge: Callable[[Library], Result]


CASES: list[Case] = []


def add_case(about: str, name: str = "", **options: Any):
    """Enter a function into CASES, under its own name if there is no other."""

    def enter(function: Callable[..., Result]):
        CASES.append(Case(name or function.__name__, about, partial(function, **options)))
        return function

    return enter


def run_case(case: Case, library: Library) -> Result:
    """The case's result. A library that warned of what it got wrong has used words."""
    torch.manual_seed(0)
    with capture_warnings(library) as texts:
        try:
            result = case.judge(library)
        except Exception as error:
            result = judge_error(error)
    if result.outcome in (WRONG, UNCHECKED) and texts:
        text = f"{result.text}, and warns: {shorten_text(texts[0])}"
        return replace(result, outcome=REFUSES, text=text)
    return result


# ---- layers -------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[str, Callable[[], nn.Module], list[Any], dict[str, Any]]] = {
    "lstm": ("nn.LSTM", lambda: nn.LSTM(6, 8, num_layers=2), [(5, 3, 6)], {}),
    "layer_norm": ("nn.LayerNorm", lambda: nn.LayerNorm(8), [(3, 8)], {"rank": 1}),
    "rms_norm": ("nn.RMSNorm", lambda: nn.RMSNorm(8), [(3, 8)], {"rank": 1}),
    "batch_norm": ("nn.BatchNorm2d", lambda: nn.BatchNorm2d(6), [(3, 6, 5, 5)], {"rank": 1}),
    "bilinear": ("nn.Bilinear", lambda: nn.Bilinear(5, 6, 4), [(3, 5), (3, 6)], {}),
    "embedding_bag": (
        "nn.EmbeddingBag",
        lambda: nn.EmbeddingBag(12, 6, mode="mean"),
        [torch.tensor([[1, 4, 4], [0, 11, 7]])],
        {},
    ),
    "conv_transpose2d": (
        "nn.ConvTranspose2d",
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1),
        [(2, 4, 5, 5)],
        {},
    ),
    "weight_norm": (
        "nn.Linear under weight_norm",
        lambda: parametrizations.weight_norm(nn.Linear(8, 6)),
        [(3, 8)],
        {},
    ),
    "conv1d": ("nn.Conv1d", lambda: nn.Conv1d(4, 6, 3, padding=2), [(2, 4, 9)], {}),
    "conv2d_circular": (
        'nn.Conv2d with padding_mode="circular"',
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        [(2, 4, 7, 7)],
        {},
    ),
    "conv2d_dilation": (
        'nn.Conv2d with dilation=2, padding="same"',
        lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2),
        [(2, 4, 7, 7)],
        {},
    ),
    "conv3d_kernel_1_1_3": (
        "nn.Conv3d with a kernel of (1, 1, 3)",
        lambda: nn.Conv3d(4, 6, (1, 1, 3)),
        [(2, 4, 3, 3, 5)],
        {},
    ),
    "conv2d_grouped": (
        "nn.Conv2d with 2 groups",
        lambda: nn.Conv2d(4, 6, 3, groups=2),
        [(2, 4, 7, 7)],
        {},
    ),
    "conv2d_depthwise": (
        "nn.Conv2d, depthwise",
        lambda: nn.Conv2d(6, 6, 3, groups=6),
        [(2, 6, 7, 7)],
        {"rank": 1},
    ),
}


def one_layer(
    library: Library, create: Callable[[], nn.Module], inputs: list[Any], **options: Any
) -> Result:
    model = Holder(create())
    tensors = [torch.randn(shape) if isinstance(shape, tuple) else shape for shape in inputs]
    return judge_layer(library, model, *tensors, **options)


for _name, (_about, _create, _inputs, _options) in LAYERS.items():
    _sentence = f"{_about}: forward equals merged, and unmerging restores the base"
    add_case(_sentence, _name, create=_create, inputs=_inputs, **_options)(one_layer)

ATTENTION_INPUT = (3, 5, 8)


@add_case("nn.MultiheadAttention: the change of out_proj is applied once")
def attention_out_proj_once(library: Library) -> Result:
    model, x = Holder(nn.MultiheadAttention(8, 2, batch_first=True)), torch.randn(ATTENTION_INPUT)
    before = model.layer.out_proj.weight.detach().double().clone()
    adapter = attach_random(library, model, library.attention)
    if not adapter.parameters():
        return Result(UNCHECKED, "attaches nothing, without an error")
    delta = adapter.delta("layer.out_proj")
    with torch.no_grad():
        output = adapter.model(x, x, x)
        adapter.merge()
        merged = distance(output, adapter.model(x, x, x))
    change = adapter.weights()["layer.out_proj.weight"].detach().double() - before
    times = ((change * delta).sum() / (delta * delta).sum()).item()
    return Result(
        RIGHT if abs(times - 1) < 1e-5 and merged < NEAR else WRONG,
        f"out_proj's change is applied {times:.2f} times; forward − merged is {merged:.0e}",
        f"{times:.2f} times",
        "1.00 times",
        {"merged": merged},
    )


@add_case(
    'nn.MultiheadAttention under "all-linear": the adapter has an effect, a gradient and a merge'
)
def attention_all_linear(library: Library) -> Result:
    x = torch.randn(ATTENTION_INPUT)
    model = Holder(nn.MultiheadAttention(8, 2, batch_first=True))
    return judge_layer(library, model, x, x, x, targets="all-linear")


@add_case("nn.TransformerEncoderLayer: the adapter of linear1 and linear2 counts in eval(), too")
def encoder_layer_in_eval(library: Library) -> Result:
    """In eval mode and without gradients it takes a fused path that reads its layers' weights."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model, x = Holder(layer).eval(), torch.randn(ATTENTION_INPUT)
    with torch.no_grad():
        base = model(x)
        adapter = attach_random(library, model, ["linear1", "linear2"])
        in_train = distance(adapter.model.train()(x), base)
        in_eval = distance(adapter.model.eval()(x), base)
    text = f"changes the output by {in_train:.2g} in train() and by {in_eval:.2g} in eval()"
    agrees = in_train > 1e-2 and abs(in_train - in_eval) < NEAR
    return Result(RIGHT if agrees else WRONG, text, f"{in_eval:.2g}", f"{in_train:.2g}")


@add_case("embedding and head that share a weight, both adapted: forward equals merged")
def tied_embeddings(library: Library) -> Result:
    ids = torch.randint(12, (3, 5))
    return judge_layer(library, Tied(), ids, targets=["embed_tokens", "lm_head"])


@add_case("one nn.Linear under two names: forward equals merged")
def one_linear_under_two_names(library: Library) -> Result:
    return judge_layer(library, TwoNames(), torch.randn(3, 8), targets=["first", "second"])


# ---- merging ------------------------------------------------------------------------------------


@add_case("a bfloat16 base, merged and unmerged 100 times, has its very bits")
def merge_100_times(library: Library) -> Result:
    adapter = attach_random(library, Holder(nn.Linear(32, 32)).bfloat16(), ["layer"], 0.05)
    before = copy_weights(adapter)
    for _ in range(100):
        adapter.merge()
        adapter.unmerge()
    return judge_base(adapter, before)


@add_case("a checked merge (PEFT: safe_merge) into bfloat16 rounds once")
def safe_merge_rounds_once(library: Library) -> Result:
    model = Holder(nn.Linear(128, 128)).bfloat16()
    exact = model.layer.weight.detach().double()
    adapter = attach_random(library, model, ["layer"], 0.1)
    exact = exact + adapter.delta("layer")
    adapter.merge(safe=True)
    wrong = count_misrounded(adapter.weights()["layer.weight"], exact)
    share = f"{wrong / exact.numel():.1%}"
    return Result(
        WRONG if wrong else RIGHT,
        f"{share} of the weights are not correctly rounded",
        share,
        "0.0%",
        {"wrong": float(wrong)},
    )


def attach_poison(library: Library, dtype: torch.dtype, value: float) -> Adapter:
    """An adapter of two layers with this value in all parameters of the second."""
    adapter = attach_random(library, Stack(2).to(dtype), ["linear"])
    for parameter in adapter.parameters()[-2:]:
        parameter.data.fill_(value)
    return adapter


@add_case("a checked merge (PEFT: safe_merge) that is refused leaves all layers as they were")
def safe_merge_is_atomic(library: Library) -> Result:
    adapter = attach_poison(library, torch.float32, float("nan"))
    before = copy_weights(adapter)
    try:
        adapter.merge(safe=True)
    except Exception as error:
        if not is_refusal(error):
            raise
        weights = adapter.weights()
        changed = [path for path in before if not torch.equal(weights[path], before[path])]
        text = f"refused ({describe_error(error)}); merged: {', '.join(changed) or 'nothing'}"
        got = f"{len(changed)} weights changed"
        return Result(WRONG if changed else RIGHT, text, got, "0 weights changed")
    return Result(UNCHECKED, "a NaN in layer 2 is merged", "merged", "an error")


@add_case("a merge of NaN is refused", "merge_of_nan", dtype=torch.float32, value=float("nan"))
@add_case("a merge beyond float16 is refused", "merge_overflow", dtype=torch.float16, value=3e4)
def merge_not_finite(library: Library, dtype: torch.dtype, value: float) -> Result:
    adapter = attach_poison(library, dtype, value)
    before = copy_weights(adapter)
    try:
        adapter.merge()
    except Exception as error:
        result = judge_refused(error)
        changed = base_error(adapter, before)
        return Result(WRONG, f"{result.text}; the base changed") if changed else result
    adapter.unmerge()
    return Result(UNCHECKED, f"merged; {judge_base(adapter, before).text}", "merged", "an error")


@add_case("an adapter that is edited while merged: unmerging restores the base, or is refused")
def adapter_edited_while_merged(library: Library) -> Result:
    adapter = attach_random(library, Holder(nn.Linear(16, 16)), ["layer"])
    before = copy_weights(adapter)
    adapter.merge()
    add_noise(adapter)
    adapter.unmerge()
    result = judge_base(adapter, before)
    return replace(result, outcome=UNCHECKED) if result.outcome == WRONG else result


@add_case("a base that is edited while merged: unmerging leaves the edit, or is refused")
def base_edited_while_merged(library: Library) -> Result:
    adapter = attach_random(library, Holder(nn.Linear(16, 16)), ["layer"])
    before = copy_weights(adapter)["layer.weight"]
    adapter.merge()
    adapter.weights()["layer.weight"].data[0, 0] += 1
    try:
        adapter.unmerge()
    except Exception as error:
        return judge_refused(error)
    edit = (adapter.weights()["layer.weight"] - before)[0, 0].item()
    survives = abs(edit - 1) < 1e-5
    outcome, text = (RIGHT, "the edit stays") if survives else (UNCHECKED, "the edit is lost")
    return Result(outcome, text, f"{edit:.2f}", "1.00")


# ---- several adapters ---------------------------------------------------------------------------


def attach_several(
    library: Library, model: nn.Module, names: Sequence[str], targets: Sequence[str], **options: Any
) -> Adapter:
    """Adapters ``names`` on one model, with noise in each; the last is returned."""
    for name in names:
        adapter = attach_random(library, model, targets, name=name, **options)
        model = adapter.model
    return adapter


@add_case(
    "a weighted sum of two DoRA adapters is that sum, or refused", "weighted_dora", variant="dora"
)
@add_case("a weighted sum of two rsLoRA adapters is that sum", "weighted_rslora", variant="rslora")
def weighted_sum(library: Library, variant: str) -> Result:
    """No DoRA adapter is the sum of two: there a refusal is the right answer."""
    model, x = Holder(nn.Linear(16, 16)), torch.randn(5, 16)
    adapter = attach_several(library, model, ["one", "two"], ["layer"], variant=variant, rank=4)
    with torch.no_grad():
        outputs = {
            name: library.call(adapter.model, x, name).double() for name in ("one", "two", None)
        }
        try:
            combined = library.combine(adapter, ["one", "two"], [0.7, 0.4], "sum")
        except Exception as error:
            return judge_refused(error) if variant == "dora" else judge_error(error)
        change = library.call(combined.model, x, "sum").double() - outputs[None]
    expected = 0.7 * (outputs["one"] - outputs[None]) + 0.4 * (outputs["two"] - outputs[None])
    error = (change - expected).norm().item() / expected.norm().item()
    ratio = f"{change.norm().item() / expected.norm().item():.2f}"
    text = f"off by {error:.2g}; {ratio} times as large as it should be"
    return Result(RIGHT if error < NEAR else WRONG, text, ratio, "1.00", {"off": error})


@add_case("a combination under a name that exists is refused")
def weighted_under_an_existing_name(library: Library) -> Result:
    adapter = attach_several(library, Holder(nn.Linear(16, 16)), ["one", "two"], ["layer"])
    return judge_refusal(lambda: library.combine(adapter, ["one", "two"], [0.7, 0.4], "one"))


@add_case("a plain call after an exception in a mixed batch is as before")
def exception_in_a_mixed_batch(library: Library) -> Result:
    adapter = attach_several(library, Stack(), ["one", "two"], ["linear"])
    model, x, rows = adapter.model, torch.randn(3, 16), ["one", None, "two"]
    with torch.no_grad():
        outputs = [library.call(model, x, name) for name in rows]
        mixed = library.call(model, x, rows)
        by_row = max(distance(mixed[row], output[row]) for row, output in enumerate(outputs))
        with contextlib.suppress(ArithmeticError):
            library.call(model, torch.full_like(x, float("nan")), rows)
        after = distance(library.call(model, x, "one"), outputs[0])
    return Result(
        RIGHT if max(by_row, after) < NEAR else WRONG,
        f"rows are off by {by_row:.0e}; the next plain call by {after:.2g}",
        f"{after:.2g}",
        "0",
        {"rows": by_row, "after": after},
    )


# ---- files and requests -------------------------------------------------------------------------


def flip_a_byte(library: Library, adapter: Adapter, folder: Path) -> None:
    """The lowest bit of the first byte of an adapter tensor."""
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        for parameter in adapter.parameters():
            content = bytearray(file.read_bytes())
            position = content.find(parameter.detach().numpy().tobytes())
            if position >= 0:
                content[position] ^= 1
                file.write_bytes(content)
                return
    raise ValueError("no file holds an adapter tensor")


def poison_a_tensor(library: Library, adapter: Adapter, folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        next(tensor for tensor in tensors.values() if tensor.dim() == 2).view(-1)[0] = float("nan")

    library.edit(folder, change)


def add_a_layer(library: Library, adapter: Adapter, folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors |= {
            key.replace("linear", "ghost"): tensor.clone() for key, tensor in tensors.items()
        }

    library.edit(folder, change)


def remove_alpha(library: Library, adapter: Adapter, folder: Path) -> None:
    library.remove_alpha(folder)


@add_case("an adapter of another base of the same shapes is refused", "load_on_another_base")
@add_case("a file with a flipped byte is refused", "load_flipped_byte", damage=flip_a_byte)
@add_case("a file with a NaN is refused", "load_nan", damage=poison_a_tensor, disguised=True)
@add_case(
    "a file with extra keys is refused", "load_extra_keys", damage=add_a_layer, disguised=True
)
@add_case("a file without alpha is refused", "load_no_alpha", damage=remove_alpha, disguised=True)
def load_damaged(
    library: Library,
    damage: Callable[[Library, Adapter, Path], None] | None = None,
    disguised: bool = False,
) -> Result:
    base = Stack()
    state = {key: value.clone() for key, value in base.state_dict().items()}
    adapter = attach_random(library, base, ["linear"])
    results = []
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "adapter"
        library.save(adapter, folder)
        if damage is not None:
            damage(library, adapter, folder)
        for copy in library.disguises(folder) if disguised else [folder]:
            model = Stack()
            if damage is not None:
                model.load_state_dict(state)
            results.append(judge_refusal(partial(library.load, model, copy)))
    return next((result for result in results if result.outcome != RIGHT), results[0])


@add_case("a dropout of −0.5 is refused", "dropout_below_zero", dropout=-0.5)
@add_case("rank 1000 on 16 × 16 is refused", "rank_1000_on_16_by_16", rank=1000)
@add_case("a target that matches nothing is refused", "unmatched_target", targets=["linear", "no"])
@add_case("an index of a layer that is not there is refused", "layer_out_of_range", layers=[0, 99])
def bad_request(library: Library, targets: Sequence[str] = ("linear",), **options: Any) -> Result:
    return judge_refusal(lambda: library.attach(Stack(), targets, **options))
