"""Extraction: the nearest product of every change, what is written whole, what is lost and named,
what is refused."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.support.models import IDS, ConvNet, Shared, Stack, TinyLM
from tests.support.real_models import REAL, transformers_models
from tests.support.tiny import tiny_model, write_tiny
from tests.support.toys import adapt, error, example, flat
from torch import nn

import veneer
from veneer import models
from veneer.bases import BASES, weight_of
from veneer.errors import CheckpointError, ConfigError, ExtractError, OutputExistsError, TargetError
from veneer.fileio.hashing import fingerprint, fingerprint_of
from veneer.kernels import svd
from veneer.layers import LAYERS
from veneer.tools.extract import weight_pairs

# transformers' Conv1D is a kind only once transformers has been imported
import transformers.pytorch_utils  # noqa: F401  # isort: skip

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings('ignore:targets="all" leaves out'),
]


def moved(model, size=0.1, seed=1):
    """A copy of a model in which everything has moved."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for value in {
            id(value): value for value in other.state_dict(keep_vars=True).values()
        }.values():
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
                value.copy_(
                    value + (noise * size).abs() if value.dim() < 2 else value + noise * size
                )
        for embedding, old in zip(other.modules(), model.modules(), strict=True):
            if isinstance(embedding, nn.Embedding) and embedding.padding_idx is not None:
                embedding.weight[embedding.padding_idx] = old.weight[
                    old.padding_idx
                ]  # as training leaves it
    return other


def merged(model, config, size=0.3, dtype=None):
    """A copy of a model with a random adapter merged into it."""
    other = adapt(copy.deepcopy(model), "a", config=config, size=size)
    if dtype is not None:
        other = other.to(dtype)
    veneer.merge(other)
    veneer.detach(other, keep_merged=True)
    return other


#: no padding: its embedding of zeros is nothing that a norm could divide by
WORDS = IDS.clamp(min=1)


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------------------------------- the
# arithmetic


def matrix_of(out, in_, decay, seed):
    """[out, in] with singular values decay^k, and those."""
    generator = torch.Generator().manual_seed(seed)
    short = min(out, in_)

    def orthonormal(rows):
        return torch.linalg.qr(torch.randn(rows, short, generator=generator, dtype=torch.float64))[
            0
        ]

    values = decay ** torch.arange(short, dtype=torch.float64)
    return (orthonormal(out) * values) @ orthonormal(in_).mT, values


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.floats(0.3, 1.0), st.integers(0, 10),
    st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_the_exact_product_is_the_nearest_one(out, in_, rank, decay, seed, dtype):
    """Eckart and Young: the distance is the norm of the singular values that are left out."""
    matrix, values = matrix_of(out, in_, decay, seed)
    rank = min(rank, out, in_)
    vectors, method = svd.leading(matrix.to(dtype), rank, exact=True)
    assert method == "exact"
    A, B = svd.split(matrix.to(dtype), vectors)
    assert A.shape == (rank, in_)
    assert B.shape == (out, rank)
    within = (
        1e-6 if dtype == torch.float32 else 3e-8
    )  # of the largest: H in float64 knows no smaller ones
    optimum = values[rank:].norm().item()
    found = svd.squared_distance(matrix, A, B) ** 0.5
    assert abs(found - optimum) <= within * values.norm().item()
    assert found == pytest.approx((matrix - B @ A).norm().item(), abs=1e-9)
    for side in (A @ A.mT, B.mT @ B):  # the singular values in equal parts
        torch.testing.assert_close(side, torch.diag(values[:rank]), atol=within, rtol=0)


SPECTRA = {
    "noise": torch.randn,
    "slow": lambda m, n: _with(m, n, (1 + torch.arange(min(m, n))) ** -0.5),
    "fast": lambda m, n: _with(m, n, 0.8 ** torch.arange(min(m, n))),
    "low rank and noise": lambda m, n: _with(
        m, n, torch.where(torch.arange(min(m, n)) < 8, 1.0, 1e-3)
    ),
    "nothing but low rank": lambda m, n: _with(
        m, n, torch.where(torch.arange(min(m, n)) < 8, 1.0, 0.0)
    ),
    "no first one": lambda m, n: _with(m, n, torch.ones(min(m, n))),
    "zero": torch.zeros,
}


