"""The `tinker` SDK as it is in the registry, against the running service. `make test-tinker
TINKER=/path/to/python`."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.serve.training.conftest import Local
from tests.support.tiny import tiny_model

import veneer
from veneer.adapter_files.verify import verify

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not os.environ.get("TINKER"),
        reason="TINKER names no Python that has tinker (make test-tinker)",
    ),
]


DOWNLOAD = """
import os, sys
os.environ["TINKER_TELEMETRY"], os.environ["TINKER_API_KEY"] = "0", "tml-any"
import tinker
from tinker_cookbook import weights
service = tinker.ServiceClient(base_url=sys.argv[1])
client = service.create_lora_training_client("tiny", rank=4, seed=1).result()
weights.download(tinker_path=client.save_state("s").result().path, output_dir=sys.argv[2], base_url=sys.argv[1])
"""


def test_the_cookbook_downloads_a_checkpoint(it, base, tmp_path):
    """Through an archive that the server encrypts for it."""
    pytest.importorskip("pyrage")
    python, folder = os.environ["TINKER"], tmp_path / "adapter"
    if subprocess.run(
        [python, "-c", "import tinker_cookbook"], capture_output=True, check=False
    ).returncode:
        pytest.skip("TINKER names a Python without tinker-cookbook")
    environment = {**os.environ, "PYTHONPATH": "", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, "-c", DOWNLOAD, it.url, str(folder)], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert verify(folder, base).ok


def test_every_method_of_its_clients_that_concerns_text(it, base, tmp_path):
    script = Path(__file__).with_name("tinker_client.py")
    environment = {**os.environ, "PYTHONPATH": "", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [os.environ["TINKER"], str(script), it.url, "tml-any"]
    (tmp_path / "tiny").symlink_to(
        base
    )  # a sampler's client looks for a tokenizer by the base's name
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["uncalled"] == []

    data = [
        [40, 51, 62, 73, 84, 95],
        [106, 117, 128, 139],
        [150, 161, 172, 183, 194, 205, 216, 227],
    ]
    rows, local = (
        [{"tokens": one[:-1], "target_tokens": one[1:]} for one in data],
        Local(rank=4, seed=1),
    )
    for loss in found["losses"]:
        assert loss == pytest.approx(local.pass_(rows), rel=0.01)
        local.step(0.02)
    logprobs = local.logprobs(rows)
    np.testing.assert_allclose(found["logprobs"], logprobs[0].detach(), atol=1e-3)
    assert found["custom"] == pytest.approx(
        sum(float(own.detach().exp().sum()) for own in logprobs), rel=1e-3
    )
    assert found["handle"] == pytest.approx(
        -sum(float(own.detach().sum()) for own in logprobs), rel=1e-3
    )
    assert found["several"] == pytest.approx(-float(logprobs[0].detach().sum()), rel=1e-3)
    assert found["losses_async"] == pytest.approx(found["losses"][:2], rel=1e-5)
    assert found["resumed_async"] == pytest.approx([1.0, 1.0], rel=1e-5)
    assert found["resumed"] == pytest.approx([found["now"]] * 2, rel=1e-5)
    np.testing.assert_allclose(found["scored"][1:], found["trained"], atol=1e-4)
    np.testing.assert_allclose(found["drawn"], found["trained"][5:], atol=1e-4)
    assert found["samples"] == [found["samples"][0]] * 4
    assert found["base"] != found["samples"][0]
    assert found["models"] == ["tiny"]
    assert found["info"]["lora_rank"] == 4
    for name, words in (
        ("bad", "token 999"),
        ("unknown", "the loss 'stable_reinforce'"),
        ("taken", "the name 'a/b'"),
        ("long", "500 tokens"),
    ):
        assert words in found[name], found[name]
    assert len(found["hosted"]) == 10
    assert all("of the hosted service" in one for one in found["hosted"])
    assert "plain API key" in found["whoami"]

    for name, url in found["urls"].items():
        (tmp_path / "out").mkdir(exist_ok=True)
        with urllib.request.urlopen(url) as answer:
            (tmp_path / "out" / name).write_bytes(answer.read())
        assert (tmp_path / "out" / name).stat().st_size == found["files"][name]
    assert verify(tmp_path / "out", base).ok
    model = tiny_model(tie_word_embeddings=False)
    veneer.load(model, tmp_path / "out")
    with torch.no_grad():
        own = model(torch.tensor([data[0]])).logits[0].log_softmax(-1)[np.arange(5), data[0][1:]]
    np.testing.assert_allclose(own, found["logprobs"], atol=1e-3)
