"""Keys: what a file may say, who may do what, and that a key learns nothing of what it may not
use."""

from __future__ import annotations

import tomllib
from concurrent.futures import Future

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.api_server import BASE, serving

from veneer.errors import ConfigError
from veneer.serve.access import ANYONE, Key, Keyring, generate, hash_of, read_keys
from veneer.serve.refusal import Refusal


def ring(**keys):
    """A key ring of names, with each name as its own key."""
    return Keyring(tuple(Key(name, hash_of(name), **fields) for name, fields in keys.items()))


KEYS = ring(
    alice={"adapters": ("french*",)},
    bob={"adapters": ("*",), "base": False},
    operator={"adapters": ("*",), "admin": True},
)


def test_a_key_is_found_by_its_hash_alone():
    assert KEYS.find("Bearer alice").name == "alice"
    assert KEYS.find("bearer  alice").name == "alice"
    for wrong in (
        None,
        "",
        "alice",
        "Basic alice",
        "Bearer",
        "Bearer ",
        "Bearer Alice",
        f"Bearer {hash_of('alice')}",
    ):
        assert KEYS.find(wrong) is None
    assert KEYS.find("Bearer " + "x" * 10_000) is None
    assert Keyring().find(None) is ANYONE


@given(st.text(max_size=40))
def test_no_other_key_opens(text):
    assert KEYS.find(f"Bearer {text}") is None or text.strip() in ("alice", "bob", "operator")


def test_every_key_is_compared(monkeypatch):
    """A loop that stops at the first match tells by its time which it was."""
    from veneer.serve import access

    seen = []
    compare = access.hmac.compare_digest
    monkeypatch.setattr(access.hmac, "compare_digest", lambda a, b: seen.append(b) or compare(a, b))
    KEYS.find("Bearer alice")
    assert seen == [key.sha256 for key in KEYS.keys]


def test_what_a_key_may_use():
    alice, bob, _ = KEYS.keys
    assert alice.may_use(["french", "french-2"])
    assert not alice.may_use(["french", "german"])
    assert alice.may_use([])
    assert not bob.may_use([])
    assert not Key("nobody", "").may_use(["french"])


def test_a_generated_key_is_read_again(tmp_path):
    key, entry = generate("alice", adapters=["french-*", 'odd"name', "ü"], base=False, admin=True)
    other, more = generate("bob")
    file = tmp_path / "keys.toml"
    file.write_text(f"# keys\n{entry}\n{more}", encoding="utf-8")
    found = read_keys(file)
    assert found.find(f"Bearer {key}") == Key(
        "alice", hash_of(key), ("french-*", 'odd"name', "ü"), False, True
    )
    assert found.find(f"Bearer {other}") == Key("bob", hash_of(other))
    assert key not in file.read_text(encoding="utf-8")
    assert len(key) > 40
    assert tomllib.loads(entry)["keys"][0]["name"] == "alice"


HASH = hash_of("x")


@pytest.mark.parametrize(
    "text",
    [
        "", "keys = 1", "[[keys]]", f'[[keys]]\nname = "a"\nsha256 = "{HASH.upper()}"',
        '[[keys]]\nname = "a"\nsha256 = ""',
        f'[[keys]]\nname = ""\nsha256 = "{HASH}"', f'[[keys]]\nname = "a"\nsha256 = "{HASH}"\nadapters = "*"',
        f'[[keys]]\nname = "a"\nsha256 = "{HASH}"\nadmin = 1',
        f'[[keys]]\nname = "a"\nsha256 = "{HASH}"\ntrain = "yes"',
        f'[[keys]]\nname = "a"\nsha256 = "{HASH}"\nadmim = true',
        f'other = 1\n[[keys]]\nname = "a"\nsha256 = "{HASH}"', "not toml", "\x00",
        f'[[keys]]\nname = "a"\nsha256 = "{HASH}"\n[[keys]]\nname = "b"\nsha256 = "{HASH}"',
        f'[[keys]]\nname = "a"\nsha256 = "{HASH}"\n[[keys]]\nname = "a"\nsha256 = "{hash_of("y")}"',
        "keys = [" * 2000,
    ],
)  # fmt: skip
def test_a_wrong_key_file_is_refused(tmp_path, text):
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="Expected"):
        read_keys(file)


def test_no_key_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "none")
    with pytest.raises(ConfigError):
        read_keys(tmp_path)


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "a\n[[keys]]"])
def test_names_that_a_key_cannot_have(name):
    with pytest.raises(ConfigError):
        generate(name)


# ----------------------------------------------------------------------------------------------
# behind a server


