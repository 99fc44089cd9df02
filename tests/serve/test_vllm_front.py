"""`--engine vllm`: keys, adapters with proof, blends and budgets in front of a vLLM, which is a
small program here (`tests/support/fake_vllm.py`)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import httpx
import openai
import pytest
import torch
from safetensors.torch import load_file
from tests.support.adapters import TENSORS
from tests.support.api_server import listening, until
from tests.support.fake_vllm import write_program
from tests.support.hostile import remove_record
from tests.support.service import make_adapter
from tests.support.tiny import write_tiny

from veneer.errors import AdapterError, BankFullError, ConfigError
from veneer.serve import vllm, vllm_front
from veneer.serve.access import Key, Keyring, hash_of
from veneer.serve.settings import settings_of
from veneer.serve.vllm_adapters import VllmAdapters

KEYS = Keyring(
    (
        Key("alice", hash_of("vnr-a"), ("french",)),
        Key("bob", hash_of("vnr-b"), ("*",), admin=True),
    )
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    make_adapter(folder / "french", 1, rank=4, targets="all-linear")
    make_adapter(folder / "german", 2, rank=4, targets="all-linear")
    make_adapter(folder / "stranger", 3, base_seed=9, rank=4, targets="all-linear")
    return folder


@pytest.fixture
def adapters(made, tmp_path):
    return shutil.copytree(made, tmp_path / "adapters")


@pytest.fixture(autouse=True)
def program(tmp_path, monkeypatch):
    path = write_program(tmp_path / "bin")
    monkeypatch.setattr(vllm, "find_program", lambda: str(path))


@contextmanager
def front(base, adapters, keys=KEYS, **fields):
    ended = []
    options = {"adapters": None if adapters is None else str(adapters), **fields}
    service = vllm_front.start(settings_of(str(base), **options), keys, ended.append)
    with listening(service, 5.0, create=vllm_front.create) as (url, _):
        yield Front(url, service, ended)


class Front(SimpleNamespace):
    def __init__(self, url, service, ended) -> None:
        super().__init__(url=url, service=service, ended=ended)

    @property
    def state(self):
        return json.loads(self.service.engine.read("/state"))

    def post(self, path="/v1/completions", key="vnr-b", **body):
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.post(f"{self.url}{path}", json=body, headers=headers, timeout=30)

    def get(self, path, key="vnr-b"):
        return httpx.get(f"{self.url}{path}", headers={"Authorization": f"Bearer {key}"})

    def text(self, model="tiny", prompt="hi", **fields):
        answer = self.post(model=model, prompt=prompt, **fields)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == model
        return answer.json()["choices"][0]["text"]


@pytest.fixture
def it(base, adapters):
    with front(base, adapters) as running:
        yield running


def first_sum(folder):
    tensors = load_file(folder / TENSORS)
    return round(float(tensors[sorted(tensors)[0]].abs().sum()), 3)


# ----------------------------------------------------------------------------------------------
# adapters


def test_an_adapter_is_loaded_when_it_is_asked_for(it, adapters):
    assert it.state["loaded"] == {}
    assert it.text() == "tiny:hi:0.0"
    text = it.text("french")
    assert text.split(":")[2] == str(first_sum(adapters / "french"))
    assert text.split(":")[0] == "french"  # its name in vLLM is nobody's business
    assert it.text("tiny:french").split(":")[-1] == text.split(":")[-1]
    (name,) = it.state["loaded"]
    assert name.startswith("veneer-")
    status = {entry["name"]: entry for entry in it.get("/v1/adapters").json()}
    assert status["french"]["resident"]
    assert not status["german"]["resident"]


def test_a_blend_is_composed_once(it, adapters):
    blend = {"french": 0.7, "german": 0.3}
    texts = {it.text(adapters=blend) for _ in range(2)}
    (loaded,) = it.state["loaded"].values()
    assert len(texts) == 1
    assert loaded["rank"] == 8
    wanted = torch.zeros(())
    product = {}
    for folder, weights in ((adapters / "french", 0.7), (adapters / "german", 0.3)):
        tensors = load_file(folder / TENSORS)
        (down,) = [name for name in tensors if "layers.0.self_attn.q_proj.lora_A" in name]
        up, scale = down.replace("lora_A", "lora_B"), weights * alpha(folder)
        product[folder.name] = scale * (tensors[up] @ tensors[down])
        wanted = wanted + product[folder.name]
    composed = load_file(loaded["path"] + f"/{TENSORS}")
    result = alpha(loaded["path"]) * (composed[up] @ composed[down])
    assert torch.allclose(result, wanted, atol=1e-5)
    # the base alone, and one adapter, are no blends
    assert it.text(adapters={"french": 0.0}).split(":")[0] == "tiny"
    it.text(adapters={"french": 1.0})
    assert len(it.state["loaded"]) == 2


def alpha(folder):
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    return config["lora_alpha"] / config["r"]


def test_an_adapter_of_another_base_is_never_loaded(it, adapters):
    answer = it.post(model="stranger", prompt="hi")
    assert answer.status_code == 400
    assert "another base" in answer.json()["error"]["message"]
    assert it.state["loaded"] == {}
    remove_record(adapters / "stranger")  # as another library's it has no proof


def test_altered_files_are_never_loaded(it, adapters):
    file = adapters / "french" / TENSORS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    answer = it.post(model="french", prompt="hi")
    assert answer.status_code == 400
    assert it.state["loaded"] == {}
    assert it.text("german")


def test_another_adapter_under_a_name_takes_its_place(it, adapters, made):
    old = it.text("french")
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(it.text, "french", "slow")
        until(lambda: len(it.state["asked"]) == 2)
        shutil.rmtree(adapters / "french")
        shutil.copytree(made / "german", adapters / "french")
        until(lambda: it.text("french") != old)
        assert len(it.state["loaded"]) == 2  # the old one answers still
        it.service.engine.post("/go", {})
        assert slow.result(20).split(":")[2] == old.split(":")[2]
    until(lambda: len(it.state["loaded"]) == 1)
    shutil.rmtree(adapters / "french")
    until(lambda: it.post(model="french", prompt="hi").status_code == 404)
    until(lambda: it.state["loaded"] == {})
    until(
        lambda: (
            [file.name for file in it.service.engine._socket_path.parent.iterdir()] == ["socket"]
        )
    )


@pytest.mark.parametrize("change", ["replace", "remove"])
def test_an_adapter_changes_only_after_a_load_that_reads_its_copy(base, adapters, tmp_path, change):
    loading, may_load, in_time = threading.Event(), threading.Event(), []

    def post(path, body):
        if path.endswith("/load_lora_adapter"):
            loading.set()
            in_time.append(may_load.wait(10))
            assert (Path(body["lora_path"]) / TENSORS).exists()
        return 200, ""

    folder = tmp_path / "copies"
    folder.mkdir()
    bank = VllmAdapters(post, str(base), folder, rank=8)
    for name in ("french", "german"):
        bank.register(name, adapters / name)
    changes = {
        "replace": lambda: bank.register("french", adapters / "german"),
        "remove": lambda: bank.remove("french"),
    }
    with ThreadPoolExecutor(2) as pool:
        acquired = pool.submit(bank.acquire, {"french": 1.0})
        assert loading.wait(10)
        changed = pool.submit(changes[change])
        assert not wait([changed], timeout=0.3).done
        may_load.set()
        lease = acquired.result(10)
        changed.result(10)
    assert bank.find({"french": 1.0}) is None
    assert len([*folder.iterdir()]) == 1  # in use
    lease.release()
    until(lambda: not [*folder.iterdir()])
    assert in_time == [True]


def test_an_unknown_pin_is_refused_before_vllm_starts(base, adapters, monkeypatch):
    start = Mock()
    monkeypatch.setattr(vllm_front.VllmProcess, "start", start)
    settings = settings_of(str(base), adapters=str(adapters), pin=("frensh",))
    with pytest.raises(ConfigError, match=r"no adapter named 'frensh'.*'french'"):
        vllm_front.start(settings, KEYS)
    start.assert_not_called()


def test_a_budget_puts_out_what_was_used_longest_ago(base, adapters):
    size = (adapters / "french" / TENSORS).stat().st_size
    with front(base, adapters, memory=str(size + 100), pin=("german",)) as it:
        assert len(it.state["loaded"]) == 1
        full = it.post(model="french", prompt="hi")
        assert full.status_code == 503
        with pytest.raises(BankFullError):
            it.service.bank.pin("french")
        assert [one.name for one in it.service.bank.status() if one.pinned] == ["german"]
        assert it.post("/v1/load_lora_adapter", lora_name="german", pin=False).status_code == 200
        it.text("french")
        assert len(it.state["loaded"]) == 1
        assert len(it.state["unloaded"]) == 1
        page = it.get("/metrics").text
        assert 'veneer_adapter_evictions_total{adapter="german"} 1.0' in page
        assert "vllm:num_requests_running" in page


def test_a_vllm_that_does_not_answer_a_load_is_no_bug_of_the_server(it, monkeypatch):
    def lost(*args, **options):
        raise httpx.ConnectError("gone")

    monkeypatch.setattr(it.service.engine._sync_client, "post", lost)
    answer = it.post(model="french", prompt="hi")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_stopped")


def test_a_blend_that_is_refused_leaves_no_folder(base, adapters):
    with front(base, adapters, memory="1KiB") as it:
        folder = it.service.engine._socket_path.parent
        for _ in range(3):
            answer = it.post(model="tiny", prompt="hi", adapters={"french": 0.5, "german": 0.5})
            assert answer.status_code == 503
        assert not list(folder.glob("blend-*"))
        assert len(list(folder.glob("copy-*"))) == 2


def test_adapters_are_loaded_and_unloaded_by_vllms_routes(it, adapters):
    body = {"lora_name": "fr", "lora_path": "french"}
    assert it.post("/v1/load_lora_adapter", "vnr-a", **body).status_code == 403
    assert it.post("/v1/load_lora_adapter", **body).status_code == 200
    assert "fr" in [card["id"] for card in it.get("/v1/models").json()["data"]]
    assert len(it.state["loaded"]) == 1
    old = it.text("fr")
    body["load_inplace"] = True
    assert it.post("/v1/load_lora_adapter", **{**body, "lora_path": "stranger"}).status_code == 400
    assert it.text("fr") == old  # which stays
    assert it.post("/v1/load_lora_adapter", **{**body, "lora_path": "german"}).status_code == 200
    assert it.text("fr") != old
    assert len(it.state["loaded"]) == 1
    outside = it.post("/v1/load_lora_adapter", lora_name="x", lora_path="../base")
    assert outside.status_code == 400
    assert it.post("/v1/unload_lora_adapter", lora_name="fr").status_code == 200
    assert it.state["loaded"] == {}
    assert it.post(model="fr", prompt="hi").status_code == 404


# ----------------------------------------------------------------------------------------------
# keys


def test_a_key_has_its_adapters_alone(it):
    assert it.post(key="vnr-c", model="tiny", prompt="hi").status_code == 401
    answer = it.post(key="vnr-a", model="german", prompt="hi")
    absent = it.post(key="vnr-a", model="gone", prompt="hi")
    assert answer.status_code == absent.status_code == 404
    words = answer.json()["error"]["message"]
    assert words.replace("german", "gone") == absent.json()["error"]["message"]
    mixed = it.post(key="vnr-a", model="tiny", prompt="a", adapters={"french": 1, "german": 1})
    assert mixed.status_code == 404
    names = [card["id"] for card in it.get("/v1/models", "vnr-a").json()["data"]]
    assert names == ["tiny", "french"]
    assert it.get("/metrics", "vnr-a").status_code == 403
    assert it.state["asked"] == []
    # vLLM's own name of an adapter is none of ours
    it.text("french")
    (name,) = it.state["loaded"]
    assert it.post(key="vnr-a", model=name, prompt="hi").status_code == 404


def test_keys_share_no_prefixes_unless_they_say_so(it):
    for key, fields in (("vnr-a", {}), ("vnr-b", {}), ("vnr-a", {"cache_salt": "ours"})):
        assert it.post(key=key, model="french", prompt="hi", **fields).status_code == 200
    first, second, third = [entry["cache_salt"] for entry in it.state["asked"]]
    assert first != second
    assert third == "ours"
    assert "alice" not in first


def test_keys_share_no_pictures_and_no_prefixes_of_messages(it):
    picture = {"type": "image_url", "image_url": {"url": "data:,"}, "uuid": "1"}
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": "hi"}]}]
    parameters = {"type": "object", "properties": {"uuid": {"type": "string"}, "content": True}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    for key in ("vnr-a", "vnr-b"):
        for path in ("/v1/chat/completions", "/v1/messages"):
            it.post(path, key=key, model="french", messages=messages, tools=tools)
    asked = it.state["asked"]
    assert len({entry["cache_salt"] for entry in asked}) == 2
    for entry in asked:
        assert "uuid" not in entry["messages"][0]["content"][0]
        assert entry["tools"] == tools


def test_nothing_that_is_kept_can_be_asked_for(it):
    for name in ("previous_response_id", "conversation", "background"):
        answer = it.post("/v1/responses", model="tiny", prompt="hi", **{name: "resp_1"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
    assert it.post("/v1/responses", model="tiny", prompt="hi").status_code == 200
    assert it.state["asked"][0]["store"] is False


def test_a_server_without_keys_takes_json_alone(base):
    with front(base, None, Keyring()) as it:
        content = json.dumps({"model": "tiny", "prompt": "hi"})
        headers = {"Content-Type": "text/plain"}
        answer = httpx.post(f"{it.url}/v1/completions", content=content, headers=headers)
        assert answer.status_code == 400
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(f"{it.url}/v1/completions", content=content, headers=headers)
        assert answer.status_code == 200
        assert "cache_salt" not in it.state["asked"][0]


# ----------------------------------------------------------------------------------------------
# answers


def test_a_stream_comes_as_vllm_writes_it(it):
    with openai.OpenAI(base_url=f"{it.url}/v1", api_key="vnr-b", max_retries=0) as client:
        chunks = list(client.completions.create(model="french", prompt="hi", stream=True))
    assert {chunk.model for chunk in chunks} == {"french"}
    texts = [chunk.choices[0].text for chunk in chunks]
    assert texts[0].startswith("french")
    assert texts[1] == "hi"


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/messages", "/tokenize", "/v2/rerank"]
)
def test_other_routes_go_to_vllm(it, path):
    body = {"model": "french", "messages": [{"role": "user", "content": "hi"}], "top_k": 7}
    answer = it.post(path, **body)
    if path == "/v2/rerank":  # which this vLLM does not have
        assert answer.status_code == 404
        return
    assert answer.json()["choices"][0]["text"].startswith("french:hi")
    (asked,) = it.state["asked"]
    assert asked["path"] == path
    assert asked["top_k"] == 7


def test_only_a_line_feed_ends_a_line_of_a_stream(it):
    """vLLM writes U+2028 and the like into its JSON as they are."""
    prompt = "a\u2028data\u2029b\x85c"
    with openai.OpenAI(base_url=f"{it.url}/v1", api_key="vnr-b", max_retries=0) as client:
        chunks = client.completions.create(model="french", prompt=prompt, stream=True)
        texts = [chunk.choices[0].text for chunk in chunks]
    assert texts[1] == prompt


@pytest.mark.parametrize("fields", [{"prompt": "slow"}, {"prompt": "stall", "stream": True}])
def test_the_time_limit_holds_for_the_answer_and_for_the_wait(base, adapters, fields):
    with front(base, adapters, rows=1, timeout=1.0) as it, ThreadPoolExecutor(2) as pool:
        first = pool.submit(it.post, model="tiny", **fields)
        until(lambda: it.service.engine.running == 1)
        second = it.post(model="french", prompt="hi")
        ended = first.result(20)
        assert ended.status_code == (200 if "stream" in fields else 504)
        assert '"code":"timeout"' in ended.text
        assert second.status_code in (200, 504)
        until(lambda: it.service.engine.running == it.service.engine.waiting == 0)
        assert it.service.ready
        it.service.engine.post("/go", {})
        assert it.text() == "tiny:hi:0.0"


def test_a_stream_that_takes_too_long_ends_in_an_event_of_its_own_api(base, adapters):
    with front(base, adapters, timeout=1.0) as it, ThreadPoolExecutor(2) as pool:
        body = {"model": "tiny", "prompt": "stall", "stream": True}
        paths = ("/v1/messages", "/v1/responses")
        texts = list(pool.map(lambda path: it.post(path, **body).text, paths))
        it.service.engine.post("/go", {})
    messages, responses = [json.loads(text.rpartition("event: error\ndata: ")[2]) for text in texts]
    assert (messages["type"], messages["error"]["type"]) == ("error", "timeout_error")
    assert (responses["type"], responses["code"]) == ("error", "server_error")
    assert responses["sequence_number"] == texts[1].count("data: ") - 1


def test_a_request_that_waits_too_long_ends(base, adapters):
    with front(base, adapters, rows=1, timeout=1.0) as it, ThreadPoolExecutor(2) as pool:
        streams = [pool.submit(it.post, model="tiny", prompt="stall", stream=True)]
        until(lambda: it.service.engine.running == 1)
        it.service.engine.gate.running += 1  # a row that no request frees
        assert it.post(model="tiny", prompt="hi").status_code == 504
        it.service.engine.gate.running -= 1
        assert [stream.result(20).status_code for stream in streams] == [200]
        until(lambda: it.service.engine.running == it.service.engine.waiting == 0)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "hi"}, "model"),
        ({"model": 5, "prompt": "hi"}, "model"),
        ({"model": "tiny", "adapters": {"french": "a"}}, "adapters"),
        ({"model": "tiny", "adapters": {}}, "adapters"),
        ({"model": "tiny", "adapters": dict.fromkeys(map(str, range(99)), 1)}, "adapters"),
        ({"model": "french", "adapters": {"french": 1}}, "adapters"),
    ],
)
def test_what_names_no_adapter_is_refused(it, body, param):
    answer = it.post(**body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert it.state["asked"] == []


def test_requests_wait_their_turn_and_too_many_are_refused(base, adapters):
    with front(base, adapters, rows=1, queue=2) as it, ThreadPoolExecutor(8) as pool:
        slow = pool.submit(it.post, model="tiny", prompt="slow")
        until(lambda: it.service.engine.running == 1)
        later = [pool.submit(it.post, model="french", prompt="hi") for _ in range(4)]
        until(lambda: any(answer.done() for answer in later))
        assert len(it.state["asked"]) == 1
        assert it.service.engine.waiting
        it.service.engine.post("/go", {})
        assert slow.result(20).status_code == 200
        statuses = sorted(answer.result(20).status_code for answer in later)
        assert set(statuses) == {200, 429}
        until(lambda: it.service.engine.running == it.service.engine.waiting == 0)


def test_a_client_that_goes_away_frees_its_place(it):
    headers = {"Authorization": "Bearer vnr-b"}
    with pytest.raises(httpx.ReadTimeout):
        body = {"model": "french", "prompt": "slow"}
        httpx.post(f"{it.url}/v1/completions", json=body, headers=headers, timeout=1)
    until(lambda: it.service.engine.running == 0)
    until(lambda: not any(entry.users for entry in it.service.bank.status()))
    it.service.engine.post("/go", {})


# ----------------------------------------------------------------------------------------------
# the process


def test_a_vllm_that_ends_takes_the_server_with_it(it):
    broken = it.post(model="tiny", prompt="cut", stream=True)
    assert '"code":"engine_stopped"' in broken.text
    assert "[DONE]" not in broken.text
    until(lambda: it.ended == [3])
    assert it.get("/ready").status_code == 503
    assert it.post(model="tiny", prompt="hi").status_code == 503


def test_a_vllm_that_does_not_start_is_an_error(base, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM_FAILS", "1")
    with pytest.raises(ConfigError, match="ended with status 1 before it was ready"):
        vllm_front.start(settings_of(str(base)), Keyring())


def test_what_vllm_cannot_load_is_named_before_it_starts(base, tmp_path):
    make_adapter(tmp_path / "some" / "dora", 1, rank=2, targets="all-linear", variant="dora")
    with pytest.raises(AdapterError, match="'dora'"):
        vllm_front.start(settings_of(str(base), adapters=str(tmp_path / "some")), Keyring())


def test_what_vllm_is_told(base, adapters):
    fields = {"length": 64, "rows": 4, "precision": "bf16", "tool_call_parser": "hermes"}
    with front(base, adapters, trust_remote_code=True, **fields) as it:
        line = it.state["line"]
        pairs = dict(pairwise(line))
        assert line[:2] == ["serve", str(base)]
        assert pairs["--served-model-name"] == "tiny"
        assert pairs["--max-lora-rank"] == "16"
        assert pairs["--max-model-len"] == "64"
        assert pairs["--max-num-seqs"] == "4"
        assert pairs["--dtype"] == "bfloat16"
        assert pairs["--tool-call-parser"] == "hermes"
        assert "--enable-auto-tool-choice" in line
        assert "--trust-remote-code" in line
        folder = it.service.engine._socket_path.parent
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()


@pytest.mark.parametrize("fields", [{}, {"length": 2048, "rows": 16}])
def test_vllm_has_its_own_limits_unless_some_are_given(base, adapters, fields):
    with front(base, adapters, **fields) as it:
        pairs = dict(pairwise(it.state["line"]))
    given = [pairs.get("--max-model-len"), pairs.get("--max-num-seqs")]
    assert given == ([None, None] if not fields else ["2048", "16"])


@pytest.mark.slow
def test_it_ends_with_the_server_that_started_it(base, tmp_path):
    script = (
        "import sys, time\nfrom veneer.serve import vllm, vllm_front\nfrom veneer.serve.access import Keyring\n"
        "from veneer.serve.settings import settings_of\n"
        "if __name__ == '__main__':\n"
        "    vllm.find_program = lambda: sys.argv[2]\n"
        "    service = vllm_front.start(settings_of(sys.argv[1]), Keyring())\n"
        "    print(service.engine._process.pid, flush=True)\n    time.sleep(60)\n"
    )
    if sys.platform != "linux":
        pytest.skip("the kernel of Linux tells it")
    (tmp_path / "run.py").write_text(script)
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py"), str(base), str(tmp_path / "bin" / "vllm")],
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout is not None
        pid = int(running.stdout.readline())
        running.kill()
    until(lambda: not is_alive(pid))


def is_alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().split(")")[1].split()[0] != "Z"


def test_it_is_recommended_where_it_would_be_faster(monkeypatch):
    assert vllm.recommendation() is None or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    words = vllm.recommendation()
    assert words is not None
    assert "--engine vllm" in words
    assert "a card" in words
    monkeypatch.setattr(vllm, "find_program", lambda: None)
    assert vllm.recommendation() is None
    with pytest.raises(ConfigError, match="pip install vllm"):
        vllm.program()


def test_threads_of_a_front_end(base):
    before = threading.active_count()
    with front(base, None):
        pass
    until(lambda: threading.active_count() <= before + 2)
