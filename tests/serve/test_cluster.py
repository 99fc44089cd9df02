"""Three servers as one, on Ray and behind fronts that only balance: who gets a request, and what a
killed server, a changed adapter and an object store cost."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest
import yaml
from tests.support import fleet

from veneer.errors import ConfigError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", params=fleet.FRONTS)
def running(request, tmp_path_factory):
    if lacking := fleet.missing(request.param):
        pytest.skip(f"no {lacking}")
    folder = tmp_path_factory.mktemp(request.param)
    place = fleet.make_place(folder, adapters=30, renewed=6)
    with fleet.fleet(request.param, place, folder / "run") as where:
        yield where, place


def drive(where, adapters, **options):
    answers = asyncio.run(fleet.load(where, adapters, **options))
    assert [answer.failed for answer in answers if answer.failed] == []
    return answers


def test_requests_go_where_their_adapter_is(running):
    where, place = running
    asked = fleet.by_zipf(place.names, 600)
    drive(where, asked, clients=12, tokens=4)
    loads, first = where.sum_counter("veneer_adapter_loads_total"), len(set(asked))
    assert loads >= first
    assert 1 - (loads - first) / (len(asked) - first) >= 0.95, loads
    assert where.sum_counter("veneer_requests_total") == len(asked)


def test_a_changed_adapter_is_seen_by_all_and_mixed_by_none(running):
    where, place = running
    names = list(place.others)
    old = {answer.adapter: answer.text for answer in drive(where, names * 3, tokens=48)}

    def change():
        for name, folder in place.others.items():
            place.library.add(folder, name, overwrite=True)
            time.sleep(0.2)

    answers = drive(where, names * 50, tokens=48, streams=0.5, during=change)
    time.sleep(5)
    new = {answer.adapter: answer.text for answer in drive(where, names * 6, tokens=48)}
    assert all(old[name] != new[name] for name in names)
    assert [
        answer
        for answer in answers
        if answer.text not in (old[answer.adapter], new[answer.adapter])
    ] == []
    assert {answer.text in new.values() for answer in answers} == {True, False}
    assert all(answer.text == new[answer.adapter] for answer in drive(where, names * 4, tokens=48))


def test_a_client_that_goes_away_takes_its_request_along(running):
    where, place = running
    body = {
        "model": place.names[0],
        "prompt": "Good morning",
        "max_tokens": 450,
        "ignore_eos": True,
        "stream": True,
    }
    headers = where.headers(place.names[0])
    with httpx.stream(
        "POST", f"{where.url}/v1/completions", json=body, headers=headers, trust_env=False
    ) as response:
        next(response.iter_lines())
    until = time.monotonic() + 20
    while 'outcome="cancelled"' not in "".join(
        httpx.get(page, trust_env=False).text for page in where.pages
    ):
        assert time.monotonic() < until
        time.sleep(0.2)


def test_a_killed_server_costs_no_request_that_has_not_begun(running):
    where, place = running
    asked = fleet.by_zipf(place.names, 400, seed=1)
    killed = []
    answers = drive(
        where, asked, tokens=16, streams=0.3, during=lambda: killed.append(fleet.kill_one(where))
    )
    assert killed
    broken = [answer for answer in answers if answer.finish is None]
    assert all(answer.streamed and answer.text for answer in broken)
    assert len(broken) <= 16  # those that this server was writing
    until = time.monotonic() + 200
    while where.replaces and (len(where.pids()) < 3 or where.sum_counter("veneer_ready") < 3):
        assert time.monotonic() < until, where.pids()
        time.sleep(1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what Ray's own classes say of pydantic
def test_the_config_file_of_the_docs_is_one_of_ray_serve(tmp_path):
    from ray.serve import schema

    from veneer.serve.cluster import app

    described = schema.ServeDeploySchema.model_validate(
        yaml.safe_load(fleet.documented_configuration("yml", "applications:"))
    )
    (application,) = described.applications
    assert application.import_path == f"{app.__module__}:app"
    with pytest.raises(ConfigError, match=r"keys\.toml"):  # before a process is started for it
        app({**application.args, "keys": str(tmp_path / "none" / "keys.toml")})
    args = {**application.args}
    del args["keys"]
    assert app(args) is not None
    with pytest.raises(ConfigError, match="--precision 'half'"):
        app({**args, "precision": "half"})
    with pytest.raises(ConfigError, match="the argument row"):
        app({**args, "row": 3})
    with pytest.raises(ConfigError, match="--replicas '3-2'"):
        app({**args, "replicas": "3-2"})