def _with(m, n, values):
    values = values.double()
    left = torch.linalg.qr(torch.randn(m, len(values), dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64))[0]
    return ((left * values) @ right.mT).float()


@pytest.mark.parametrize("shape", [(400, 400), (900, 450), (450, 900)])
@pytest.mark.parametrize("name", SPECTRA)
def test_a_randomised_product_is_as_near_as_it_says(name, shape):
    """FACTOR is by an estimate; the true one may be off by as much again, and is 1.02 at most."""
    torch.manual_seed(0)
    matrix = SPECTRA[name](*shape)
    for rank in (2, 8):
        vectors, method = svd.leading(matrix, rank)
        assert method == "randomised"
        torch.testing.assert_close(vectors.mT @ vectors, torch.eye(rank, dtype=torch.float64))
        found = svd.squared_distance(matrix, *svd.split(matrix, vectors)) ** 0.5
        optimum = torch.linalg.svdvals(matrix.double())[rank:].norm().item()
        assert found <= 1.02 * optimum + 3e-8 * matrix.norm().item()
        assert torch.equal(vectors, svd.leading(matrix, rank)[0])  # the same each time


def test_passes_that_do_not_converge_are_done_exactly(monkeypatch):
    monkeypatch.setattr(svd, "MAX_PASSES", 2)
    torch.manual_seed(0)
    assert svd.leading(torch.randn(400, 400), 8)[1] == "exact"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0.01, 100), min_size=2, max_size=12),
    st.integers(1, 3),
    st.floats(0.01, 0.99),
)
def test_the_smallest_rank_keeps_the_share_and_one_less_does_not(values, groups, share):
    spectra = [
        torch.tensor(sorted(values, reverse=True), dtype=torch.float64) * (1 + g)
        for g in range(groups)
    ]
    rank, total = svd.smallest_rank(spectra, share), sum(spectrum.sum() for spectrum in spectra)
    assert sum(spectrum[:rank].sum() for spectrum in spectra) >= share * total * (1 - 1e-12)
    assert sum(spectrum[: rank - 1].sum() for spectrum in spectra) < share * total * (1 + 1e-12)


def test_a_fingerprint_of_parts_is_that_of_the_whole():
    weight = torch.randn(5, 3, 4)
    assert fingerprint_of(weight.shape, weight.split(2)) == fingerprint(weight)


# ----------------------------------------------------------------------------------------------
# every kind of layer

EXAMPLES = [(kind.name, number) for kind in LAYERS for number, _ in enumerate(kind.examples())]


@pytest.mark.parametrize(("kind", "number"), EXAMPLES)
def test_every_kind_of_layer_is_extracted_as_it_was_changed(kind, number, tmp_path):
    """With the true rank the tuned weights come back, and each measured error is the true one at a
    lower rank."""
    layer, args = example(kind, number)
    base = nn.ModuleDict({"layer": layer})
    full = (
        5 if getattr(layer, "max_norm", None) is not None else 2
    )  # a merge bounds rows that may not have changed
    tuned = merged(base, veneer.LoraConfig(rank=2, targets="all"))
    before = {path: value.clone() for path, value in base.state_dict().items()}
    report = veneer.extract(base, tuned, tmp_path / "a", rank=full)
    assert not report.lost
    assert report.kept == pytest.approx(1, abs=1e-6)
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[path]) for path, value in before.items())
    assert all(parameter.requires_grad for parameter in base.parameters())
    handle = veneer.load(base, tmp_path / "a")
    assert error(flat(base["layer"](*args)), flat(tuned["layer"](*args))) < 1e-4
    handle.merge()
    expected = tuned.state_dict()
    for path, value in base.state_dict().items():
        if "veneer" not in path.split("."):
            torch.testing.assert_close(value, expected[path], atol=1e-5, rtol=1e-5)
    handle.unmerge()
    handle.detach()
    if not report.layers:
        return
    report = veneer.extract(base, tuned, tmp_path / "b", rank=1)
    handle = veneer.load(base, tmp_path / "b")
    for facts in report.layers:
        change = handle.changes[facts.path]
        old = base.get_parameter(facts.path).detach().double()
        delta = change.layer.unfold(
            tuned.get_parameter(facts.path).detach().double() - old, change.dims
        )
        rest = delta - change.resolve(base.get_parameter(facts.path))[0].delta(torch.float64)
        assert facts.error == pytest.approx((rest.norm() / delta.norm()).item(), abs=1e-6)
        assert facts.change == pytest.approx(delta.norm().item(), rel=1e-5)
        optimum = torch.linalg.svdvals(delta)[:, 1:].norm() / delta.norm()
        assert facts.error == pytest.approx(optimum.item(), abs=1e-6)


