"""A server that trains the tiny base, and what the same runs come to without one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tests.support.api_server import listening
from tests.support.service import open_service
from tests.support.tiny import tiny_model, write_tiny
from tests.support.training_client import Client

import veneer
from veneer.serve.training.training_service import training_of

SHAPE = {"tie_word_embeddings": False}


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("trained") / "base", **SHAPE)


@pytest.fixture(scope="module")
def it(base, tmp_path_factory):
    """A server of the module's tests."""
    folder = tmp_path_factory.mktemp("training") / "runs"
    service = open_service(base, None, train=str(folder))
    with listening(service) as (url, _):
        yield SimpleNamespace(
            url=url, service=service, training=training_of(service), folder=folder
        )


@pytest.fixture
def client(it):
    return Client(it.url)


class Local:
    """A run by hand, on a model of its own."""

    def __init__(self, rank=4, seed=1, targets=("attention", "mlp", "lm_head")):
        self.model = tiny_model(**SHAPE)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.handle = veneer.attach(self.model, veneer.LoraConfig(rank=rank, targets=targets))
        self.optimizer = torch.optim.AdamW(
            self.handle.parameters(), betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0
        )

    def logprobs(self, data):
        found = []
        for one in data:
            logits = self.model(torch.tensor([one["tokens"]])).logits[0]
            found.append(
                F.log_softmax(logits, -1).gather(-1, torch.tensor(one["target_tokens"])[:, None])[
                    :, 0
                ]
            )
        return found

    def pass_(self, data):
        """The loss of a pass of cross entropy; its gradients are added."""
        total = -torch.stack([own.sum() for own in self.logprobs(data)]).sum()
        total.backward()
        return float(total.detach())

    def step(self, rate=0.01):
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
