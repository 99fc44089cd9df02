"""Layers that a library must know, and weights that have several readers or names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from torture_cases.cases._case import case
from torture_cases.judges import (
    NEAR,
    distance,
    randomise,
    sound,
)
from torture_cases.library import Library, Result
from torture_cases.models import Holder, Tied, TwoNames

Shapes = tuple[int, ...]


def one_layer(
    library: Library,
    make: Callable[[], nn.Module],
    inputs: Sequence[Tensor | Shapes],
    **options: Any,
):
    model = Holder(make())
    given = [torch.randn(each) if isinstance(each, tuple) else each for each in inputs]
    return sound(library, model, *given, **options)


def layer(
    row: str, name: str, make: Callable[[], nn.Module], *inputs: Tensor | Shapes, **options: Any
) -> None:
    case(row, **{name: {"make": make, "inputs": inputs, **options}})(one_layer)


KINDS = "LSTM, GRU, norms, Bilinear, EmbeddingBag, ConvTranspose"
layer(KINDS, "lstm", lambda: nn.LSTM(6, 8, num_layers=2, bidirectional=True), (5, 3, 6))
layer(KINDS, "gru", lambda: nn.GRU(6, 8, batch_first=True), (3, 5, 6))
layer(KINDS, "layer_norm", lambda: nn.LayerNorm(8), (3, 8), rank=1)
layer(KINDS, "rms_norm", lambda: nn.RMSNorm(8), (3, 8), rank=1)
layer(KINDS, "group_norm", lambda: nn.GroupNorm(2, 8), (3, 8, 5), rank=1)
layer(KINDS, "batch_norm", lambda: nn.BatchNorm2d(6), (3, 6, 5, 5), rank=1)
layer(KINDS, "instance_norm", lambda: nn.InstanceNorm1d(6, affine=True), (3, 6, 7), rank=1)
layer(KINDS, "bilinear", lambda: nn.Bilinear(5, 6, 4), (3, 5), (3, 6))
layer(
    KINDS,
    "embedding_bag",
    lambda: nn.EmbeddingBag(12, 6, mode="mean"),
    torch.tensor([[1, 4, 4], [0, 11, 7]]),
)
layer(KINDS, "conv_transpose1d", lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 7))
layer(
    KINDS,
    "conv_transpose2d",
    lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1),
    (2, 4, 5, 5),
)
layer(KINDS, "conv_transpose3d", lambda: nn.ConvTranspose3d(4, 6, 2), (2, 4, 3, 3, 3))

REPARAMETRISED = "weight_norm or spectral_norm Linear"
layer(REPARAMETRISED, "weight_norm", lambda: parametrizations.weight_norm(nn.Linear(8, 6)), (3, 8))
layer(
    REPARAMETRISED, "spectral_norm", lambda: parametrizations.spectral_norm(nn.Linear(8, 6)), (3, 8)
)

PADDING = 'Conv with circular/reflect padding; dilation 2 with padding "same"'
for mode in ("circular", "reflect"):
    layer(
        PADDING,
        f"conv2d_{mode}",
        partial(nn.Conv2d, 4, 6, 3, padding=1, padding_mode=mode),
        (2, 4, 7, 7),
    )
layer(
    PADDING,
    "conv1d_circular",
    lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"),
    (2, 4, 9),
)
layer(
    PADDING,
    "conv2d_same_dilation2",
    lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2),
    (2, 4, 7, 7),
)

GEOMETRY = "Conv dilation 2 with integer padding; Conv3d kernel (1, 1, 3) merge"
layer(
    GEOMETRY,
    "conv2d_padding_dilation2",
    lambda: nn.Conv2d(4, 6, 3, padding=1, dilation=2),
    (2, 4, 7, 7),
)
layer(GEOMETRY, "conv3d_kernel_1_1_3", lambda: nn.Conv3d(4, 6, (1, 1, 3)), (2, 4, 3, 3, 5))

GROUPED = "grouped Conv; depthwise"
layer(GROUPED, "conv2d_grouped", lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7))
layer(GROUPED, "conv2d_depthwise", lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 7, 7), rank=1)

ATTENTION = "MultiheadAttention"
X = (3, 5, 8)


@case(ATTENTION)
def attention_out_proj_once(library: Library) -> Result:
    model, x = Holder(nn.MultiheadAttention(8, 2, batch_first=True)), torch.randn(X)
    before = model.layer.out_proj.weight.detach().double().clone()
    adapter = library.attach(model, library.attention)
    if not adapter.parameters():
        return Result(False, "attaches nothing, without an error")
    randomise(adapter)
    delta = adapter.delta("layer.out_proj")
    with torch.no_grad():
        output = adapter.model(x, x, x)
        adapter.merge()
        differs = distance(output, adapter.model(x, x, x))
    change = adapter.weights()["layer.out_proj.weight"].detach().double() - before
    times = ((change * delta).sum() / (delta * delta).sum()).item()
    text = f"out_proj's delta is applied {times:.2f} times; forward differs from merged by {differs:.0e}"
    return Result(
        abs(times - 1) < 1e-5 and differs < NEAR, text, {"times": times, "merged": differs}
    )


@case(ATTENTION)
def attention_all_linear(library: Library) -> Result:
    x = torch.randn(X)
    return sound(
        library,
        Holder(nn.MultiheadAttention(8, 2, batch_first=True)),
        x,
        x,
        x,
        targets="all-linear",
    )


@case(ATTENTION)
def attention_whole(library: Library) -> Result:
    x = torch.randn(X)
    return sound(
        library,
        Holder(nn.MultiheadAttention(8, 2, batch_first=True)),
        x,
        x,
        x,
        targets=library.attention,
    )


@case("TransformerEncoderLayer, batch_first")
def encoder_layer_in_eval(library: Library) -> Result:
    """In eval mode and without gradients it takes a fused path that reads its layers' weights."""
    model, x = (
        Holder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)).eval(),
        torch.randn(X),
    )
    with torch.no_grad():
        base = model(x)
        adapter = library.attach(model, ["linear1", "linear2"])
        randomise(adapter)
        trained = distance(adapter.model.train()(x), base)
        evaluated = distance(adapter.model.eval()(x), base)
    measures = {"train": trained, "eval": evaluated}
    text = f"changes the output by {trained:.2g} in train() and by {evaluated:.2g} in eval()"
    return Result(trained > 1e-2 and abs(trained - evaluated) < NEAR, text, measures)