@pytest.mark.parametrize("build", [TinyLM, lambda: TinyLM(tied=True), ConvNet, Shared, Stack])
def test_a_model_in_which_everything_moved_comes_back_at_full_rank(build, tmp_path):
    """Vectors, biases and running statistics are written whole, ties stay ties."""
    torch.manual_seed(0)
    base = build().eval()
    tuned = moved(base)
    x = (
        torch.randn(2, 3, 8, 8)
        if isinstance(base, ConvNet)
        else torch.randn(2, 6)
        if isinstance(base, Shared)
        else IDS
    )
    report = veneer.extract(base, tuned, tmp_path / "a", rank=64)
    assert not report.lost
    assert report.kept == pytest.approx(1, abs=1e-6)
    veneer.load(base, tmp_path / "a")
    assert error(flat(base(x)), flat(tuned(x))) < 1e-5


STORED = [
    (storage.name, number) for storage in BASES for number, _ in enumerate(storage.examples())
]


@pytest.mark.filterwarnings("ignore")  # of the libraries that pack
@pytest.mark.parametrize(("name", "number"), STORED)
def test_a_base_that_is_stored_otherwise_is_read_as_the_numbers_that_it_means(
    name, number, tmp_path
):
    torch.manual_seed(0)
    base = nn.ModuleDict({"layer": list(BASES[name].examples())[number]})
    weight = BASES[name].dense(weight_of(base["layer"], "weight")).detach()
    change = torch.outer(torch.randn(len(weight)), torch.randn(weight.shape[1]))
    tuned = {"layer.weight": weight.double() + change.double()}
    if base["layer"].bias is not None:
        tuned["layer.bias"] = base["layer"].bias.detach()
    (layer,) = veneer.extract(base, tuned, tmp_path / "a", rank=1).layers
    assert layer.error < 1e-5
    handle = veneer.load(base, tmp_path / "a")
    torch.testing.assert_close(
        handle.changes["layer.weight"].resolve(None)[0].delta(torch.float32)[0],
        change.float(),
        atol=1e-4,
        rtol=1e-4,
    )


# ----------------------------------------------------------------------------------------------
# files


