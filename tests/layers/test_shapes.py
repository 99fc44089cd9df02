"""Every layer kind × variant over shapes and options that hypothesis draws: factored = materialised
= merged = the definition, in float64 within 1e-10."""

from __future__ import annotations

import pytest
import torch
import transformers.pytorch_utils
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tests.support.layer_reference import PATHS, reference
from tests.support.toys import Diagonal, calibration, cast, flat, randomise
from torch import nn, randn
from torch.nn.utils.rnn import pack_padded_sequence

import veneer
from veneer import context
from veneer.layers import LAYERS, Layer
from veneer.layers.parameter import Experts, Positions
from veneer.variants import VARIANTS

#: what torch tells of itself
pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]

size, flag, few = st.integers(1, 6), st.booleans(), st.integers(1, 3)


def draw_linear(draw):
    in_ = draw(size)
    return nn.Linear(in_, draw(size), draw(flag)), randn(*draw(st.lists(few, max_size=3)), in_)


def draw_conv1d_transformers(draw):
    in_ = draw(size)
    return transformers.pytorch_utils.Conv1D(draw(size), in_), randn(
        *draw(st.lists(few, min_size=1, max_size=3)), in_
    )


def draw_conv(spatial):
    cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1]

    def draw_it(draw):
        groups, kernel = draw(few), draw(few)
        padding = draw(st.sampled_from([0, 1, 2, "same", "valid"]))
        module = cls(
            groups * draw(few),
            groups * draw(few),
            kernel,
            stride=1 if padding == "same" else draw(st.integers(1, 2)),
            padding=padding,
            dilation=draw(st.integers(1, 2)),
            groups=groups,
            bias=draw(flag),
            padding_mode=draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"])),
        )
        return module, randn(
            draw(few), module.in_channels, *[draw(st.integers(5, 7)) for _ in range(spatial)]
        )

    return draw_it


def draw_conv_transpose(spatial):
    cls = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[spatial - 1]

    def draw_it(draw):
        groups, stride = draw(few), draw(few)
        module = cls(
            groups * draw(few),
            groups * draw(few),
            draw(st.integers(2, 3)),
            stride=stride,
            padding=draw(st.integers(0, 1)),
            output_padding=draw(st.integers(0, stride - 1)),
            dilation=draw(st.integers(1, 2)),
            groups=groups,
            bias=draw(flag),
        )
        return module, randn(
            draw(few), module.in_channels, *[draw(st.integers(3, 5)) for _ in range(spatial)]
        )

    return draw_it


def draw_embedding(draw):
    rows = draw(st.integers(2, 8))
    options = {
        "padding_idx": draw(st.none() | st.integers(-rows, rows - 1)),
        "max_norm": draw(st.none() | st.floats(0.5, 2)),
    }
    ids = torch.randint(rows, draw(st.lists(few, min_size=1, max_size=2)))
    assume(options["padding_idx"] is None or bool((ids != options["padding_idx"] % rows).any()))
    return nn.Embedding(rows, draw(size), **options), ids


def draw_embedding_bag(draw):
    rows, mode = draw(st.integers(2, 8)), draw(st.sampled_from(["sum", "mean", "max"]))
    module = nn.EmbeddingBag(
        rows, draw(size), mode=mode, max_norm=draw(st.none() | st.floats(0.5, 2))
    )
    bags = torch.randint(rows, (draw(few), draw(few)))
    weights = (None, randn(bags.shape)) if mode == "sum" and draw(flag) else ()
    return module, (bags, *weights)


def draw_bilinear(draw):
    one, two, rows = draw(size), draw(size), draw(few)
    return nn.Bilinear(one, two, draw(size), bias=draw(flag)), (randn(rows, one), randn(rows, two))


def draw_norm(draw):
    width = draw(st.integers(2, 6))
    module = draw(st.sampled_from([nn.LayerNorm(width), nn.RMSNorm(width), nn.BatchNorm1d(width)]))
    return module, randn(draw(st.integers(2, 4)), width)


def draw_attention(draw):
    heads = draw(few)
    width, steps, batch = heads * draw(few), draw(few), draw(few)
    kdim, vdim = (draw(size), draw(size)) if draw(flag) else (width, width)
    module = nn.MultiheadAttention(
        width, heads, kdim=kdim, vdim=vdim, bias=draw(flag), add_bias_kv=draw(flag)
    )
    length = draw(few)
    return module, (
        randn(steps, batch, width),
        randn(length, batch, kdim),
        randn(length, batch, vdim),
    )