@pytest.fixture(scope="module")
def it(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("keys") / "dir", "french", "german", keys=KEYS) as served:
        yield served


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/french", "/v1/adapters", "/metrics", "/v1/nothing"]
)
def test_no_key_and_a_wrong_key_are_401(it, path):
    for key in (None, "wrong"):
        with it.http(key) as http:
            answer = http.get(path)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert "wrong" not in answer.text
            assert path == "/metrics" or http.post(path, content=b"x" * 100).status_code == 401


def test_what_needs_no_key(it):
    with it.http() as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/ready").status_code == 200


def test_models_are_those_of_the_key(it):
    assert [card.id for card in it.client("alice").models.list()] == [BASE, "french"]
    assert [card.id for card in it.client("bob").models.list()] == ["french", "german"]
    with it.http("alice") as http:
        assert [entry["name"] for entry in http.get("/v1/adapters").json()] == ["french"]


def ask(client, model, **fields):
    return client.completions.create(model=model, prompt="a", extra_body=fields)


def test_a_forbidden_adapter_and_an_unknown_one_look_alike(it):
    client, messages = it.client("alice"), []
    for name in ("german", "italian"):
        with pytest.raises(openai.NotFoundError) as caught:
            ask(client, name)
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(name)
        messages.append(caught.value.response.text.replace(name, "X"))
    assert messages[0] == messages[1]
    ask(client, "french")


def test_a_blend_needs_leave_for_all_of_it(it):
    with pytest.raises(openai.NotFoundError):
        ask(it.client("alice"), BASE, adapters={"french": 0.5, "german": 0.5})
    ask(it.client("bob"), BASE, adapters={"french": 0.5, "german": 0.5})


def test_a_key_without_the_base(it):
    with pytest.raises(openai.NotFoundError):
        ask(it.client("bob"), BASE)
    with pytest.raises(openai.NotFoundError):
        ask(it.client("bob"), BASE, adapters={"german": 0.0})
    ask(it.client("bob"), f"{BASE}:german")


def test_admin_routes_need_an_admin_key(it):
    body = {"lora_name": "french", "lora_path": "french"}
    for key in ("alice", "bob"):
        with it.http(key) as http:
            assert http.get("/metrics").status_code == 403
            assert http.post("/v1/load_lora_adapter", json=body).status_code == 403
            assert (
                http.post("/v1/unload_lora_adapter", json={"lora_name": "french"}).status_code
                == 403
            )
    assert it.bank.loads == 0
    with it.http("operator") as http:
        assert http.get("/metrics").status_code == 200
        assert http.post("/v1/load_lora_adapter", json=body).status_code == 200


def test_the_engine_hears_for_whom_it_computes(it):
    for key in ("alice", "bob"):
        ask(it.client(key), "french")
        assert it.engine.seen[-1].owner == key
    assert ANYONE.owner == ""


def test_an_error_inside_is_for_the_operator_to_read(it):
    it.engine.fails = "Found: /secret/path."
    try:
        for key, shown in (("alice", False), ("operator", True)):
            with pytest.raises(openai.InternalServerError) as caught:
                ask(it.client(key), "french")
            assert ("/secret/path" in str(caught.value)) is shown
    finally:
        it.engine.fails = ""


def test_so_is_one_of_embeddings(it, monkeypatch):
    class Fails:
        width = 3

        def submit(self, texts, blend, timeout, owner):
            future = Future()
            future.set_exception(Refusal(500, "Found: /secret/path.", code="engine_error"))
            return future

    monkeypatch.setattr(it.service, "embedder", Fails())
    for key, shown in (("alice", False), ("operator", True)):
        with pytest.raises(openai.InternalServerError) as caught:
            it.client(key).embeddings.create(model="french", input="a")
        assert ("/secret/path" in str(caught.value)) is shown


@pytest.mark.parametrize(
    ("cause", "status", "hidden"),
    [
        ("bad_adapter", 400, True),
        ("model_not_found", 404, True),
        ("out_of_memory", 503, False),
        ("bad_request", 400, False),
        ("bad_blend", 400, False),
    ],
)
def test_a_cause_has_its_status_and_its_words_are_for_whom_they_concern(it, cause, status, hidden):
    it.engine.fails, it.engine.cause = "Found: /secret/path.", cause
    try:
        for key, shown in (("alice", not hidden), ("operator", True)):
            for stream in (False, True):
                with pytest.raises(openai.APIStatusError) as caught:
                    it.client(key).completions.create(model="french", prompt="a", stream=stream)
                assert caught.value.status_code == status
                assert ("/secret/path" in str(caught.value)) is shown
    finally:
        it.engine.fails, it.engine.cause = "", None
