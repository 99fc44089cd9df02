"""Runs that share a batch compute what each computes alone: gradients, losses, random numbers,
whoever is there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tiny import tiny_model
from torch import nn

import veneer
from veneer.errors import ConfigError, DataError, SelectionError, TargetError
from veneer.kernels import spans as kernel
from veneer.kernels.spans import Span
from veneer.train import many
from veneer.train.loss import causal_loss
from veneer.train.many import LabelLoss

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_labels": 3,
}


def llama():
    return tiny_model(num_hidden_layers=1), ["*_proj"], lambda: tokens(causal=True), causal_loss


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(
        BertConfig(vocab_size=50, max_position_embeddings=16, **SIZES)
    )
    return model, ["query", "value", "intermediate.dense"], lambda: tokens(causal=False), classes


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(
        ViTConfig(image_size=8, patch_size=4, hidden_dropout_prob=0.1, **SIZES)
    )
    return (
        model,
        "all-linear",
        lambda: ({"pixel_values": floats(2, 3, 8, 8)}, torch.randint(3, (2,))),
        classes,
    )


def convolutions():
    layers = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=2),
    ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(72, 4))
    return model, ["0", "3", "6"], lambda: (floats(2, 3, 8, 8), floats(2, 4)), F.mse_loss


MODELS = {"llama": llama, "bert": bert, "vit": vit, "convolutions": convolutions}
#: by name: rank, alpha, variant, dropout, whether all targets or only the first
KINDS = {
    "lora": (2, 8, "lora", 0.0, True),
    "dropping": (2, 8, "lora", 0.25, True),
    "wide": (4, 4, "lora", 0.0, False),
    "rslora": (3, 16, "rslora", 0.0, False),
    "dora": (2, 4, "dora", 0.1, True),
    "pissa": (2, None, "pissa", 0.0, True),
    "vera": (4, None, "vera", 0.0, False),
    "loha": (2, 2, "loha", 0.0, True),
}


#: by name: of a run's parameters; the first has fewer digits than the others
DTYPES = {"narrow": "bfloat16", "usual": None, "wide": "float64"}


def floats(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def tokens(causal):
    ids = torch.randint(3, 50, (2, 6))
    return {"input_ids": ids, "labels": ids.clone() if causal else torch.randint(0, 3, (2,))}


def classes(output, target):
    return F.cross_entropy(output.logits, target)


def config(kind, targets, **changes):
    rank, alpha, variant, dropout, every = KINDS[kind]
    own = targets if every or isinstance(targets, str) else targets[:1]
    fields = {"rank": rank, "alpha": alpha, "variant": variant, "dropout": dropout, "targets": own}
    return veneer.LoraConfig(**{**fields, **changes})


def optimizer(name, parameters):
    """Each run has its own, with its own rate."""
    kind = torch.optim.SGD if len(name) % 2 else torch.optim.AdamW
    return kind(parameters, lr=0.001 * (1 + len(name)))


def own_loss(model, batch, loss):
    if loss is causal_loss:
        return causal_loss(model, batch)
    inputs, target = (
        batch if isinstance(batch, tuple) else ({"input_ids": batch["input_ids"]}, batch["labels"])
    )
    return loss(model(**inputs) if isinstance(inputs, dict) else model(inputs), target)


class Alone:
    """A run as anybody would write it: a model of its own, ``attach``, and a loop, from
    ``manual_seed`` on."""

    def __init__(self, base, name, config, seed, loss):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model, self.loss = copy.deepcopy(base), loss
            self.handle = veneer.attach(self.model, config)
            self.optimizer, self.state = (
                optimizer(name, self.handle.parameters()),
                torch.get_rng_state(),
            )

    def step(self, batch):
        with torch.random.fork_rng():
            torch.set_rng_state(self.state)
            value = own_loss(self.model, batch, self.loss)
            value.backward()
            self.state = torch.get_rng_state()
        return value.detach()


def assert_same_gradients(handle, alone, tolerance=1e-10):
    for (key, one), (other_key, other) in zip(
        handle.named_parameters(), alone.named_parameters(), strict=True
    ):
        assert key == other_key
        assert (one.grad is None) == (other.grad is None), key
        if one.grad is not None:
            assert torch.allclose(one.grad, other.grad, rtol=tolerance, atol=tolerance), key


@pytest.mark.parametrize("name", MODELS)
def test_eight_adapters_train_as_each_alone(name):
    torch.manual_seed(0)
    base, targets, draw, loss = MODELS[name]()
    base = base.double().train()
    configs = {kind: config(kind, targets) for kind in KINDS}
    seeds = {kind: number for number, kind in enumerate(KINDS)}
    alone = {kind: Alone(base, kind, configs[kind], seeds[kind], loss) for kind in KINDS}
    before = {key: value.clone() for key, value in base.state_dict().items()}
    runs = veneer.train_many(base, configs, seeds=seeds)
    optimizers = {kind: optimizer(kind, run.parameters()) for kind, run in runs.items()}
    for _ in range(2):
        batches = {kind: draw() for kind in KINDS}
        outside = torch.get_rng_state()
        losses = runs.backward(batches, loss)
        assert torch.equal(outside, torch.get_rng_state())
        for kind, run in runs.items():
            assert abs(losses[kind] - alone[kind].step(batches[kind])) < 1e-10, kind
            assert_same_gradients(run, alone[kind].handle)
            for one in (optimizers[kind], alone[kind].optimizer):
                one.step()
                one.zero_grad()
    for kind in KINDS:
        runs.remove(kind)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_each_run_draws_its_own_dropout_where_layers_read_one_value():
    """q, k and v share a draw: of one run, whatever other runs draw there."""
    torch.manual_seed(0)
    base, targets, draw, loss = llama()
    base = base.double().train()
    settings = {
        name: config("dropping", targets, rank=rank)
        for name, rank in (("a", 2), ("b", 2), ("c", 3))
    }
    alone = {name: Alone(base, name, own, 7, loss) for name, own in settings.items()}
    runs = veneer.train_many(base, settings, seeds=7)
    optimizers = {name: optimizer(name, run.parameters()) for name, run in runs.items()}
    for _ in range(3):
        batches = {name: draw() for name in runs}
        losses = runs.backward(batches, loss)
        for name, run in runs.items():
            assert abs(losses[name] - alone[name].step(batches[name])) < 1e-10, name
            assert_same_gradients(run, alone[name].handle)
            for one in (optimizers[name], alone[name].optimizer):
                one.step()
                one.zero_grad()


@given(
    plan=st.lists(
        st.sets(st.sampled_from(list(KINDS)), min_size=1, max_size=5), min_size=2, max_size=4
    ),
    seed=st.integers(0, 99),
)
@settings(max_examples=5, deadline=None)
def test_runs_that_join_and_leave_change_nothing_for_the_others(plan, seed):
    """``plan``: who takes part in each step. Who is not there for once has left, and joins anew
    later."""
    torch.manual_seed(seed)
    base, targets, draw, loss = llama()
    base = base.double().train()
    plain = copy.deepcopy(base)
    runs, alone, optimizers = veneer.train_many(base, {}), {}, {}
    for present in plan:
        for kind in [kind for kind in runs if kind not in present]:
            runs.remove(kind)
        for kind in sorted(present - set(runs)):
            alone[kind] = Alone(plain, kind, config(kind, targets), seed, loss)
            optimizers[kind] = optimizer(
                kind, runs.add(kind, config(kind, targets), seed=seed).parameters()
            )
        batches = {kind: draw() for kind in sorted(present)}
        losses = runs.backward(batches, loss)
        for kind in present:
            assert abs(losses[kind] - alone[kind].step(batches[kind])) < 1e-10, kind
            assert_same_gradients(runs[kind], alone[kind].handle)
            for one in (optimizers[kind], alone[kind].optimizer):
                one.step()
                one.zero_grad()


@pytest.mark.slow
def test_float32_losses_are_the_same_over_a_hundred_steps():
    torch.manual_seed(0)
    base, targets, draw, loss = llama()
    worst = 0.0
    kinds = ("lora", "dropping", "dora", "loha")
    configs = {kind: config(kind, targets) for kind in kinds}
    alone = {kind: Alone(base.train(), kind, configs[kind], 5, loss) for kind in kinds}
    runs = veneer.train_many(base, configs, seeds=5)
    optimizers = {kind: torch.optim.SGD(run.parameters(), lr=0.05) for kind, run in runs.items()}
    for (
        kind
    ) in kinds:  # where a gradient is nearly zero, AdamW's step is the sign of its rounding error
        alone[kind].optimizer = torch.optim.SGD(alone[kind].handle.parameters(), lr=0.05)
    for _ in range(100):
        batches = {kind: draw() for kind in kinds}
        losses = runs.backward(batches, loss)
        for kind in kinds:
            worst = max(worst, abs(float(losses[kind] - alone[kind].step(batches[kind]))))
            for one in (optimizers[kind], alone[kind].optimizer):
                one.step()
                one.zero_grad()
    assert worst < 2e-5


def test_runs_that_drop_draw_once_for_layers_that_read_one_input():
    """As each alone: with one adapter the queries, keys and values share a draw."""
    torch.manual_seed(0)
    base, targets, draw, loss = llama()
    base = base.double().train()
    configs = {
        "a": config("dropping", targets),
        "b": config("dropping", targets, rank=3, dropout=0.5),
    }
    alone = {name: Alone(base, name, own, 7, loss) for name, own in configs.items()}
    runs = veneer.train_many(base, configs, seeds=7)
    batches = {name: draw() for name in configs}
    for parameter in [*runs["a"].parameters(), *alone["a"].handle.parameters()]:
        parameter.data += 0.05  # B is zero at the start
    losses = runs.backward(batches, loss)
    for name, run in runs.items():
        assert abs(losses[name] - alone[name].step(batches[name])) < 1e-10, name
        assert_same_gradients(run, alone[name].handle)


def test_layers_that_read_one_input_are_one_call_of_the_kernel_whatever_the_ranks(monkeypatch):
    torch.manual_seed(0)
    base, draw = tiny_model(num_hidden_layers=2).double(), lambda: tokens(causal=True)
    configs = {
        name: veneer.LoraConfig(rank=rank, targets=["*_proj"])
        for name, rank in (("a", 2), ("b", 3))
    }
    alone = {name: Alone(base, name, own, 7, causal_loss) for name, own in configs.items()}
    runs = veneer.train_many(base, configs, seeds=7)
    for parameter in [*runs["a"].parameters(), *alone["a"].handle.parameters()]:
        parameter.data += 0.05  # B is zero at the start
    seen = []
    monkeypatch.setattr(
        kernel,
        "_apply",
        lambda *given, own=kernel._apply: seen.append((len(given) - 3) // 3) or own(*given),
    )
    for _ in range(2):  # the second step finds what the first has worked out
        seen.clear()
        batches = {name: {key: one[:2] for key, one in draw().items()} for name in configs}
        losses = runs.backward(batches, causal_loss)
        # the first block's queries, keys and values read embeddings, which have no graph to share
        assert seen[-10:] == [1, 1, 1, 1, 2, 1, 3, 1, 2, 1]
        for name, run in runs.items():
            assert abs(losses[name] - alone[name].step(batches[name])) < 1e-10, name
            assert_same_gradients(run, alone[name].handle)
        for one in [*runs.values(), *(own.handle for own in alone.values())]:
            for parameter in one.parameters():
                parameter.data -= parameter.grad
                parameter.grad = None


def test_runs_of_other_dtypes_keep_the_digits_of_their_own():
    torch.manual_seed(0)
    base = nn.Linear(6, 4)
    configs = {
        name: veneer.LoraConfig(rank=2, targets="all", dtype=own) for name, own in DTYPES.items()
    }
    alone = {name: Alone(base, name, own, 0, F.mse_loss) for name, own in configs.items()}
    runs = veneer.train_many(base, configs)
    batches = {name: (torch.randn(3, 6), torch.randn(3, 4)) for name in configs}
    losses = runs.backward(batches, F.mse_loss)
    for name, run in runs.items():
        assert abs(losses[name] - alone[name].step(batches[name])) < 1e-6, name
        assert_same_gradients(run, alone[name].handle, 0.01 if DTYPES[name] == "bfloat16" else 1e-6)


def two(model=None, **changes):
    model = (
        nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
        if model is None
        else model
    )
    configs = {
        "a": veneer.LoraConfig(rank=2, targets="all"),
        "b": veneer.LoraConfig(rank=1, targets=["0"]),
    }
    runs = veneer.train_many(model, configs, **changes)
    with torch.no_grad():
        for run in runs.values():
            for parameter in run.parameters():
                parameter += 0.1
    return runs


def gradients(run):
    return [None if one.grad is None else one.grad.clone() for one in run.parameters()]


def test_one_forward_serves_all_and_its_layers_run_once(monkeypatch):
    runs, seen = two(), []
    monkeypatch.setattr(
        kernel,
        "_apply",
        lambda given, *rest, own=kernel._apply: seen.append(given) or own(given, *rest),
    )
    runs.model.register_forward_hook(lambda *call: seen.append(len(call[2])))
    runs.backward(
        {"a": (floats(3, 6), floats(3, 4)), "b": (floats(2, 6), floats(2, 4))}, F.mse_loss
    )
    seen = seen[-3:]  # behind what tries whether rows are independent
    assert [[(one.first, one.after) for one in given] for given in seen[:2]] == [
        [(0, 3), (3, 5)],
        [(0, 3)],
    ]
    assert seen[2] == 5


def test_batches_of_other_shapes_are_calls_of_their_own():
    runs, sizes = two(), []
    runs.model.register_forward_hook(lambda *call: sizes.append(len(call[2])))
    batches = {"a": (floats(3, 7, 6), floats(3, 7, 4)), "b": (floats(2, 6), floats(2, 4))}
    runs.backward(batches, F.mse_loss)
    assert sizes == [3, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_run(bad):
    batches = {"a": (floats(2, 6), floats(2, 4)), "b": (floats(2, 6), floats(2, 4))}
    with_bad = {**batches, "a": (torch.full((2, 6), bad).double(), batches["a"][1])}
    runs = two()
    runs.backward(batches, F.mse_loss)
    fine = gradients(runs["b"])
    for run in runs.values():
        for parameter in run.parameters():
            parameter.grad = None
    losses = runs.backward(with_bad, F.mse_loss)
    assert not losses["a"].isfinite()
    assert losses["b"].isfinite()
    torch.testing.assert_close(gradients(runs["b"]), fine, rtol=0, atol=0)


def test_weights_and_several_backwards_add_up():
    runs, batches = (
        two(),
        [{"a": (floats(2, 6), floats(2, 4)), "b": (floats(4, 6), floats(4, 4))} for _ in range(2)],
    )
    found = []
    for batch in batches:
        runs.backward(batch, F.mse_loss)
        found.append({name: gradients(run) for name, run in runs.items()})
        for run in runs.values():
            for parameter in run.parameters():
                parameter.grad = None
    for batch in batches:
        runs.backward(batch, {"a": F.mse_loss, "b": F.mse_loss}, weights={"a": 0.25})
    for name, weight in (("a", 0.25), ("b", 1.0)):
        for one, other, total in zip(
            found[0][name], found[1][name], gradients(runs[name]), strict=True
        ):
            torch.testing.assert_close(weight * (one + other), total)


def test_a_loss_that_raises_names_its_run_and_changes_no_gradient():
    def broken(output, target):
        raise ZeroDivisionError("mine")

    batches = {"a": (floats(2, 6), floats(2, 4)), "b": (floats(2, 3, 6), floats(2, 3, 4))}
    runs = two()
    with pytest.raises(ZeroDivisionError) as error:
        runs.backward(batches, {"a": F.mse_loss, "b": broken})
    assert error.value.__notes__ == ["in the loss of adapter 'b'"]
    assert all(one is None for run in runs.values() for one in gradients(run))
    with pytest.raises(ConfigError, match=r"loss \[2, 4\] of adapter 'a'.*scalar"):
        runs.backward({"a": batches["a"]}, lambda output, target: output)

    runs = two(keep_going=True)
    losses = runs.backward(batches, {"a": F.mse_loss, "b": broken})
    assert list(losses) == ["a"]
    assert isinstance(runs.failed["b"], ZeroDivisionError)
    assert any(one is not None for one in gradients(runs["a"]))
    assert all(one is None for one in gradients(runs["b"]))


def test_each_batch_needs_a_loss():
    runs, batch = two(), (floats(2, 6), floats(2, 4))
    for losses in ({"a": F.mse_loss}, {"a": F.mse_loss, "b": None}, None):
        with pytest.raises(
            ConfigError, match="no loss for adapter 'b'" if losses else "no loss for adapter 'a'"
        ):
            runs.backward({"a": batch, "b": batch}, losses)
    assert all(one is None for run in runs.values() for one in gradients(run))


def test_configs_that_do_not_fit_are_named_and_the_others_go_on_only_if_told():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    configs = {
        "a": veneer.LoraConfig(rank=2, targets="all"),
        "b": veneer.LoraConfig(rank=2, targets=["none"]),
        "c": veneer.LoraConfig(rank=9, targets=["1"]),
    }
    keys = list(model.state_dict())
    with pytest.raises(TargetError, match=r"(?s)2 problems.*adapter 'b'.*none.*adapter 'c'.*rank"):
        veneer.train_many(model, configs)
    assert list(model.state_dict()) == keys
    runs = veneer.train_many(model, configs, keep_going=True)
    assert list(runs) == ["a"]
    assert set(runs.failed) == {"b", "c"}


def test_bad_batches_are_refused():
    runs = two()
    with pytest.raises(DataError, match="'z'"):
        runs.backward({"z": (floats(2, 6), None)}, F.mse_loss)
    with pytest.raises(DataError, match="batch of 'a'"):
        runs.backward({"a": floats(2, 6)}, F.mse_loss)
    with pytest.raises(DataError, match="batch of 'a'"):
        runs.backward({"a": ((floats(2, 6), floats(3, 6)), None)}, F.mse_loss)
    with pytest.raises(ConfigError, match="DataParallel"):
        veneer.train_many(nn.DataParallel(nn.Linear(2, 2)), {})
    with pytest.raises(TargetError, match=r"adapter 'a'.*seeds"):
        veneer.train_many(
            nn.Linear(6, 5), {"a": veneer.LoraConfig(rank=1, targets="all")}, seeds={}
        )


class Mixing(nn.Module):
    """A model whose rows see each other."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x):
        y = self.linear(x)
        return y - y.mean(0)


