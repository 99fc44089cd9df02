"""Shares of the whole server over a minute: 25 clients of the `openai` package, a real model, more
blends than rows."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import openai
import pytest
from tests.support.api_server import listening
from tests.support.service import make_adapter, open_service
from tests.support.tiny import write_tiny

from veneer.serve.access import Key, Keyring, generate, hash_of

SECONDS = 60.0


async def asked(url: str, clients: list[tuple[str, str, str, dict, int]]) -> Counter:
    """Tokens that each client was given in ``SECONDS``. A client is (name, key, model, fields,
    requests at a time)."""
    got: Counter = Counter()
    end = time.monotonic() + SECONDS

    async def ask(client: openai.AsyncOpenAI, name: str, model: str, fields: dict) -> None:
        while time.monotonic() < end:
            answer = await client.completions.create(
                model=model,
                prompt="a b c",
                max_tokens=12,
                extra_body={"ignore_eos": True, **fields},
            )
            if time.monotonic() < end:
                got[name] += answer.usage.completion_tokens

    opened = {
        key: openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
        for _, key, *_ in clients
    }
    try:
        await asyncio.gather(
            *(
                ask(opened[key], name, model, fields)
                for name, key, model, fields, count in clients
                for _ in range(count)
            )
        )
    finally:
        for client in opened.values():
            await client.close()
    return got


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fair")
    for number in range(25):
        make_adapter(folder / "adapters" / f"a{number}", number, rank=2, targets="all-linear")
    return write_tiny(folder / "base"), folder / "adapters"


@pytest.mark.slow
def test_an_adapter_with_a_backlog_gets_its_share_beside_24_clients(place):
    clients = [("busy", "-", "a24", {}, 40)]
    clients += [(f"a{number}", "-", f"a{number}", {}, 1) for number in range(24)]
    with listening(open_service(*place, rows=8)) as (url, _):
        got = asyncio.run(asked(url, clients))
    fair = sum(got.values()) / 25
    others = sorted(got[f"a{number}"] / fair for number in range(24))
    shares = f"busy {got['busy'] / fair:.2f}, others {others[0]:.2f} to {others[-1]:.2f}"
    print(f"\n{sum(got.values())} tokens; of its share: {shares}")
    assert got["busy"] >= 0.8 * fair
    assert others[0] >= 0.8


@pytest.mark.slow
def test_blends_of_one_key_get_one_keys_share(place):
    sent = {name: generate(name)[0] for name in ("one", "many")}
    keys = Keyring(tuple(Key(name, hash_of(key), ("*",)) for name, key in sent.items()))
    clients = [("one", sent["one"], "a0", {}, 20)]
    for number in range(24):
        clients.append(
            (
                f"many {number}",
                sent["many"],
                "tiny",
                {"adapters": {"a0": 1.0, "a1": number / 24}},
                1,
            )
        )
    with listening(open_service(*place, rows=8, keys=keys)) as (url, _):
        got = asyncio.run(asked(url, clients))
    one = got["one"] / sum(got.values())
    print(
        f"\n{sum(got.values())} tokens; the key with one adapter {one:.2f}, the key with 24 blends {1 - one:.2f}"
    )
    assert 0.4 <= one <= 0.6
