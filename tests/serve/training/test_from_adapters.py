"""A run begins from an adapter that exists: of the server's folder or library, or weights that the
service wrote for samples and archives; and an archive can be encrypted for its reader, as the
cookbook's download asks."""

from __future__ import annotations

import pytest
import torch
from tests.serve.training.conftest import SHAPE
from tests.serve.training.test_service import TEXT, crash, texts, trained_run
from tests.support.api_server import listening
from tests.support.service import open_service
from tests.support.tiny import tiny_model
from tests.support.training_client import Client, Failed, Run, datum

import veneer
from veneer.serve.access import Key, Keyring, hash_of
from veneer.serve.training.training_service import training_of


def adapter_at(path, **config):
    model = tiny_model(**SHAPE)
    handle = veneer.attach(
        model,
        veneer.LoraConfig(**{"rank": 4, "targets": ["attention", "mlp"], **config}),
        batches=[torch.tensor([TEXT])] if config.get("variant") == "eva" else None,
    )
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.2
            )
    handle.save(path)
    return path


def begun(client, path, number=7, optimizer=False):
    asked = client.post(
        "load_weights", session_id=client.session, model_seq_id=number, path=path, optimizer=optimizer
    )  # fmt: skip
    return Run(client, client.result(asked)["model_id"])


@pytest.mark.parametrize("kind", ["sampler", "external"])
def test_a_run_from_weights_without_an_optimiser(client, it, kind):
    run = trained_run(client)
    route = "save_weights_external" if kind == "external" else "save_weights_for_sampler"
    path = client.result(run.ask(route, path="out"))["path"]
    expected = run.pass_(texts(7), backward=False).loss
    other = begun(client, path)
    assert other.pass_(texts(7)).loss == pytest.approx(expected, rel=1e-5)
    before = other.pass_(texts(7), backward=False).loss
    other.step(0.001)
    assert other.pass_(texts(7), backward=False).loss < before
    client.result(
        run.ask("load_weights", path=path, optimizer=False)
    )  # also into a run that goes on
    with pytest.raises(Failed, match="holds no optimizer"):
        client.result(run.ask("load_weights", path=path, optimizer=True))
    with pytest.raises(Failed, match="holds no optimizer"):
        begun(client, path, 8, optimizer=True)


@pytest.mark.parametrize(
    "config",
    [{}, {"rank": 2, "targets": "all-linear"}, {"variant": "dora"}, {"dtype": "bfloat16"}],
    ids=str,
)
def test_a_run_from_an_adapter_of_the_servers_folder(base, tmp_path, config):
    adapter_at(tmp_path / "adapters" / "style", **config)
    model = tiny_model(**SHAPE)
    handle = veneer.load(model, tmp_path / "adapters" / "style", trainable=True)
    keys = (
        Key("a", hash_of("vnr-a"), ("sty*",), train=True), Key("b", hash_of("vnr-b"), ("other",), train=True),
    )  # fmt: skip
    folder = str(tmp_path / "runs")
    service = open_service(base, tmp_path / "adapters", train=folder, keys=Keyring(keys))
    with listening(service) as (url, _):
        client = Client(url, "tml-vnr-a")
        run = begun(client, "style")
        ids = torch.tensor([TEXT])
        loss = torch.nn.functional.cross_entropy(
            model(ids).logits[0, :-1], ids[0, 1:], reduction="sum"
        )
        assert run.pass_([datum(TEXT)]).loss == pytest.approx(float(loss.detach()), rel=1e-3)
        run.step(0.01)
        loss.backward()
        optimizer = torch.optim.AdamW(
            handle.parameters(), 0.01, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0
        )
        optimizer.step()
        after = run.pass_([datum(TEXT)], backward=False).loss
        trainer = training_of(service).worker.trainer
        assert {
            parameter.dtype for own in trainer.runs.values() for parameter in own.parameters()
        } == {torch.float32}
        if config.get("dtype") is None:
            loss = torch.nn.functional.cross_entropy(
                model(ids).logits[0, :-1], ids[0, 1:], reduction="sum"
            )
            assert after == pytest.approx(float(loss.detach()), rel=1e-2)
        info = client.post("get_info", model_id=run.id)
        assert info["lora_rank"] == config.get("rank", 4)
        assert client.get("live")["runs"][0]["rank"] == config.get("rank", 4)
        path = run.save("kept")
        assert client.post("weights_info", tinker_path=path)["train_mlp"] is True
        assert client.sample(run.sampler(), TEXT).sequences[0].tokens
        refused = Client(url, "tml-vnr-b")
        for name in (
            "style",
            "none",
        ):  # one is not this key's, the other is not there: in the same words
            answer = refused.send(
                "load_weights", session_id=refused.session, model_seq_id=0, path=name, optimizer=False
            )  # fmt: skip
            assert answer.status_code == 404
            assert f"the adapter '{name}'" in answer.json()["error"]["message"]
        with pytest.raises(Failed, match="holds no optimizer"):
            begun(client, "style", 9, optimizer=True)
    with listening(open_service(base, None, train=folder, keys=Keyring(keys))) as (
        url,
        _,
    ):  # the folder is gone
        again = Client(url, "tml-vnr-a")
        again.session = client.session
        assert Run(again, run.id, run.number).pass_([datum(TEXT)]).loss == pytest.approx(
            after, rel=1e-4
        )