@pytest.mark.parametrize("name", transformers_models())
def test_from_files_it_is_the_same_adapter_as_from_live_models(name, tmp_path):
    """Every architecture: experts that its files hold one by one, ties, its own forwards, what PEFT
    may have."""
    base = REAL[name].build()[0]
    tuned = moved(base, 0.05)
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    live = veneer.extract(base, tuned, tmp_path / "live", rank=2)
    filed = veneer.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "filed", rank=2)
    assert [layer.path for layer in live.layers] == [layer.path for layer in filed.layers]
    assert [entry.path for entry in live.whole] == [entry.path for entry in filed.whole]
    assert filed.kept == pytest.approx(live.kept, abs=1e-6)
    configs = [
        json.loads((tmp_path / of / "adapter_config.json").read_text()) for of in ("live", "filed")
    ]
    assert configs[0].pop("base_model_name_or_path") != configs[1].pop("base_model_name_or_path")
    assert configs[0] == configs[1]
    one, other = (
        load_file(tmp_path / of / "adapter_model.safetensors") for of in ("live", "filed")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    records = [
        json.loads((tmp_path / of / "veneer.json").read_text())["base"] for of in ("live", "filed")
    ]
    assert records[0]["weights"] == records[1]["weights"]
    assert records[0]["architecture"] == records[1]["architecture"]
    veneer.load(base, tmp_path / "filed")  # fits, and the fingerprints are those of the base


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_a_stack_of_experts_is_read_matrix_by_matrix(name, tmp_path, monkeypatch):
    base = REAL[name].build()[0]
    one, other = saved(base, tmp_path / "base"), saved(moved(base), tmp_path / "tuned")
    sizes = {}
    whole = weight_pairs.WeightPair.matrix_pairs

    def matrix_pairs(self):
        for base, tuned in whole(self):
            sizes.setdefault(self.path, []).append(base.numel())
            yield base, tuned

    monkeypatch.setattr(weight_pairs.WeightPair, "matrix_pairs", matrix_pairs)
    veneer.extract(one, other, tmp_path / "a", rank=1)
    stacks = {path: value for path, value in base.named_parameters() if value.dim() == 3}
    assert stacks
    for path, value in stacks.items():
        assert set(sizes[path]) == {value[0].numel()}
        assert len(sizes[path]) >= 2 * len(value)  # compared, and factored


def test_a_forward_of_its_own_is_kept_from_peft_as_from_a_live_model(tmp_path):
    """OPT's positions are an embedding that counts from 2: PEFT would look its change up
    elsewhere."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=50, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16,
        max_position_embeddings=20, pad_token_id=1, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    base = OPTForCausalLM(config).eval()
    tuned, types = moved(base), []
    one, other = saved(base, tmp_path / "base"), saved(tuned, tmp_path / "tuned")
    for folder, sources in {"live": (base, tuned), "filed": (one, other)}.items():
        veneer.extract(*sources, tmp_path / folder, rank=2)
        types.append(
            json.loads((tmp_path / folder / "adapter_config.json").read_text())["peft_type"]
        )
    assert types[0] == types[1]
    assert "embed_positions" in types[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_merged_lora_comes_back_within_the_rounding_of_the_merge(dtype, tmp_path):
    base = tiny_model().to(dtype)
    config = veneer.LoraConfig(rank=4)
    adapted = adapt(copy.deepcopy(base), "a", config=config, size=0.1)
    exact = {path: _delta(change) for path, change in _changes(adapted).items()}
    tuned = merged_here(adapted)
    report = veneer.extract(
        saved(base, tmp_path / "b"), saved(tuned, tmp_path / "t"), tmp_path / "o", rank=4
    )
    assert len(report.layers) == 14
    assert not report.whole
    handle = veneer.load(base, tmp_path / "o")
    eps = torch.finfo(dtype).eps
    for path, change in handle.changes.items():
        weight = tuned.get_parameter(path).detach().double()
        rounding = eps * weight.norm() + 1e-6
        assert (_delta(change) - exact[path]).norm() <= 2 * rounding
        assert (base.get_parameter(path).double() + _delta(change) - weight).norm() <= rounding
    assert error(base(WORDS).logits, tuned(WORDS).logits) < 10 * eps


def _delta(change):
    return change.resolve(None)[0].delta(torch.float64)[0].detach()


def _changes(model):
    from veneer.attach.layer.lookup import changes

    return {f"{path}.{weight}": change for path, _, weight, change in changes(model, "a")}


def merged_here(model):
    veneer.merge(model)
    veneer.detach(model, keep_merged=True)
    return model


def test_energy_takes_the_smallest_rank_of_each_layer(tmp_path):
    base = tiny_model()
    tuned = moved(base, 0.02)
    report = veneer.extract(base, tuned, tmp_path / "a", energy=0.8)
    assert len({layer.rank for layer in report.layers}) > 2
    for layer in report.layers:
        delta = (tuned.get_parameter(layer.path) - base.get_parameter(layer.path)).detach().double()
        shares = torch.linalg.svdvals(delta).square()
        shares = shares.cumsum(0) / shares.sum()
        assert layer.rank == int((shares >= 0.8).to(torch.uint8).argmax()) + 1
        assert layer.kept == pytest.approx(shares[layer.rank - 1].item(), abs=1e-6)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == max(layer.rank for layer in report.layers)
    assert config["rank_pattern"] == config["alpha_pattern"]  # so the scale is 1 everywhere
    veneer.load(base, tmp_path / "a")


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_peft_computes_the_tuned_model(tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    base = saved(tiny_model(tie_word_embeddings=False), tmp_path / "base")
    tuned = moved(tiny_model(tie_word_embeddings=False), 0.05)
    report = veneer.extract(base, saved(tuned, tmp_path / "tuned"), tmp_path / "out", rank=32)
    assert report.kept == pytest.approx(1, abs=1e-6)
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "out"
    ).eval()
    assert error(model(WORDS).logits, tuned(WORDS).logits) < 1e-5


# ----------------------------------------------------------------------------------------------
# dtypes and ties


def test_what_rounding_alone_did_is_no_change(tmp_path):
    """A tuned model in bf16 of a base in fp32: the base is looked at in bf16 too."""
    base = tiny_model()
    tuned = copy.deepcopy(base).bfloat16()
    with pytest.raises(ExtractError, match="no difference"):
        veneer.extract(base, tuned, tmp_path / "a", rank=2)
    with torch.no_grad():
        tuned.model.layers[0].mlp.up_proj.weight[3, 5] += 1
    report = veneer.extract(base, tuned, tmp_path / "a", rank=2)
    assert [layer.path for layer in report.layers] == ["model.layers.0.mlp.up_proj.weight"]
    assert report.layers[0].kept == pytest.approx(1)
    assert report.layers[0].change == pytest.approx(1, abs=0.02)


def test_steps_of_a_finer_tuned_model_are_all_there(tmp_path):
    """fp32 training of a bf16 base: changes far below bf16's resolution count."""
    base = tiny_model().bfloat16()
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight.fill_(0.5)
    tuned = copy.deepcopy(base).float()
    weight = tuned.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight += 1e-5 * torch.outer(torch.randn(64), torch.randn(32))
    assert torch.equal(weight.bfloat16(), base.model.layers[0].mlp.up_proj.weight)
    (layer,) = veneer.extract(base, tuned, tmp_path / "a", rank=1).layers
    assert layer.error < 2e-2


def test_float64_models_have_float64_adapters(tmp_path):
    base = TinyLM().double()
    tuned = merged(base, veneer.LoraConfig(rank=2, targets="q_proj"))
    report = veneer.extract(base, tuned, tmp_path / "a", rank=2)
    assert all(layer.error < 1e-12 for layer in report.layers)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float64}


