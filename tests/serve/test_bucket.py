"""Adapters from an object store: two servers of one bucket, of which moto is the other side."""

from __future__ import annotations

import uuid

import httpx
import pytest
from tests.support.api_server import listening, until
from tests.support.service import make_adapter, open_service
from tests.support.tiny import write_tiny

from veneer.store.remote import file_system, parse_address, push

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # boto's own


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    import s3fs  # noqa: F401 - fsspec's part for s3://
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1", "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    place = f"s3://bucket-{uuid.uuid4().hex[:8]}"
    file_system(parse_address(place, None))[0].mkdir(place)
    yield f"{place}/adapters"
    server.stop()


def test_what_is_pushed_to_a_bucket_is_served_by_all_within_seconds(bucket, tmp_path):
    base = write_tiny(tmp_path / "base")
    made = [
        make_adapter(tmp_path / f"made-{seed}", seed, rank=2, targets="all-linear")
        for seed in range(2)
    ]
    push(made[0], f"{bucket}/french")
    body = {"prompt": "abc", "max_tokens": 12, "temperature": 0}
    with (
        listening(open_service(base, bucket)) as (one, _),
        listening(open_service(base, bucket)) as (other, _),
    ):

        def answers(model):
            replies = [
                httpx.post(f"{url}/v1/completions", json={**body, "model": model})
                for url in (one, other)
            ]
            return [
                reply.json()["choices"][0]["text"] if reply.is_success else None
                for reply in replies
            ]

        before = answers("french")
        assert before[0] == before[1] is not None
        push(made[1], f"{bucket}/german")
        until(lambda: None not in answers("german"), 30)
        push(made[1], f"{bucket}/french")
        until(lambda: answers("french") == answers("german"), 30)
        assert answers("french") != before
        cards = httpx.get(f"{one}/v1/models").json()["data"]
        assert {card["root"] for card in cards[1:]} == {f"{bucket}/french", f"{bucket}/german"}
        refused = httpx.post(f"{one}/v1/unload_lora_adapter", json={"lora_name": "french"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "remote_adapters")
        file_system(parse_address(bucket, None))[0].rm(f"{bucket}/french", recursive=True)
        until(lambda: answers("french") == [None, None], 30)
