"""/score and /rerank: encoders by the cosine of their vectors, classifiers by their logit, each with
adapters."""

from __future__ import annotations

from contextlib import contextmanager

import httpx
import pytest
import torch
from tests.support.api_server import BASE, listening, serving
from tests.support.service import open_service
from tests.support.tiny import tiny_config, tiny_tokenizer
from transformers import BertConfig, BertForSequenceClassification, BertModel

import veneer

TEXTS = ["a cat", "a cat sat on a mat", "stocks fell"]
SHAPE = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def build(labels: int, **fields):
    """A tiny BERT with random weights; with labels, its classifier."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(**SHAPE, **({"num_labels": labels} if labels else {}), **fields)
        model = (BertForSequenceClassification if labels else BertModel)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.2)
    return model


def typed_tokenizer():
    """The tiny one, with BERT's types of the tokens of a pair."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A", pair="$A $B:1", special_tokens=[]
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.model_max_length = 64
    return tokenizer


def write(folder, labels: int, **fields):
    """A base folder and an adapter "own" beside it."""
    build(labels, **fields).save_pretrained(folder / "base")
    typed_tokenizer().save_pretrained(folder / "base")
    model = build(labels, **fields)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets=["query", "value"]))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(0, 0.3)
    handle.save(folder / "adapters" / "own")
    return folder


@contextmanager
def served(folder):
    service = open_service(folder / "base", folder / "adapters")
    with listening(service) as (url, _), httpx.Client(base_url=url, timeout=30) as http:
        yield http, service


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("encoder"), 0)
    with served(folder) as (http, service):
        yield http, service, folder


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("scorer"), 1)
    with served(folder) as (http, service):
        yield http, service, folder


def loaded(folder, labels, adapter):
    model = build(labels)
    if adapter:
        veneer.load(model, folder / "adapters" / "own")
    return model


def cosines(folder, adapter, pairs):
    """By transformers, text by text, in float64."""
    model, tokenizer = loaded(folder, 0, adapter).double(), tiny_tokenizer()

    def vector(text):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            return model(input_ids=ids).last_hidden_state[0].mean(0)

    return [float(torch.cosine_similarity(vector(a), vector(b), dim=0)) for a, b in pairs]


def logits(folder, adapter, pairs):
    model, tokenizer = loaded(folder, 1, adapter).double(), typed_tokenizer()
    found = []
    for pair in pairs:
        encoded = tokenizer(*pair)
        assert set(encoded["token_type_ids"]) == {0, 1}
        inputs = {name: torch.tensor([encoded[name]]) for name in ("input_ids", "token_type_ids")}
        with torch.inference_mode():
            found.append(float(model(**inputs).logits))
    return found


def scores(http, **fields):
    answer = http.post("/score", json={"model": "tiny", **fields})
    assert answer.status_code == 200, answer.text
    return [entry["score"] for entry in answer.json()["data"]]


@pytest.mark.parametrize("adapter", [None, "own"])
def test_an_encoder_scores_by_the_cosine_of_vectors(encoder, adapter):
    http, _, folder = encoder
    pairs = [(TEXTS[0], text) for text in TEXTS]
    found = scores(http, model=adapter or "tiny", text_1=TEXTS[0], text_2=TEXTS)
    assert found == pytest.approx(cosines(folder, adapter, pairs), abs=1e-5)
    assert found[0] == pytest.approx(1.0, abs=1e-5)


def test_pairs_are_one_with_each_or_one_by_one(encoder):
    http, _, folder = encoder
    pairs = list(zip(TEXTS, reversed(TEXTS), strict=True))
    found = scores(http, text_1=TEXTS, text_2=TEXTS[::-1])
    assert found == pytest.approx(cosines(folder, None, pairs), abs=1e-5)
    assert scores(http, queries=TEXTS, documents=TEXTS[::-1]) == pytest.approx(found, abs=1e-6)
    assert len(scores(http, text_1="a", text_2="b")) == 1


@pytest.mark.parametrize("adapter", [None, "own"])
def test_a_classifier_of_one_label_scores_by_its_logit(scorer, adapter):
    http, service, folder = scorer
    assert service.embedder.label_count == 1
    pairs = [(TEXTS[0], text) for text in TEXTS]
    fields = {"model": adapter or "tiny", "text_1": TEXTS[0], "text_2": TEXTS}
    wanted = torch.tensor(logits(folder, adapter, pairs))
    assert scores(http, **fields, use_activation=False) == pytest.approx(wanted.tolist(), abs=1e-4)
    assert scores(http, **fields) == pytest.approx(wanted.sigmoid().tolist(), abs=1e-5)


def test_adapters_differ_and_a_blend_of_nothing_is_the_base(scorer):
    http, _, _ = scorer
    fields = {"text_1": TEXTS[0], "text_2": TEXTS[1:]}
    base, own = scores(http, **fields), scores(http, model="own", **fields)
    assert base != pytest.approx(own, abs=1e-4)
    assert scores(http, **fields, adapters={"own": 0.0}) == pytest.approx(base, abs=1e-6)


