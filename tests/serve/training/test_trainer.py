"""What the training service computes: each run as alone, whoever else is there, and samples from
the same numbers."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from tests.support.tiny import tiny_model

import veneer
from veneer.adapter_files.verify import verify
from veneer.engine import PassResult
from veneer.errors import AdapterError, DataError, TargetError, TrainingError
from veneer.serve.training.losses import LOSSES, Datum, check_datum, complete_settings
from veneer.serve.training.run_trainer import Adam, DivergenceError, Pass, Trainer

CONFIGS = {
    "a": veneer.LoraConfig(rank=4),
    "b": veneer.LoraConfig(rank=8, targets="attention"),
    "c": veneer.LoraConfig(rank=2, targets=["mlp", "lm_head"]),
}


@pytest.fixture
def model():
    return tiny_model(tie_word_embeddings=False)


@pytest.fixture
def trainer(model):
    made = Trainer(model, veneer.Bank(model))
    for number, (name, config) in enumerate(CONFIGS.items()):
        made.begin(name, config, seed=number)
    return made


def datum(draw, loss, size=None, k=None):
    size = size or draw.randint(1, 20)
    shape = (size,) if k is None else (size, k)
    numbers = torch.Generator().manual_seed(draw.randrange(2**31))
    inputs = {name: torch.rand(shape, generator=numbers) - 0.4 for name in LOSSES[loss].inputs}
    if "logprobs" in inputs:
        inputs["logprobs"] = inputs["logprobs"] * 0.5 - 5.6  # near those of a tiny random model
    tokens = torch.tensor([draw.randrange(3, 259) for _ in range(size)])
    return check_datum(
        Datum(tokens, torch.randint(3, 259, shape, generator=numbers), inputs), loss, 0, 259, 200
    )


def run_all(trainer, passes):
    while left := [one for one in passes if not one.is_over]:
        trainer.compute(left)
    return passes


def by_hand(model, handle, data, loss, settings):
    """The loss as its definition in a loop over data, and the log-probabilities of the targets."""
    total, found = torch.zeros(()), []
    with handle.use():
        for one in data:
            logprobs = F.log_softmax(model(one.tokens[None]).logits[0], -1)
            targets = one.targets if one.targets.dim() == 2 else one.targets[:, None]
            own = logprobs.gather(-1, targets).view(one.targets.shape)
            found.append(own.detach())
            total = total + LOSSES[loss].terms(own, one.inputs, settings).sum()
    return total, found


def alone(config, seed, data, loss, settings):
    """Loss, log-probabilities and gradients of a model of its own."""
    model = tiny_model(tie_word_embeddings=False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        handle = veneer.attach(model, config)
    total, found = by_hand(model, handle, data, loss, settings)
    total.backward()
    return float(total.detach()), found, [parameter.grad for parameter in handle.parameters()]


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_is_its_definition_in_a_batch_of_all(trainer, loss):
    draw, settings = random.Random(1), complete_settings(loss, {})
    passes = [Pass(name, [datum(draw, loss) for _ in range(4)], loss, settings) for name in CONFIGS]
    run_all(trainer, passes)
    for number, one in enumerate(passes):
        total, logprobs, gradients = alone(
            CONFIGS[one.adapter_name], number, one.data, loss, settings
        )
        assert one.error is None
        assert one.loss_sum == pytest.approx(total, rel=1e-4, abs=1e-4)
        for own, expected in zip(one.logprobs, logprobs, strict=True):
            torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-5)
        for own, expected in zip(trainer._parameters(one.adapter_name), gradients, strict=True):
            torch.testing.assert_close(own.grad, expected, atol=1e-4, rtol=1e-3)


def test_the_definitions():
    """By hand, for one token: ratio e^0.5, advantage 2."""
    logprobs, advantage = torch.tensor([-1.0]), torch.tensor([2.0])
    inputs = {
        "logprobs": torch.tensor([-1.5]),
        "advantages": advantage,
        "weights": torch.tensor([0.5]),
    }
    inputs["sequence_ratio_mask"] = torch.ones(1)
    ratio = float(torch.tensor(0.5).exp())
    expected = {
        "cross_entropy": 0.5, "importance_sampling": -2 * ratio, "ppo": -2 * 1.2, "cispo": 2 * 1.2,
        "dro": 2 + 0.5 * 0.05 * 0.25, "gspo": -2 * 1.0004,
    }  # fmt: skip
    for name, value in expected.items():
        found = LOSSES[name].terms(logprobs, inputs, complete_settings(name, {}))
        assert found.item() == pytest.approx(value, rel=1e-6), name
    wide = complete_settings("ppo", {"clip_high_threshold": 9})
    assert float(LOSSES["ppo"].terms(logprobs, inputs, wide)) == pytest.approx(-2 * ratio)


def test_the_ratio_of_a_row_in_gspo():
    """Tokens of ratios e^0.2 and e^0.4, and one that the mask leaves out: e^0.3 for each, with its
    own gradient."""
    logprobs = torch.tensor([-1.0, -1.0, -9.0], requires_grad=True)
    inputs = {
        "logprobs": torch.tensor([-1.2, -1.4, 0.0]), "advantages": torch.tensor([1.0, -2.0, 0.0]),
        "sequence_ratio_mask": torch.tensor([1.0, 1.0, 0.0]),
    }  # fmt: skip
    wide, ratio = (
        {"clip_low_threshold": 0.0, "clip_high_threshold": 9.0},
        float(torch.tensor(0.3).exp()),
    )
    terms = LOSSES["gspo"].terms(logprobs, inputs, wide)
    terms.sum().backward()
    assert terms.tolist() == pytest.approx([-ratio, 2 * ratio, 0.0], rel=1e-6)
    assert logprobs.grad.tolist() == pytest.approx([-ratio, 2 * ratio, 0.0], rel=1e-6)
    clipped = LOSSES["gspo"].terms(logprobs, inputs, complete_settings("gspo", {}))
    assert clipped.tolist() == pytest.approx([-1.0004, 2 * ratio, 0.0], rel=1e-6)
    with pytest.raises(DataError, match="a sequence_ratio_mask of zeros in datum 3"):
        inputs["sequence_ratio_mask"] = torch.zeros(3)
        check_datum(Datum(torch.ones(3).long(), torch.ones(3).long(), inputs), "gspo", 3, 259, 200)


def test_a_token_that_does_not_count_may_be_impossible():
    logprobs = torch.tensor([-torch.inf, -1.0], requires_grad=True)
    LOSSES["cross_entropy"].terms(
        logprobs, {"weights": torch.tensor([0.0, 1.0])}, {}
    ).sum().backward()
    assert logprobs.grad.tolist() == [0.0, -1.0]


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo"])
def test_a_token_that_does_not_count_may_have_any_probability(loss):
    """−1000: a placeholder for a token that was not sampled. Its ratio exp(999) is infinite."""
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    inputs = {
        "logprobs": torch.tensor([-1000.0, -1.0]),
        "advantages": torch.tensor([0.0, 1.0]),
    }
    LOSSES[loss].terms(logprobs, inputs, LOSSES[loss].settings).sum().backward()
    assert logprobs.grad.tolist() == [0.0, -1.0]


def test_several_targets_a_token(trainer):
    draw = random.Random(2)
    data = [datum(draw, "cross_entropy", k=3) for _ in range(3)]
    told = [Pass("c", data, "cross_entropy", backward=backward) for backward in (False, True)]
    for one in told:
        run_all(
            trainer,
            [
                one,
                Pass("a", [datum(draw, "cross_entropy")], "cross_entropy", backward=one.backward),
            ],
        )
        assert one.error is None
    total, logprobs, gradients = alone(CONFIGS["c"], 2, data, "cross_entropy", {})
    for one in told:
        assert one.loss_sum == pytest.approx(total, rel=1e-4)
        for own, expected in zip(one.logprobs, logprobs, strict=True):
            torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-5)
    for own, expected in zip(trainer._parameters("c"), gradients, strict=True):
        torch.testing.assert_close(own.grad, expected, atol=1e-4, rtol=1e-3)


def test_rows_of_waiting_passes_share_a_batch(trainer, monkeypatch):
    seen = []

    def record(requests, keep_going):
        seen.append({name: request.batch.kwargs for name, request in requests.items()})
        return PassResult(dict.fromkeys(requests, torch.zeros(())), {})

    monkeypatch.setattr(trainer.engine, "backward", record)
    draw = random.Random(3)
    passes = [
        Pass(name, [datum(draw, "ppo", size=size) for size in (16, 15, 2)], "ppo", {})
        for name in CONFIGS
    ]
    run_all(trainer, passes)
    widths = [
        {name: batch["input_ids"].shape[1] for name, batch in batches.items()} for batches in seen
    ]
    assert widths[0] == dict.fromkeys("abc", 17)
    assert len(widths) == 2  # at most a quarter of a batch is padding


def test_a_forward_leaves_no_gradient_and_two_passes_add_up(trainer):
    draw = random.Random(4)
    first, second = ([datum(draw, "cross_entropy") for _ in range(3)] for _ in range(2))
    run_all(trainer, [Pass("a", first, "cross_entropy", backward=False)])
    assert not trainer.has_pending_gradients("a")
    for data in (first, second):
        run_all(trainer, [Pass("a", data, "cross_entropy")])
    *_, gradients = alone(CONFIGS["a"], 0, [*first, *second], "cross_entropy", {})
    for own, expected in zip(trainer._parameters("a"), gradients, strict=True):
        torch.testing.assert_close(own.grad, expected, atol=1e-4, rtol=1e-3)


def test_steps_are_adamws_with_settings_of_their_own(trainer):
    draw, model = random.Random(5), tiny_model(tie_word_embeddings=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        handle = veneer.attach(model, CONFIGS["a"])
    own = torch.optim.AdamW(handle.parameters())
    for step in range(4):
        data = [datum(draw, "cross_entropy") for _ in range(3)]
        adam = Adam(0.01 / (1 + step), 0.8, 0.9, 1e-8, 0.1 * step, clip=0.5 if step % 2 else 0.0)
        run_all(trainer, [Pass("a", data, "cross_entropy")])
        norm = trainer.step("a", adam)["unclipped_grad_l2:mean"]
        assert not trainer.has_pending_gradients("a")
        by_hand(model, handle, data, "cross_entropy", {})[0].backward()
        total = torch.nn.utils.clip_grad_norm_(handle.parameters(), adam.clip or torch.inf)
        assert norm == pytest.approx(float(total), rel=1e-4)
        own.param_groups[0].update(
            lr=adam.rate, betas=(0.8, 0.9), eps=1e-8, weight_decay=adam.decay
        )
        own.step()
        own.zero_grad()
    for one, other in zip(trainer._parameters("a"), handle.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_what_is_not_finite_stays_with_its_run(trainer):
    draw = random.Random(6)
    good, bad = ([datum(draw, "importance_sampling", size=9) for _ in range(2)] for _ in range(2))
    bad[1] = Datum(
        bad[1].tokens, bad[1].targets, {**bad[1].inputs, "logprobs": torch.full((9,), -1e4)}
    )
    run_all(trainer, [Pass("b", [good[0]], "importance_sampling")])
    kept = [parameter.grad.clone() for parameter in trainer._parameters("b")]
    passes = run_all(
        trainer, [Pass("a", good, "importance_sampling"), Pass("b", bad, "importance_sampling")]
    )
    assert passes[0].error is None
    assert isinstance(passes[1].error, TrainingError)
    assert all(
        torch.equal(parameter.grad, own)
        for parameter, own in zip(trainer._parameters("b"), kept, strict=True)
    )
    total, _, gradients = alone(CONFIGS["a"], 0, good, "importance_sampling", {})
    assert passes[0].loss_sum == pytest.approx(total, rel=1e-4)
    for own, expected in zip(trainer._parameters("a"), gradients, strict=True):
        torch.testing.assert_close(own.grad, expected, atol=1e-4, rtol=1e-3)


def test_a_batch_that_fails_is_tried_run_by_run(trainer, monkeypatch):
    draw, real = random.Random(7), trainer.engine.backward

    def broken(requests, keep_going):
        if "b" in requests:
            raise MemoryError("too much")
        return real(requests, keep_going)

    monkeypatch.setattr(trainer.engine, "backward", broken)
    passes = run_all(
        trainer,
        [Pass(name, [datum(draw, "cross_entropy", size=5)], "cross_entropy") for name in "abc"],
    )
    assert [type(one.error) for one in passes] == [type(None), MemoryError, type(None)]
    assert [trainer.has_pending_gradients(name) for name in "abc"] == [True, False, True]


def test_the_loss_of_a_batch_that_failed_behind_it_counts_once(trainer, monkeypatch):
    """Memory may run out in the backward, when the losses of all runs are known."""
    draw, real, calls = random.Random(7), torch.autograd.backward, []

    def fail_once(tensors, *args, **kwargs):
        if isinstance(tensors, list):  # of all runs; the loss has backwards of its own
            calls.append(len(tensors))
            if len(calls) == 1:
                raise MemoryError("too much")
        return real(tensors, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "backward", fail_once)
    data = {name: [datum(draw, "cross_entropy", size=5)] for name in "ab"}
    passes = run_all(trainer, [Pass(name, data[name], "cross_entropy") for name in "ab"])
    assert calls == [2, 1, 1]
    for number, one in enumerate(passes):
        total, *_ = alone(CONFIGS[one.adapter_name], number, one.data, "cross_entropy", {})
        assert one.error is None
        assert one.loss_sum == pytest.approx(total, rel=1e-4)


def test_a_run_goes_on_from_its_folder_bit_for_bit(trainer, tmp_path):
    draw = random.Random(8)
    data = [[datum(draw, "cross_entropy") for _ in range(2)] for _ in range(4)]

    def steps(run, some):
        for own in some:
            run_all(trainer, [Pass(run, own, "cross_entropy")])
            trainer.step(run, Adam(0.01))

    steps("a", data[:2])
    trainer.save("a", tmp_path / "state", "tiny")
    assert verify(tmp_path / "state" / "adapter", trainer.model).ok
    steps("a", data[2:])
    whole = [parameter.detach().clone() for parameter in trainer._parameters("a")]
    trainer.load("a", tmp_path / "state", optimizer=True)
    steps("a", data[2:])
    assert all(
        torch.equal(one, other) for one, other in zip(whole, trainer._parameters("a"), strict=True)
    )
    trainer.load("b", tmp_path / "state", optimizer=False)
    assert not trainer.engine.adapters["b"].optimizer.state
    trainer.end("b")
    assert "b" not in trainer.runs


def test_samples_are_drawn_from_the_numbers_that_were_published(trainer, tmp_path):
    draw = random.Random(9)
    for name in "ac":
        run_all(
            trainer, [Pass(name, [datum(draw, "cross_entropy") for _ in range(3)], "cross_entropy")]
        )
        trainer.step(name, Adam(0.02))
        trainer.export(name, tmp_path / name, None)
        trainer._bank.put(f"of-{name}", tmp_path / name, name)
    one = Pass("c", [datum(draw, "cross_entropy", size=12)], "cross_entropy", backward=False)
    run_all(trainer, [one])
    ids = one.data[0].tokens
    with trainer._bank.acquire({"of-c": 1.0}).result() as lease, trainer.sampling([lease]) as model:
        logprobs = F.log_softmax(model(ids[None]).logits[0], -1).gather(
            -1, one.data[0].targets[:, None]
        )[:, 0]
    torch.testing.assert_close(logprobs, one.logprobs[0], atol=1e-4, rtol=0)
    for _ in range(2):
        run_all(trainer, [Pass("c", one.data, "cross_entropy")])
        trainer.step("c", Adam(0.1))
    with trainer._bank.acquire({"of-c": 1.0}).result() as lease, trainer.sampling([lease]) as model:
        again = F.log_softmax(model(ids[None]).logits[0], -1).gather(
            -1, one.data[0].targets[:, None]
        )[:, 0]
    torch.testing.assert_close(again, logprobs)


def test_the_base_is_as_it_was(trainer, model):
    draw, before = (
        random.Random(10),
        copy.deepcopy(tiny_model(tie_word_embeddings=False).state_dict()),
    )
    run_all(
        trainer, [Pass(name, [datum(draw, "cross_entropy")], "cross_entropy") for name in "abc"]
    )
    for name in "abc":
        trainer.step(name, Adam(0.1))
        trainer.end(name)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": torch.tensor([], dtype=torch.long)}, "datum 3 of 0 tokens"),
        ({"tokens": torch.ones(300, dtype=torch.long)}, "datum 3 of 300 tokens"),
        ({"targets": torch.ones(4, dtype=torch.long)}, r"target_tokens \[4\] in datum 3"),
        ({"tokens": torch.tensor([1, 2, 259])}, "token 259 in model_input of datum 3"),
        ({"targets": torch.tensor([1, -1, 2])}, "token -1 in target_tokens of datum 3"),
        ({"inputs": {"weights": torch.ones(2)}}, r"weights \[2\] in datum 3"),
        ({"inputs": {"weights": torch.tensor([1, torch.nan, 1])}}, "no finite numbers in datum 3"),
        ({"inputs": {"advantages": torch.ones(3)}}, "input 'advantages' in datum 3"),
    ],
)
def test_bad_data_are_named(change, words):
    fields = {
        "tokens": torch.tensor([1, 2, 3]),
        "targets": torch.tensor([2, 3, 4]),
        "inputs": {},
        **change,
    }
    with pytest.raises(DataError, match=words):
        check_datum(Datum(**fields), "cross_entropy", 3, 259, 200)


def test_bad_settings_are_named(trainer):
    for loss, settings, words in (
        ("stable_reinforce", {}, "the loss 'stable_reinforce'"),
        ("ppo", {"beta": 1.0}, "setting 'beta' of ppo"),
        ("dro", {"beta": torch.nan}, "beta nan"),
        ("ppo", {"clip_low_threshold": 2.0}, "clip_low_threshold 2"),
    ):
        with pytest.raises(DataError, match=words):
            complete_settings(loss, settings)
    for field, value in (
        ("rate", torch.nan),
        ("rate", -1.0),
        ("beta2", 1.0),
        ("eps", 0.0),
        ("decay", 1e9),
        ("clip", -1.0),
    ):
        with pytest.raises(DataError, match="a number from"):
            trainer.step("a", Adam(**{field: value}))
    with pytest.raises(TargetError):
        trainer.begin("d", veneer.LoraConfig(rank=64), 0)
    assert list(trainer.runs) == ["a", "b", "c"]


# ----------------------------------------------------------------------------------------------
# numbers too large


def weighted(draw, weight):
    one = datum(draw, "cross_entropy", size=9)
    return Datum(one.tokens, one.targets, {"weights": torch.full((9,), weight)})


def test_a_sum_of_gradients_that_is_too_large_fails_the_pass_that_made_it(trainer):
    """Each of the two alone is within bounds."""
    draw = random.Random(11)
    one = weighted(draw, 1.0)
    run_all(trainer, [Pass("a", [one], "cross_entropy")])
    largest = max(float(parameter.grad.abs().max()) for parameter in trainer._parameters("a"))
    for parameter in trainer._parameters("a"):
        parameter.grad *= 8e17 / largest
    kept = [parameter.grad.clone() for parameter in trainer._parameters("a")]
    wide = Datum(one.tokens, one.targets, {"weights": torch.full((9,), 8e17 / largest)})
    passed = Pass("a", [wide], "cross_entropy")
    run_all(trainer, [passed])
    assert isinstance(passed.error, TrainingError)
    assert all(
        torch.equal(parameter.grad, own)
        for parameter, own in zip(trainer._parameters("a"), kept, strict=True)
    )
    for parameter in trainer._parameters("a"):
        parameter.grad = None
    run_all(trainer, [again := Pass("a", [wide], "cross_entropy")])
    assert again.error is None


def test_a_gradient_whose_square_overflows_fails_its_pass(trainer):
    """AdamW's second moment would be infinite from then on, and each later step of that weight
    nothing."""
    draw = random.Random(12)
    one = Pass("a", [weighted(draw, 1e24)], "cross_entropy")
    run_all(trainer, [one])
    assert isinstance(one.error, TrainingError)
    assert "1e+18" in str(one.error)
    assert not trainer.has_pending_gradients("a")


def test_the_norm_of_a_gradient_is_right_where_float32_would_overflow(trainer):
    parameters = trainer._parameters("a")
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 9e17)
    count = sum(parameter.numel() for parameter in parameters)
    before = [parameter.detach().clone() for parameter in parameters]
    told = trainer.step("a", Adam(0.01, clip=1.0))
    assert told["unclipped_grad_l2:mean"] == pytest.approx(9e17 * count**0.5, rel=1e-6)
    moved = [
        float((own.detach() - old).abs().max()) for own, old in zip(parameters, before, strict=True)
    ]
    assert moved == pytest.approx([0.01] * len(moved), rel=1e-3)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_a_state_of_an_optimiser_that_is_not_finite_is_not_loaded(trainer, tmp_path, key):
    draw = random.Random(13)
    run_all(trainer, [Pass("a", [datum(draw, "cross_entropy")], "cross_entropy")])
    trainer.step("a", Adam())
    next(iter(trainer.engine.adapters["a"].optimizer.state.values()))[key].fill_(torch.inf)
    trainer.save("a", tmp_path / "state", None)
    weights = [parameter.detach().clone() for parameter in trainer._parameters("b")]
    with pytest.raises(AdapterError, match="not finite"):
        trainer.load("b", tmp_path / "state", optimizer=True)
    assert all(
        torch.equal(one, other)
        for one, other in zip(weights, trainer._parameters("b"), strict=True)
    )


def test_a_step_beyond_what_a_folder_can_hold_is_the_runs_end(trainer):
    draw = random.Random(14)
    wild = Adam(10.0, beta2=0.0, eps=1e-20)
    run_all(trainer, [Pass("a", [datum(draw, "cross_entropy")], "cross_entropy")])
    trainer.step("a", wild)
    run_all(trainer, [Pass("a", [datum(draw, "cross_entropy")], "cross_entropy")])
    with pytest.raises(DivergenceError, match="load a checkpoint"):
        trainer.step("a", wild)