class Noisy(Mixing):
    def forward(self, x):
        return self.linear(x) + (torch.randn(1).double() if self.training else 0)


@pytest.mark.parametrize(
    ("model", "words"), [(Mixing, "depends on which others"), (Noisy, "random numbers")]
)
def test_models_that_mix_rows_are_refused(model, words):
    model = model().double().train()
    runs = veneer.train_many(
        model, {name: veneer.LoraConfig(rank=2, targets="all") for name in "ab"}
    )
    batches = {name: (floats(2, 6), floats(2, 4)) for name in "ab"}
    with pytest.raises(SelectionError, match=words):
        runs.backward(batches, F.mse_loss)
    assert all(module.training for module in model.modules())
    assert all(one is None for run in runs.values() for one in gradients(run))
    runs.backward({"a": batches["a"]}, F.mse_loss)  # alone it may


def test_dropout_under_checkpointing_is_right_or_refused():
    model = tiny_model().train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    configs = {
        name: veneer.LoraConfig(rank=2, dropout=drops) for name, drops in (("a", 0.0), ("b", 0.0))
    }
    batch = {name: tokens(causal=True) for name in "ab"}
    runs = veneer.train_many(model, configs)
    runs.backward(batch, causal_loss)
    found = {name: gradients(run) for name, run in runs.items()}
    for run in runs.values():
        for parameter in run.parameters():
            parameter.grad = None
    model.activation_checkpointing_disable()
    runs.backward(batch, causal_loss)
    for name, run in runs.items():
        for one, other in zip(found[name], gradients(run), strict=True):
            torch.testing.assert_close(one, other)
    model.activation_checkpointing_enable({"use_reentrant": False})
    runs.add("c", veneer.LoraConfig(rank=2, dropout=0.5))
    with pytest.raises(SelectionError, match="checkpointing"):
        runs.backward({**batch, "c": tokens(causal=True)}, causal_loss)