def test_ties_of_either_model(tmp_path):
    """Base tied, tuned file with both names: fine while they are equal. Base untied, tuned tied:
    two changes."""
    base, tuned = tiny_model(), moved(tiny_model(), 0.02)
    one = saved(base, tmp_path / "base")
    two = saved(tuned, tmp_path / "tuned")
    tensors = load_file(two / "model.safetensors")
    save_file(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        two / "model.safetensors",
    )
    report = veneer.extract(one, two, tmp_path / "a", rank=32)
    assert not report.lost
    head = tensors["model.embed_tokens.weight"] + 1
    save_file({**tensors, "lm_head.weight": head}, two / "model.safetensors")
    with pytest.raises(
        ExtractError, match=r"one weight of the base, with different numbers in .*tuned"
    ):
        veneer.extract(one, two, tmp_path / "b", rank=32)
    untied = tiny_model(tie_word_embeddings=False)
    report = veneer.extract(
        saved(untied, tmp_path / "untied"), saved(tuned, tmp_path / "t"), tmp_path / "c", rank=32
    )
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= {
        layer.path for layer in report.layers
    }
    veneer.load(untied, tmp_path / "c")
    assert error(untied(WORDS).logits, tuned(WORDS).logits) < 1e-5


def test_state_dicts_and_a_structure_that_transformers_does_not_know(tmp_path):
    base = TinyLM(tied=True)
    tuned = moved(base)
    state = tuned.state_dict()
    del state["lm_head.weight"]  # as files leave it out
    report = veneer.extract(base, state, tmp_path / "a", rank=8)
    assert not report.lost
    (tmp_path / "base").mkdir()
    (tmp_path / "tuned").mkdir()
    first = {path: value for path, value in base.state_dict().items() if path != "lm_head.weight"}
    save_file(first, tmp_path / "base" / "model.safetensors")
    save_file(state, tmp_path / "tuned" / "model.safetensors")
    structure = moved(base, seed=9)  # its numbers do not matter
    other = veneer.extract(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "b", rank=8, model=structure
    )
    assert other.kept == report.kept
    veneer.load(base, tmp_path / "b")
    assert error(base(IDS), tuned(IDS)) < 1e-5
    with pytest.raises(ExtractError, match="a state dict for the base and no model"):
        veneer.extract(first, state, tmp_path / "c", rank=8)
    assert veneer.extract(first, state, tmp_path / "c", rank=8, model=structure).kept == report.kept


# ----------------------------------------------------------------------------------------------
# whole and lost