def draw_recurrent(draw):
    cls = draw(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]))
    in_, hidden, steps, batch = draw(size), draw(st.integers(2, 5)), draw(few), draw(few)
    projected = (
        {"proj_size": draw(st.integers(1, hidden - 1))} if cls is nn.LSTM and draw(flag) else {}
    )
    module = cls(in_, hidden, draw(few), bias=draw(flag), bidirectional=draw(flag), **projected)
    x = randn(steps, batch, in_)
    if not draw(flag):
        return module, x
    return module, (
        pack_padded_sequence(x, torch.randint(1, steps + 1, (batch,)), enforce_sorted=False),
    )


def draw_recurrent_cell(draw):
    cls = draw(st.sampled_from([nn.LSTMCell, nn.GRUCell, nn.RNNCell]))
    in_, hidden, batch = draw(size), draw(size), draw(few)
    state = randn(batch, hidden)
    return cls(in_, hidden, bias=draw(flag)), (
        randn(batch, in_),
        (state, state) if cls is nn.LSTMCell else state,
    )


def draw_parameter(draw):
    if draw(flag):
        experts, in_ = draw(few), draw(st.integers(2, 6))
        return Experts(experts, draw(st.integers(2, 6)), in_), randn(experts, draw(few), in_)
    length, width = draw(st.integers(2, 6)), draw(st.integers(2, 6))
    return Positions(length, width), randn(draw(few), length, width)


def draw_toy_diagonal(draw):
    rows, width = draw(size), draw(size)
    return Diagonal(rows, width), randn(draw(few), width)


DRAWS = {
    "linear": draw_linear,
    "conv1d_transformers": draw_conv1d_transformers,
    **{f"conv{n}d": draw_conv(n) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": draw_conv_transpose(n) for n in (1, 2, 3)},
    "embedding": draw_embedding,
    "embedding_bag": draw_embedding_bag,
    "bilinear": draw_bilinear,
    "norm": draw_norm,
    "attention": draw_attention,
    "recurrent": draw_recurrent,
    "recurrent_cell": draw_recurrent_cell,
    "parameter": draw_parameter,
    "toy_diagonal": draw_toy_diagonal,
}


def test_every_kind_has_shapes_to_draw_from():
    assert set(DRAWS) == set(LAYERS.names())


def drawn(kind, variant, data):
    """(handle, args) of one module of a kind with an adapter on everything it has."""
    torch.manual_seed(data.draw(st.integers(0, 1000), label="seed"))
    module, args = DRAWS[kind](data.draw)
    module, args = (
        module.double().eval(),
        cast(args if isinstance(args, tuple) else (args,), torch.float64),
    )
    given = calibration(module, variant, args)
    rank = data.draw(few, label="rank")  # "all" lowers it to what each weight allows
    handle = veneer.attach(
        module, veneer.LoraConfig(rank=rank, alpha=3, targets="all", variant=variant), **given
    )
    randomise(handle)
    return handle, args


def tells_inputs(kind):
    """Whether a variant that starts from a layer's inputs can start on this kind; attach refuses
    the others."""
    return kind == "norm" or type(LAYERS[kind]).inputs is not Layer.inputs


def near(found, expected):
    """Within rounding of the terms, which are about one each and may cancel, as two rows of a bag
    do."""
    return bool((found - expected).norm() < 1e-10 * max(float(expected.norm()), 1e-3))


every_pair = pytest.mark.parametrize(
    ("kind", "variant"),
    [
        (kind, variant.name)
        for kind in LAYERS.names()
        for variant in VARIANTS
        if "inputs" not in variant.needs or tells_inputs(kind)
    ],
)
#: of each pair: a kind is drawn from a dozen times as often, once for every variant
FEW, MANY = 5, 40
draws = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much],
}


def four_ways(kind, variant, data):
    handle, args = drawn(kind, variant, data)
    expected, _, _ = reference(handle, args)
    with torch.no_grad():
        for path in PATHS:
            with context.override(path=path):
                assert near(flat(handle.model(*args)), expected)
        handle.merge()
        assert near(flat(handle.model(*args)), expected)


@every_pair
@settings(max_examples=FEW, **draws)
@given(data=st.data())
def test_four_ways_to_the_same_output(kind, variant, data):
    four_ways(kind, variant, data)


@pytest.mark.slow
@every_pair
@settings(max_examples=MANY, **draws)
@given(data=st.data())
def test_four_ways_to_the_same_output_of_more_shapes(kind, variant, data):
    four_ways(kind, variant, data)