def test_heads_biases_and_a_saved_adapter_are_trained_too(tmp_path):
    torch.manual_seed(1)
    base, _, draw, loss = bert()
    base = base.double().train()
    configs = {
        "head": veneer.LoraConfig(rank=2, targets=["query"], train_also=["classifier"]),
        "bias": veneer.LoraConfig(
            rank=2, targets=["query", "key", "value"], bias="targets", dropout=0.2
        ),
        "plain": veneer.LoraConfig(rank=2, targets=["query", "key", "value"], dropout=0.2),
        "tokens": veneer.LoraConfig(targets=(), trainable_tokens=[3, 4]),
    }
    alone = {name: Alone(base, name, own, 0, loss) for name, own in configs.items()}
    runs = veneer.train_many(base, configs)
    batches = {name: draw() for name in configs}
    for _ in range(2):
        losses = runs.backward(batches, loss)
        for name, run in runs.items():
            assert abs(losses[name] - alone[name].step(batches[name])) < 1e-10, name
            assert_same_gradients(run, alone[name].handle)
    runs["head"].save(tmp_path / "head")
    with pytest.raises(ConfigError, match="original for run 'again', which continues"):
        runs.add("again", tmp_path / "head", original={})
    assert set(runs) == set(configs)
    again = runs.add("again", tmp_path / "head")
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.parameters(), runs["head"].parameters(), strict=True)
    )
    runs.backward({"again": batches["head"], "plain": batches["plain"]}, loss)
    assert all(one is not None for one in gradients(again))