TIED = "tied embeddings"


@case(TIED)
def tied_forward_equals_merged(library: Library) -> Result:
    return sound(
        library, Tied(), torch.randint(12, (3, 5)), targets=["embed_tokens", "lm_head"], tied=True
    )


@case(TIED)
def tied_after_to_bfloat16(library: Library) -> Result:
    """Asked for, the tie of the weights and of their changes survives a change of dtype and what is
    trained after."""
    ids = torch.randint(12, (3, 5))
    adapter = library.attach(Tied(), ["embed_tokens", "lm_head"], tied=True)
    model = adapter.model.to(torch.bfloat16)
    randomise(adapter)
    with torch.no_grad():
        output = model(ids)
        adapter.merge()
        merged, weights = model(ids), adapter.weights()
    tied = torch.equal(weights["embed_tokens.weight"], weights["lm_head.weight"])
    differs, size = distance(output, merged), merged.abs().max().item()
    text = f"forward differs from merged by {differs:.2g} on outputs of {size:.2g}"
    return Result(tied and differs < 0.02 * size, text, {"merged_bfloat16": differs / size})


@case("one Linear under two names")
def one_linear_under_two_names(library: Library) -> Result:
    return sound(library, TwoNames(), torch.randn(3, 8), targets=["first", "second"])