def test_a_classifier_gives_the_vectors_of_its_encoder_too(scorer):
    http, _, _ = scorer
    body = {"model": "tiny", "input": TEXTS}
    found = http.post("/v1/embeddings", json=body).json()["data"]
    model, ids = build(1).bert, tiny_tokenizer()(TEXTS[0])["input_ids"]
    with torch.inference_mode():
        hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    wanted = torch.nn.functional.normalize(hidden.mean(0), dim=0)
    assert found[0]["embedding"] == pytest.approx(wanted.tolist(), abs=1e-4)


def test_an_activation_that_the_config_leaves_out_is_left_out(tmp_path):
    fields = {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}
    folder = write(tmp_path, 1, **fields)
    with served(folder) as (http, _):
        found = scores(http, text_1=TEXTS[0], text_2=TEXTS)
    wanted = logits(folder, None, [(TEXTS[0], text) for text in TEXTS])
    assert found == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("route", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_documents_come_in_the_order_of_their_scores(scorer, route):
    http, _, _ = scorer
    documents = [TEXTS[0], {"text": TEXTS[1]}, TEXTS[2]]
    body = {"model": "tiny", "query": "cats", "documents": documents}
    answer = http.post(route, json=body).json()
    wanted = scores(http, text_1="cats", text_2=TEXTS)
    order = sorted(range(3), key=lambda i: -wanted[i])
    results = answer["results"]
    assert [result["index"] for result in results] == order
    assert [result["document"]["text"] for result in results] == [TEXTS[i] for i in order]
    found = [result["relevance_score"] for result in results]
    assert found == pytest.approx([wanted[i] for i in order], abs=1e-6)
    assert answer["usage"]["total_tokens"] == sum(len("cats") + len(text) for text in TEXTS)
    best = http.post(route, json={**body, "top_n": 1, "return_documents": False}).json()
    assert best["results"] == [{"index": order[0], "relevance_score": found[0]}]


def test_a_text_that_is_too_long_is_refused_or_cut(scorer, encoder):
    for http, _, _ in (scorer, encoder):
        body = {"model": "tiny", "text_1": "a", "text_2": "b" * 100}
        answer = http.post("/score", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        for truncate in (-1, 10):
            cut = http.post("/score", json={**body, "truncate_prompt_tokens": truncate})
            assert cut.status_code == 200, cut.text


def special_tokenizer():
    """That of ``typed_tokenizer``, with 2 special tokens around a text, and 3 around a pair."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = typed_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        pair="<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1",
        special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)],
    )
    return tokenizer


def test_a_truncation_that_leaves_no_token_of_the_text_is_refused(scorer, encoder, monkeypatch):
    for (http, service, _), special_count in ((encoder, 2), (scorer, 3)):
        monkeypatch.setattr(service, "tokenizer", special_tokenizer())
        body = {"model": "tiny", "text_1": "abc", "text_2": "defg"}
        for truncate in (1, special_count):
            answer = http.post("/score", json={**body, "truncate_prompt_tokens": truncate})
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["param"] == "truncate_prompt_tokens"
            assert f"at least {special_count + 1}" in answer.json()["error"]["message"]
        for truncate in (special_count + 1, -1):
            answer = http.post("/score", json={**body, "truncate_prompt_tokens": truncate})
            assert answer.status_code == 200, answer.text


def test_calls_are_counted(encoder):
    http, _, _ = encoder
    scores(http, model="own", text_1="abc", text_2=["abc", "de"])
    page = http.get("/metrics").text
    assert 'veneer_requests_total{adapter="own",outcome="stop"}' in page


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("score", {"text_1": ["a", "b"], "text_2": ["c"]}, "text_1"),
        ("score", {"text_1": "a"}, "text_2"),
        ("score", {"text_1": "a", "text_2": []}, "text_2"),
        ("score", {"text_1": "a", "text_2": ["b"] * 257}, "text_2"),
        ("score", {"text_1": "a", "text_2": "b", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ("rerank", {"query": "a", "documents": []}, "documents"),
        ("rerank", {"query": "a", "documents": [5]}, "documents"),
        ("rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
        ("rerank", {"query": "a", "documents": ["b"], "nonsense": 1}, "nonsense"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(encoder, route, body, param):
    http, _, _ = encoder
    answer = http.post(f"/{route}", json={"model": "tiny", **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_a_language_model_and_an_unknown_adapter_are_refused(tmp_path, encoder):
    http, _, _ = encoder
    body = {"text_1": "a", "text_2": "b"}
    assert http.post("/score", json={"model": "nobody", **body}).status_code == 404
    with serving(tmp_path / "dir") as causal, causal.http() as client:
        answer = client.post("/score", json={"model": BASE, **body})
        assert answer.json()["error"]["code"] == "no_embeddings"


def test_texts_are_padded_as_the_classifier_of_a_decoder_finds_their_end(tmp_path):
    """By the padding token of its config, where the tokenizer has none."""
    from transformers import LlamaForSequenceClassification

    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(tiny_config(num_labels=1, pad_token_id=2)).eval()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "adapters").mkdir()
    with served(tmp_path) as (http, _), torch.no_grad():
        found = scores(http, text_1="a", text_2=TEXTS, use_activation=False)
        expected = [
            float(model(torch.tensor([tokenizer("a", text)["input_ids"]])).logits) for text in TEXTS
        ]
    assert found == pytest.approx(expected, abs=1e-4)
