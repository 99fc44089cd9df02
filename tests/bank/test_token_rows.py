"""An adapter with trained tokens beside others in a bank, and behind a server."""

from __future__ import annotations

import openai
import pytest
import torch
from tests.support.api_server import listening
from tests.support.banks import alone
from tests.support.service import open_service
from tests.support.tiny import tiny_model, tiny_tokenizer
from tests.support.toys import error, randomise
from transformers import AutoModelForCausalLM

import veneer
from veneer.errors import AdapterError

NEW = [259, 260, 261]
IDS = torch.tensor([[1, 259, 7, 260, 261, 3]] * 3)
CONFIGS = {
    "tokens": veneer.LoraConfig(rank=2, targets="q_proj", trainable_tokens=NEW),
    "more": veneer.LoraConfig(rank=2, targets=["embed_tokens"], trainable_tokens=[5, 260]),
    "plain": veneer.LoraConfig(rank=3, targets="all-linear"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(a base whose vocabulary has grown and was saved, the folder of its adapters)."""
    folder = tmp_path_factory.mktemp("tokens")
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.add_tokens(["<a>", "<b>", "<c>"])
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for name, config in CONFIGS.items():
        handle = veneer.attach(model, config, "own")
        randomise(handle)
        handle.save(folder / "adapters" / name)
        handle.detach()
    return folder / "base", folder / "adapters"


def opened(base):
    return AutoModelForCausalLM.from_pretrained(base).eval()


def test_rows_of_several_adapters_are_as_each_alone(place):
    base, adapters = place
    model = opened(base)
    bank = veneer.Bank(model)
    for name in CONFIGS:
        bank.register(name, adapters / name)
    chosen = ["tokens", None, "more"]
    with torch.no_grad(), bank.rows(chosen):
        together = model(IDS).logits
    with torch.no_grad(), bank.rows(["plain", {"tokens": 0.7, "more": 0.3}, "tokens"]):
        others = model(IDS).logits
    for row, name in enumerate(chosen):
        expected = alone(opened(base), adapters, name, IDS[:1]).logits[0]
        assert error(together[row], expected) < 3e-5
    for row, name in ((0, "plain"), (2, "tokens")):
        assert error(others[row], alone(opened(base), adapters, name, IDS[:1]).logits[0]) < 3e-5


def test_a_bank_on_a_base_that_did_not_grow_says_what_to_do(place):
    model = tiny_model()
    bank = veneer.Bank(model)
    bank.register("tokens", place[1] / "tokens")
    with (
        pytest.raises(AdapterError, match=r"262 rows of .*has 259.*veneer merge"),
        bank.rows(["tokens"]),
    ):
        pass


def test_a_served_adapter_reads_and_writes_its_tokens(place):
    base, adapters = place
    service = open_service(base, adapters)
    with (
        listening(service) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client,
    ):
        for name in CONFIGS:
            answer = client.completions.create(
                model=name, prompt="<a>x<b>", max_tokens=8, temperature=0
            )
            model, tokenizer = opened(base), service.tokenizer
            veneer.load(model, adapters / name)
            ids = torch.tensor([tokenizer("<a>x<b>").input_ids])
            assert ids.tolist() == [[259, *tokenizer("x").input_ids, 260]]
            with torch.no_grad():
                out = model.generate(
                    ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids)
                )
            assert answer.choices[0].text == tokenizer.decode(
                out[0, ids.shape[1] :], skip_special_tokens=True
            )
