"""vLLM's own server with our plug-in: what it answers, and what it refuses. `make test-vllm
VLLM=/path/to/python`.

The base is a tiny random Llama in float32. The expected tokens are those of our own merged model,
drawn greedily.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import httpx
import pytest
import torch
from tests.support.api_server import listening
from tests.support.checkpoints import trained
from tests.support.tiny import tiny_model, write_tiny

import veneer
from cases.serving import vllm_environment
from serve_cases import servers
from veneer.adapter_files.file_names import content_hash
from veneer.serve import vllm_front
from veneer.serve.access import Key, Keyring, hash_of
from veneer.serve.settings import settings_of
from veneer.store.library import Library
from veneer.store.remote import push
from veneer.tools.compose import compose

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not os.environ.get("VLLM"), reason="VLLM names no Python that has vLLM (make test-vllm)"
    ),
]

#: vLLM's attention on a CPU knows no heads of fewer than 32 numbers
SHAPE = {"hidden_size": 128, "intermediate_size": 128}
PROMPT, TOKENS = (
    [5, 77, 130, 9, 201, 44, 18, 150] * 5,
    24,
)  # longer than two blocks of the cache of keys and values


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("base"), **SHAPE)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Path]:
    """Adapters by name, and by what is the matter with them."""
    folder, made = tmp_path_factory.mktemp("adapters"), {}
    configs = {
        "first": {}, "second": {"rank": 4}, "third": {"variant": "rslora"},
        "dora": {"variant": "dora"}, "large": {"rank": 20},
    }  # fmt: skip
    torch.manual_seed(1)
    for name, config in configs.items():
        made[name] = trained(
            tiny_model(**SHAPE), folder / name, 0.3, **{"targets": "all-linear", **config}
        )
    made["stranger"] = trained(
        tiny_model(7, **SHAPE), folder / "stranger", 0.3, targets="all-linear"
    )
    return made


def merged(adapter: Path | None, count: int = TOKENS) -> list[int]:
    """What our own merged model answers."""
    model = tiny_model(**SHAPE)
    if adapter is not None:
        veneer.load(model, adapter).merge()
    tokens = torch.tensor([PROMPT])
    with torch.no_grad():
        for _ in range(count):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return tokens[0, len(PROMPT) :].tolist()


class Server:
    def __init__(self, running: servers.Server) -> None:
        self.running = running

    def post(self, route: str, **body) -> httpx.Response:
        return httpx.post(f"{self.running.url}/v1/{route}", json=body, timeout=300, trust_env=False)

    def answer(self, name: str) -> httpx.Response:
        options = {
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        return self.post("completions", model=name, prompt=PROMPT, **options)

    def tokens(self, name: str) -> list[int]:
        answer = self.answer(name)
        assert answer.status_code == 200, f"{answer.text}\n{servers.tail(self.running.log)}"
        return answer.json()["choices"][0]["token_ids"]

    def refused(self, name: str, status: int, why: str) -> None:
        before = len(self.running.log.read_text())
        answer = self.answer(name)
        assert answer.status_code == status, answer.text
        assert why in self.running.log.read_text()[before:], servers.tail(self.running.log)


@contextlib.contextmanager
def vllm(base: Path, place: str, folder: Path):
    """vLLM with room for one adapter: each other one makes it read the files again."""
    python = Path(os.environ["VLLM"])
    command = [
        str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--served-model-name", "base",
        "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "4", "--enforce-eager",
        "--enable-prefix-caching",
        "--enable-lora", "--max-lora-rank", "16", "--max-loras", "1", "--max-cpu-loras", "1",
    ]  # fmt: skip
    env = {
        **vllm_environment(python), "VENEER_LIBRARY": place, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "XDG_CACHE_HOME": str(folder / "cache"), "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    with servers.serve(
        command, folder / "log", threads=1, ready="/health", seconds=600, env=env
    ) as running:
        yield Server(running)


def alter(folder: Path) -> None:
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-2, 2)
        byte = file.read(1)[0]
        file.seek(-2, 2)
        file.write(bytes([byte ^ 1]))


def test_adapters_of_a_library(base, adapters, tmp_path):
    library = Library(tmp_path / "library")
    for name in ("first", "second", "dora", "large", "stranger"):
        library.add(adapters[name], name)
    library.add(adapters["third"], "altered")
    alter(library.get("altered"))
    expected = {name: merged(adapters[name]) for name in ("first", "second", "third")}
    assert len({*map(tuple, expected.values()), tuple(merged(None))}) == 4
    with vllm(base, str(library.folder), tmp_path) as server:
        assert server.tokens("base") == merged(None)
        assert server.tokens("first") == expected["first"]
        assert server.tokens("second") == expected["second"]

        server.refused("altered", 404, "other files at")
        server.refused("nobody", 404, "no adapter 'nobody'")
        server.refused("dora", 404, "it is a DoRA")
        server.refused("stranger", 404, "made for another base")
        server.refused("large", 400, "rank 20 is greater than max_lora_rank 16")

        # a library that loses what is served, under a server that has to read it again
        shutil.rmtree(library.folder / "objects" / content_hash(adapters["first"]))
        assert server.tokens("first") == expected["first"]

        # another adapter under a name that is served: the old one until the name is unloaded, then
        # the new one alone, also where keys and values of that very prompt are kept
        library.add(adapters["third"], "second", overwrite=True)
        assert server.tokens("second") == expected["second"]
        version = f"second@{content_hash(adapters['third'])}"
        assert server.tokens(version) == expected["third"]
        server.refused(f"second@{content_hash(adapters['second'])}", 404, "which is now")
        assert server.post("unload_lora_adapter", lora_name="second").status_code == 200
        assert server.tokens("second") == expected["third"]
        assert server.tokens("base") == merged(None)


def test_adapters_of_a_place(base, adapters, tmp_path):
    store = f"file://{tmp_path}/store"
    first = push(adapters["first"], f"{store}/french").rpartition("@")[2]
    with vllm(base, store, tmp_path) as server:
        assert server.tokens("french") == merged(adapters["first"])
        push(adapters["second"], f"{store}/french")
        second = content_hash(adapters["second"])
        assert server.tokens(f"french@{second}") == merged(adapters["second"])
        assert server.tokens(f"french@{first}") == merged(adapters["first"])
        push(adapters["third"], f"{store}/altered")
        alter(tmp_path / "store" / "altered" / content_hash(adapters["third"]))
        server.refused("altered", 404, "other files at")


# ----------------------------------------------------------------------------------------------
# behind this server


@pytest.fixture(scope="module")
def front(base, adapters, tmp_path_factory):
    """`--engine vllm`, without the command line."""
    python, folder = Path(os.environ["VLLM"]), tmp_path_factory.mktemp("front")
    # the command of the build for processors looks for a package of another name, and ends
    program = tmp_path_factory.mktemp("bin") / "vllm"
    module = "vllm.entrypoints.openai.api_server"
    program.write_text(
        f'#!/bin/sh\nshift\nexec {python} -m {module} --enforce-eager --model "$@"\n'
    )
    program.chmod(0o755)
    for name in ("first", "second", "stranger"):
        shutil.copytree(adapters[name], folder / name)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in vllm_environment(python).items():
            patch.setenv(name, value)
        patch.setattr("veneer.serve.vllm.find_program", lambda: str(program))
        fields = {"adapters": str(folder), "length": 128, "rows": 4, "name": "base"}
        keys = Keyring((Key("alice", hash_of("vnr-a"), ("*",)),))
        service = vllm_front.start(settings_of(str(base), **fields), keys)
    with listening(service, create=vllm_front.create) as (url, _):
        yield url


def front_answer(url: str, **body) -> httpx.Response:
    fields = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    fields |= {"model": "base", "return_token_ids": True}
    headers = {"Authorization": "Bearer vnr-a"}
    body = {**fields, **body}
    return httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=300)


def test_a_front_answers_as_the_merged_models_do(front, adapters, tmp_path):
    for name in (None, "first", "second"):
        answer = front_answer(front, **({} if name is None else {"model": name}))
        assert answer.status_code == 200, answer.text
        tokens = answer.json()["choices"][0]["token_ids"]
        assert tokens == merged(None if name is None else adapters[name])
    blend = {"first": 0.6, "second": 0.4}
    compose([adapters[name] for name in blend], tmp_path / "blend", weights=list(blend.values()))
    answer = front_answer(front, adapters=blend)
    assert answer.json()["choices"][0]["token_ids"] == merged(tmp_path / "blend")
    assert answer.json()["model"] == "base"
    refused = front_answer(front, model="stranger")
    assert refused.status_code == 400
    assert "another base" in refused.json()["error"]["message"]
    assert httpx.post(f"{front}/v1/completions", json={}).status_code == 401