def test_a_head_that_an_adapter_changes_is_not_shared():
    torch.manual_seed(2)
    base = tiny_model().double()
    configs = {
        "head": veneer.LoraConfig(rank=2, targets=["lm_head", "q_proj"]),
        "plain": veneer.LoraConfig(rank=2, targets=["q_proj"]),
        "tied": veneer.LoraConfig(rank=2, targets=["embed_tokens"], variant="dora"),
        "rows": veneer.LoraConfig(targets=(), trainable_tokens=[3, 4]),
    }
    alone = {name: Alone(base, name, own, 0, causal_loss) for name, own in configs.items()}
    runs, batches = (
        veneer.train_many(base, configs),
        {name: tokens(causal=True) for name in configs},
    )
    batches["plain"]["labels"][0, :4] = -100
    losses = runs.backward(batches, causal_loss)
    for name, run in runs.items():
        assert abs(losses[name] - alone[name].step(batches[name])) < 1e-10
        assert_same_gradients(run, alone[name].handle)


def test_a_loss_of_the_labels_is_each_runs_own_and_reads_no_other():
    """Weighted by label, alone and together, with an adapter that changes the head too."""
    torch.manual_seed(3)
    base = tiny_model(tie_word_embeddings=False).double()
    targets = {"head": ["lm_head", "q_proj"], "plain": ["q_proj"], "alone": ["lm_head"]}
    configs = {name: veneer.LoraConfig(rank=2, targets=own) for name, own in targets.items()}
    weights = {name: torch.rand(10, dtype=torch.float64) - 0.3 for name in configs}

    def loss(name):
        return LabelLoss(lambda told: (told.exp() * weights[name]).sum())

    alone = {}
    for name, own in configs.items():
        alone[name] = Alone(
            base, name, own, 0, lambda output, target, name=name: whole(name, output, target)
        )

    def whole(name, output, target):
        told = F.cross_entropy(
            output.logits[:, :-1].flatten(0, 1), target[:, 1:].flatten(), reduction="none"
        )
        return (told.exp() * weights[name]).sum()

    runs, batches = (
        veneer.train_many(base, configs),
        {name: tokens(causal=True) for name in configs},
    )
    for names in (("head", "plain"), ("alone",)):
        told = runs.label_losses({name: batches[name] for name in names})
        assert not any(one.losses.requires_grad for one in told.values())
        losses = runs.backward(
            {name: batches[name] for name in names}, {name: loss(name) for name in names}
        )
        for name in names:
            expected = alone[name].step(batches[name])
            assert abs(losses[name] - expected) < 1e-10
            assert abs((told[name].losses.exp() * weights[name]).sum() - expected) < 1e-10
            assert_same_gradients(runs[name], alone[name].handle)


