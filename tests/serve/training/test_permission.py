"""Who may train: an untrained run answers as the base does, so a key has no runs unless its entry
says so."""

from __future__ import annotations

import httpx
import pytest
from tests.serve.training.test_service import TEXT, opened, trained_run
from tests.support.training_client import Client

from veneer.serve.access import Key, Keyring, hash_of


@pytest.fixture(scope="module")
def addresses(base, tmp_path_factory):
    """Of a server with a key that trains and has published a checkpoint, and the paths of that."""
    keys = (
        Key("trainer", hash_of("vnr-trainer"), train=True), Key("reader", hash_of("vnr-reader"), base=False),
        Key("operator", hash_of("vnr-operator"), ("*",), admin=True),
    )  # fmt: skip
    with opened(base, tmp_path_factory.mktemp("permission"), keys=Keyring(keys)) as (url, _):
        run = trained_run(Client(url, "tml-vnr-trainer"), 1)
        path = run.client.result(run.ask("save_weights_for_sampler", path="open"))["path"]
        place = f"training_runs/{run.id}/checkpoints/sampler_weights/open"
        assert run.client.http.post(f"/{place}/publish").status_code == 204
        yield url, run, path


ROUTES = [
    ("POST", "create_session", {}), ("POST", "session_heartbeat", {"session_id": "x"}),
    ("POST", "sessions/x/finish", {"reason": {"type": "success"}}),
    ("POST", "create_model", {"session_id": "x", "model_seq_id": 0, "base_model": "tiny"}),
    ("POST", "load_weights", {"session_id": "x", "model_seq_id": 0, "path": "PATH", "optimizer": False}),
    ("POST", "optim_step", {"model_id": "RUN", "seq_id": 99, "adam_params": {}}),
    ("POST", "optim_step", {"model_id": "RUN", "seq_id": 99, "sharpness": 3}),
    ("POST", "create_sampling_session", {"session_id": "x", "sampling_session_seq_id": 0, "base_model": "tiny"}),
    ("POST", "asample", {"model_path": "PATH", "prompt": {"chunks": []}, "sampling_params": {}}),
    ("POST", "retrieve_future", {"request_id": "RUN:1"}), ("POST", "weights_info", {"tinker_path": "PATH"}),
    ("POST", "copy_weights", {"source_path": "PATH"}), ("GET", "training_runs", None), ("GET", "checkpoints", None),
    ("GET", "sessions", None), ("GET", "live", None), ("GET", "get_server_capabilities", None),
]  # fmt: skip


@pytest.mark.parametrize(("method", "route", "body"), ROUTES)
@pytest.mark.parametrize("key", ["reader", "operator"])
def test_a_key_that_may_not_train_reaches_nothing_of_the_service(
    addresses, method, route, body, key
):
    url, run, path = addresses
    fields = {
        n: {"PATH": path, "RUN": run.id, "RUN:1": f"{run.id}:1"}.get(str(v), v)
        for n, v in (body or {}).items()
    }
    options = {} if body is None else {"json": fields}
    headers = {"x-api-key": f"tml-vnr-{key}"}
    with httpx.Client(base_url=f"{url}/api/v1", headers=headers, trust_env=False) as http:
        answer = http.request(method, f"/{route}", **options)
    assert answer.status_code in (400, 403), answer.text
    if answer.status_code == 403:
        assert "train = true" in answer.json()["error"]["message"]
    else:
        assert fields.get("sharpness") == 3  # what is no such body is none, whoever sends it


def test_neither_do_models_by_their_paths(addresses):
    url, run, path = addresses
    for model in (path, f"tinker://{run.id}/now"):
        for key, status in (("reader", 404), ("operator", 404), ("trainer", 200)):
            answer = httpx.post(
                f"{url}/v1/completions", json={"model": model, "prompt": TEXT, "max_tokens": 1},
                headers={"authorization": f"Bearer vnr-{key}"}, trust_env=False, timeout=60,
            )  # fmt: skip
            assert answer.status_code == status, answer.text


def test_files_by_their_addresses_and_health_need_no_key(addresses):
    url, run, _ = addresses
    client = run.client
    place = client.result(run.ask("save_weights_external", path="out"))["path"].partition(
        f"{run.id}/"
    )[2]
    urls = client.get(f"training_runs/{run.id}/checkpoints/{place}/external_weights_urls")["urls"]
    assert httpx.get(urls["adapter_config.json"], trust_env=False).status_code == 200
    assert httpx.get(f"{url}/api/v1/healthz", trust_env=False).status_code == 200