def test_what_is_kept_whole_and_what_is_named_as_lost(tmp_path):
    base = tiny_model(tie_word_embeddings=False)
    tuned = moved(base, 0.02)

    def paths(entries):
        return {entry.path for entry in entries}

    norms = {path for path, parameter in base.named_parameters() if parameter.dim() == 1}
    ends = {"model.embed_tokens.weight", "lm_head.weight"}
    report = veneer.extract(base, tuned, tmp_path / "a", rank=4, targets="all-linear")
    assert (paths(report.whole), paths(report.lost), len(report.layers)) == (norms, ends, 14)
    assert "LOST: 2 that changed (no target)" in str(report)
    gone = sum(entry.change**2 for entry in report.lost) + sum(
        (x.change * x.error) ** 2 for x in report.layers
    )
    total = sum(
        (a - b).double().square().sum().item()
        for a, b in zip(tuned.parameters(), base.parameters(), strict=True)
    )
    assert report.kept == pytest.approx(1 - gone / total, abs=1e-9)

    report = veneer.extract(
        base, tuned, tmp_path / "b", rank=4, targets="all-linear", keep=["lm_head", "none"]
    )
    assert (paths(report.whole), paths(report.lost)) == (
        {"lm_head.weight"},
        norms | {"model.embed_tokens.weight"},
    )
    report = veneer.extract(
        base, tuned, tmp_path / "c", rank=4, exclude=["model.layers.0", "model.norm"]
    )
    assert all(
        path.startswith("model.layers.0.") or path == "model.norm.weight"
        for path in paths(report.lost)
    )
    assert {entry.why for entry in report.lost} == {"excluded"}

    report = veneer.extract(base, tuned, tmp_path / "d", rank=4, least=0.3)
    lossy = paths(report.lossy)
    assert ends <= lossy
    assert "keep less than 30% of their change" in str(report)
    report = veneer.extract(base, tuned, tmp_path / "e", rank=4, least=0.3, keep="lossy")
    assert paths(report.whole) == norms | lossy
    assert not report.lossy
    veneer.load(base, tmp_path / "e")
    assert torch.equal(load_file(tmp_path / "e" / "adapter_model.safetensors")["base_model.model.lm_head.weight"],
                       tuned.lm_head.weight.detach())  # fmt: skip


def test_running_statistics_are_written_whole_or_left_out_with_their_module(tmp_path):
    base = ConvNet().eval()
    tuned = moved(base)
    x = torch.randn(2, 3, 8, 8)
    report = veneer.extract(base, tuned, tmp_path / "a", rank=8, exclude="norm")
    assert {entry.path for entry in report.lost} == {
        "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var",
    }  # fmt: skip
    expected = copy.deepcopy(tuned)
    expected.norm = base.norm
    veneer.load(base, tmp_path / "a")
    assert error(base(x), expected(x)) < 1e-5
    assert error(base(x), tuned(x)) > 1e-3


def test_only_vectors_changed(tmp_path):
    base = tiny_model()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.model.norm.weight += 1
    report = veneer.extract(
        saved(base, tmp_path / "b"), saved(tuned, tmp_path / "t"), tmp_path / "a", rank=4
    )
    assert [entry.path for entry in report.whole] == ["model.norm.weight"]
    veneer.load(base, tmp_path / "a")
    assert torch.equal(base(WORDS).logits, tuned(WORDS).logits)
    with pytest.raises(
        ExtractError,
        match=r"changes of model.norm.weight only, which neither targets nor keep cover",
    ):
        veneer.extract(base, tuned, tmp_path / "c", rank=4, keep="none")


def test_the_padding_row_of_an_embedding_stays(tmp_path):
    """Veneer keeps that row at rest, so its change is part of the error."""
    base = nn.Sequential(nn.Embedding(9, 5, padding_idx=3))
    tuned = moved(base)
    tuned[0].weight.data[3] += 0.1
    (layer,) = veneer.extract(base, tuned, tmp_path / "a", rank=5).layers
    delta = (tuned[0].weight - base[0].weight).detach()
    assert layer.error == pytest.approx((delta[3].norm() / delta.norm()).item(), rel=1e-5)
    veneer.load(base, tmp_path / "a")