def test_a_run_without_labels_has_no_loss_and_the_others_theirs():
    runs = veneer.train_many(tiny_model(), {name: veneer.LoraConfig(rank=2) for name in "ab"})
    batches = {name: tokens(causal=True) for name in "ab"}
    batches["a"]["labels"][:] = -100
    losses = runs.backward(batches, causal_loss)
    assert losses["a"] == 0
    assert losses["b"] > 0
    assert all(one is None or not one.any() for one in gradients(runs["a"]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [(2, 2, 2), (2, 3, 1), (1, 1, 9)])
@pytest.mark.parametrize("drops", [0.0, 0.3])
def test_spans_are_their_definition(dtype, ranks, drops):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(12, 14).T, torch.randn(10, 12), torch.randn(10)
    A = [torch.randn(rank, 12) for rank in ranks]
    B = [torch.randn(10, rank) for rank in ranks]
    given = [Span(1 + 4 * i, 5 + 4 * i, rank, 0.5 + i, drops, i) for i, rank in enumerate(ranks)]
    leaves = [one.to(torch.float64).requires_grad_() for one in (x, *A, *B)]
    wide = [weight.double(), bias.double()]
    masks = [torch.ones(4, 12, dtype=torch.float64) for _ in given]
    for span, mask in zip(given, masks, strict=True):
        if drops:
            mask.view(-1)[span.drop_entries(x[span.first : span.after])] = 0
    y = F.linear(leaves[0], *wide)
    parts = [
        y[span.first : span.after]
        + span.strength * (leaves[0][span.first : span.after] * mask) @ down.mT @ up.mT
        for span, mask, down, up in zip(given, masks, leaves[1:4], leaves[4:], strict=True)
    ]
    expected = torch.cat([y[:1], *parts, y[13:]])
    dy = torch.randn(10, 14).T
    wanted = torch.autograd.grad(expected, leaves, dy.double())
    own = [x.to(dtype).requires_grad_(), *(one.clone().requires_grad_() for one in (*A, *B))]
    if dtype is torch.float64:
        own = [one.detach().double().requires_grad_() for one in own]
    factors = [one[None] for one in own[1:]]
    found = kernel.linear(
        own[0],
        nn.Parameter(weight.to(dtype), False),
        bias.to(dtype),
        given,
        factors[:3],
        factors[3:],
    )
    near = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(
        found.detach().double() / scale, expected.detach() / scale, rtol=0, atol=near
    )
    grads = torch.autograd.grad(
        found, own, dy.to(dtype), create_graph=dtype is torch.float64 and not drops
    )
    for one, other in zip(grads, wanted, strict=True):
        scale = float(other.abs().max())
        torch.testing.assert_close(one.detach().double() / scale, other / scale, rtol=0, atol=near)


def test_the_names_are_the_packages():
    assert veneer.train_many is many.train_many
    assert veneer.Runs is many.Runs