@pytest.mark.parametrize("config", [{"dtype": "bfloat16"}, {"variant": "eva"}], ids=str)
def test_an_adapter_is_loaded_again_by_a_client_and_after_a_kill(base, tmp_path, config):
    adapters, folder = tmp_path / "adapters", str(tmp_path / "runs")
    adapter_at(adapters / "style", **config)
    service = open_service(base, adapters, train=folder)
    crash(service)  # no state is written: the load itself is computed again
    with listening(service) as (url, _):
        client = Client(url)
        run = begun(client, "style")
        first = run.pass_([datum(TEXT)]).loss
        run.step(0.1)
        after = run.pass_([datum(TEXT)], backward=False).loss
    with listening(open_service(base, adapters, train=folder)) as (url, _):
        again = Client(url)
        again.session = client.session
        back = Run(again, run.id, run.number)
        assert back.pass_([datum(TEXT)], backward=False).loss == pytest.approx(after, rel=1e-4)
        again.result(back.ask("load_weights", path="style", optimizer=False))
        assert back.pass_([datum(TEXT)], backward=False).loss == pytest.approx(first, rel=1e-4)


def test_an_archive_for_a_reader(client, it, tmp_path):
    pyrage = pytest.importorskip("pyrage")
    run, identity = trained_run(client), pyrage.x25519.Identity.generate()
    fields = {"path": "out", "age_encryption_recipients": [str(identity.to_public())]}
    path = client.result(run.ask("save_weights_external", **fields))["path"]
    place = path.removeprefix(f"tinker://{run.id}/")
    urls = client.get(f"training_runs/{run.id}/checkpoints/{place}/external_weights_urls")["urls"]
    assert urls
    for name, url in urls.items():
        assert name.endswith(".age")
        plain = pyrage.decrypt(client.http.get(url, headers={"x-api-key": ""}).content, [identity])
        (tmp_path / name.removesuffix(".age")).write_bytes(plain)
    veneer.load(tiny_model(**SHAPE), tmp_path)
    with pytest.raises(Failed, match="encrypted"):
        begun(client, path)
    for wrong in ("age1x", "x"):
        with pytest.raises(Failed, match="a public key of age or SSH"):
            client.result(
                run.ask("save_weights_external", path="no", age_encryption_recipients=[wrong])
            )


def test_a_server_without_the_cipher_says_so(client, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyrage", None)
    run = trained_run(client, 1)
    with pytest.raises(Failed, match="pyrage"):
        client.result(
            run.ask("save_weights_external", path="out", age_encryption_recipients=["age1x"])
        )
    assert client.result(run.ask("save_weights_external", path="out"))["path"]