def test_the_report_is_json_and_the_record_says_where_it_came_from(tmp_path):
    base = tiny_model(tie_word_embeddings=False)
    seen = []
    report = veneer.extract(
        base, moved(base), tmp_path / "a", rank=3, provenance={"who": "me"}, base_name="tiny",
        progress=lambda layer, done, total: seen.append((layer.path, done, total)),
    )  # fmt: skip
    assert seen == [
        (layer.path, number, len(report.layers)) for number, layer in enumerate(report.layers, 1)
    ]
    facts = json.loads(json.dumps(report.to_dict()))
    assert facts["layers"][0]["rank"] == 3
    assert facts["kept"] == report.kept
    files = veneer.adapter_files.read(tmp_path / "a")
    assert files.metadata["provenance"]["extracted"]["rank"] == 3
    assert files.metadata["provenance"]["who"] == "me"
    assert files.metadata["base"]["name"] == "tiny"
    assert files.parameters == report.numbers


# ----------------------------------------------------------------------------------------------
# refused


def _other_shapes(tuned):
    tuned.lm_head = nn.Linear(8, 18, bias=False)
    tuned.model.embed_tokens = nn.Embedding(18, 8)


def _other_names(tuned):
    del tuned.model.layers[0].self_attn.q_proj
    tuned.model.layers[0].self_attn.query = nn.Linear(8, 8)


def _not_finite(tuned):
    tuned.lm_head.weight.data[0, 0] = math.nan
    tuned.model.norm.bias.data[1] = math.inf


def _packed(tuned):
    tuned.lm_head.weight = nn.Parameter(torch.ones(17, 8, dtype=torch.int8), requires_grad=False)


