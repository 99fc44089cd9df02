"""Each method trains its parameters and no others."""

from __future__ import annotations

import itertools

import pytest
import torch
from experiments.training import METHODS, draw_batches, make_trainable, train, trainable
from transformers import BertConfig, BertForTokenClassification

import veneer

WIDTH, INNER, LAYERS, RANK = 16, 4, 2, 2
#: in closed form, of a BERT without the head: biases of linear layers and layer norms; two
#: bottlenecks a block and the layer norms (Houlsby et al. 2019); 2 · rank · width for each of the
#: four square layers, and as much for the feed-forward layers
BIASES = LAYERS * (5 * WIDTH + 32 + 2 * WIDTH) + WIDTH
ADAPTERS = LAYERS * 2 * (2 * WIDTH * INNER + INNER + WIDTH) + (2 * LAYERS + 1) * 2 * WIDTH
LORA = LAYERS * RANK * (4 * 2 * WIDTH + 2 * (WIDTH + 32))
COUNTS = {"head": 0, "bias": BIASES, "adapters": ADAPTERS, "lora": LORA}


def make_bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForTokenClassification(config)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_starts_as_the_base_and_trains_its_numbers(method):
    model, ids = make_bert(), torch.arange(24).reshape(4, 6)
    with torch.no_grad():
        before = model(input_ids=ids).logits
    lora = veneer.LoraConfig(rank=RANK, train_also="classifier")
    count = make_trainable(model, method, head=("classifier",), lora=lora, inner=INNER)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)
    full = sum(parameter.numel() for parameter in make_bert().bert.parameters())
    assert count == COUNTS.get(method, full)
    trained_ids = set(map(id, trainable(model)))
    starts = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first = model(input_ids=ids, labels=ids % 3).loss.item()
    last = train(
        trainable(model),
        draw_batches(4, 4, 0),
        lambda rows: model(input_ids=ids[rows], labels=ids[rows] % 3).loss,
        steps=30,
        rate=1e-2,
    )
    changed = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter, starts[name])
    }
    assert last < first
    assert changed <= trained_ids
    assert len(changed) > 0.8 * len(trained_ids)  # a key's bias has no gradient


def test_batches_hold_each_row_once_an_epoch_and_like_lengths_together():
    lengths = [row % 7 for row in range(100)]
    for row_lengths in (None, lengths):
        epoch = [*itertools.islice(draw_batches(100, 10, 3, row_lengths), 10)]
        assert sorted(itertools.chain(*epoch)) == [*range(100)]
    spans = [
        max(map(lengths.__getitem__, rows)) - min(map(lengths.__getitem__, rows)) for rows in epoch
    ]
    assert max(spans) <= 1
    twice = [[*itertools.islice(draw_batches(100, 10, 3), 20)] for _ in range(2)]
    assert twice[0] == twice[1]


def test_the_rate_rises_and_falls():
    weight = torch.nn.Parameter(torch.zeros(()))
    weights = []

    def loss(_):
        weights.append(weight.item())
        return weight * 1.0

    train([weight], itertools.repeat(None), loss, steps=20, rate=1.0, warmup=0.2)
    steps = [before - after for before, after in itertools.pairwise([*weights, weight.item()])]
    assert steps == pytest.approx(
        [0.25, 0.5, 0.75, 1.0, *(share / 16 for share in range(16, 0, -1))], rel=1e-3
    )