REFUSED = {
    "shapes": (
        _other_shapes,
        r"model.embed_tokens.weight \[17, 8\] and \[18, 8\].*lm_head.weight \[17, 8\] and",
    ),
    "names": (
        _other_names,
        r"(?s)no model.layers.0.self_attn.q_proj.weight, .*model.layers.0.self_attn.query.bias",
    ),
    "not finite": (_not_finite, r"NaN or infinity in model.norm.bias, lm_head.weight"),
    "nothing": (lambda tuned: None, "no difference between the base and the tuned model"),
    "unmerged": (lambda tuned: adapt(tuned, "a"), r"adapters \(a\) on the tuned model"),
    "meta": (lambda tuned: tuned.to("meta"), "on the meta device"),
    "integers": (_packed, r"lm_head.weight \(torch.int8\)"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_two_models_that_are_no_base_and_fine_tune_are_one_error(how, tmp_path):
    base = TinyLM()
    tuned = copy.deepcopy(base)
    change, words = REFUSED[how]
    change(tuned)
    with pytest.raises(ExtractError, match=words):
        veneer.extract(base, tuned, tmp_path / "a", rank=2)
    assert not list(tmp_path.iterdir())
    assert not hasattr(base, "veneer")


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({}, ConfigError, "rank=None and energy=None"),
        ({"rank": 2, "energy": 0.5}, ConfigError, "rank=2 and energy=0.5"),
        ({"rank": 0}, ConfigError, "rank=0"),
        ({"energy": 1.0}, ConfigError, "a share between 0 and 1"),
        ({"rank": 2, "least": 2}, ConfigError, "least=2"),
        ({"rank": 2, "keep": ["auto", "none"]}, ConfigError, "'auto' and 'none'"),
        ({"rank": 2, "keep": [3]}, ConfigError, r"keep=\[3\]"),
        ({"rank": 2, "keep": "norn"}, TargetError, "keep pattern 'norn' matches no parameter"),
        ({"rank": 2, "targets": "q_prj"}, TargetError, "targets pattern 'q_prj' matches nothing"),
        ({"rank": 2, "exclude": "q_prj"}, TargetError, "exclude pattern 'q_prj' matches no module"),
        ({"rank": 2, "keep": "re:("}, TargetError, "a regular expression"),
    ],
)
def test_options_that_mean_nothing(options, kind, words, tmp_path):
    base = TinyLM()
    with pytest.raises(kind, match=words):
        veneer.extract(base, moved(base), tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


def test_a_weight_that_cannot_carry_an_adapter_is_refused_before_anything_is_factored(
    tmp_path, monkeypatch
):
    base = nn.ModuleDict({"a": nn.Linear(4, 4), "veneer": nn.Linear(4, 4)})
    broken = nn.ModuleDict({"b": base["a"], "c": nn.Linear(4, 4)})
    broken["c"].veneer = nn.Linear(4, 4)  # where its adapters would stand
    monkeypatch.setattr(svd, "leading", lambda *_, **__: pytest.fail("factored"))
    with pytest.raises(TargetError, match="'c'"):
        veneer.extract(broken, moved(broken), tmp_path / "a", rank=2)
    monkeypatch.undo()
    report = veneer.extract(broken, moved(broken), tmp_path / "a", rank=2, exclude="c")
    assert {entry.path for entry in report.lost} == {
        "c.weight", "c.bias", "c.veneer.weight", "c.veneer.bias",
    }  # fmt: skip


def test_an_output_that_exists_is_refused_first(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    with pytest.raises(OutputExistsError):
        veneer.extract(tmp_path / "nowhere", tmp_path / "nowhere", tmp_path / "a", rank=2)
    base = TinyLM()
    veneer.extract(base, moved(base), tmp_path / "a", rank=2, overwrite=True)
    assert veneer.adapter_files.read(tmp_path / "a")


def test_folders_that_are_no_models(tmp_path):
    base = write_tiny(tmp_path / "base")
    veneer.extract(
        base, saved(moved(tiny_model()), tmp_path / "tuned"), tmp_path / "adapter", rank=2
    )
    with pytest.raises(ConfigError, match="is an adapter"):
        veneer.extract(base, tmp_path / "adapter", tmp_path / "b", rank=2)
    (tmp_path / "tuned" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="safetensors"):
        veneer.extract(base, tmp_path / "tuned", tmp_path / "b", rank=2)
    with pytest.raises(ConfigError, match="no base model"):
        veneer.extract("./nowhere", base, tmp_path / "b", rank=2)


def test_a_base_with_adapters_keeps_them(tmp_path):
    base = adapt(TinyLM(), "extracted0")
    tuned = moved(TinyLM().requires_grad_(True))
    plain = copy.deepcopy(base)
    veneer.detach(plain)
    before = base(IDS)
    report = veneer.extract(base, tuned, tmp_path / "a", rank=8)
    assert torch.equal(base(IDS), before)
    veneer.load(plain, tmp_path / "a")
    assert error(plain(IDS), tuned(IDS)) < 1e-5
    assert not report.lost
    veneer.merge(base)
    with pytest.raises(TargetError, match="merged into the weights"):
        veneer.extract(base, tuned, tmp_path / "b", rank=8)


# ----------------------------------------------------------------------------------------------
# memory

CHILD = """
import sys, threading, time
import torch
from pathlib import Path
import veneer
from veneer import models

torch.set_num_threads(1)
folder, options = Path(sys.argv[1]), eval(sys.argv[2])

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

veneer.extract(folder / "small", folder / "small-tuned", folder / "warm", rank=2)  # what is imported once
start, peak, done = resident(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
report = veneer.extract(folder / "base", folder / "tuned", folder / "out", **options)
done = True
thread.join()
print(peak - start, len(report.layers))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Two checkpoints of 160 MB in bfloat16, whose largest tensor has 12 MB, and two tiny ones."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("large")
    saved(tiny_model(), folder / "small")
    saved(moved(tiny_model()), folder / "small-tuned")
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=6000, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    for name in ("base", "tuned"):
        config.save_pretrained(folder / name)
    empty = models.meta_model(folder / "base")
    # one block of numbers, used again: what matters is how much is in memory, not what
    block = torch.randn(2 * 6000 * 1024).bfloat16() * 0.02
    shift = torch.outer(torch.randn(6000), torch.randn(1024)).bfloat16() * 0.01
    base, tuned = {}, {}
    for path, parameter in empty.named_parameters():
        values = block[: parameter.numel()].view(parameter.shape)
        base[path] = values.clone()
        tuned[path] = values + shift.reshape(-1)[: parameter.numel()].view(parameter.shape)
    for name, tensors in (("base", base), ("tuned", tuned)):
        save_file(tensors, folder / name / "model.safetensors")
    assert 155e6 < (folder / "base" / "model.safetensors").stat().st_size < 165e6
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_a_few_times_the_largest_tensor(large):
    """12 MB of bfloat16 are 24 MB in float32; all of both models would be 320 MB. All of both is
    compared, some of it factored."""
    options = {
        "rank": 4,
        "targets": ["model.embed_tokens", "model.layers.0.*", "model.layers.1.*"],
        "keep": "none",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(large), str(options)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_ARENA_MAX": "1",
             "MALLOC_MMAP_THRESHOLD_": "1000000"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    grown, layers = map(int, done.stdout.split())
    assert layers == 15
    assert grown < 110e6, f"{grown / 1e6:.0f} MB"
