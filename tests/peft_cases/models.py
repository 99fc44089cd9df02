"""Small models, one for each kind of layer that PEFT's tests adapt, with the names that these use.

``MODELS`` maps a name to (builder, arguments of a call). All are built in float64: what is equal is
equal to 1e-9.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {}


def _model(
    name: str, inputs: Callable[[], Any], *args: Any
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a class, built with ``args``, as the model ``name``."""

    def add(cls: type[nn.Module]) -> type[nn.Module]:
        MODELS[name] = (lambda: cls(*args), lambda: tuple(inputs()))
        return cls

    return add


def _vectors() -> tuple[Tensor, ...]:
    return (torch.randn(9, 10),)


def _ids(
    shape: tuple[int, int] = (9, 2), vocabulary: int = 100
) -> Callable[[], tuple[Tensor, ...]]:
    def inputs() -> tuple[Tensor, ...]:
        ids = torch.randint(0, vocabulary, shape)
        ids[0, 0], ids[0, 1], ids[1, 0], ids[1, 1] = 0, 1, 3, 10  # the tokens that rows train
        return (ids,)

    return inputs


@_model("mlp", _vectors)
@_model("mlp without biases", _vectors, False)
class MLP(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(10, 20, bias=bias), nn.Linear(20, 2, bias=bias)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return F.log_softmax(self.lin1(self.drop(F.relu(self.lin0(x)))), -1)


@_model("mlp with norms", _vectors)
class MLPWithNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layernorm0, self.layernorm1 = nn.LayerNorm(10), nn.LayerNorm(20)
        self.lin0, self.lin1 = nn.Linear(10, 20), nn.Linear(20, 2)

    def forward(self, x):
        return self.lin1(self.layernorm1(F.relu(self.lin0(self.layernorm0(x)))))


@_model("mlp with a GRU", _vectors)
class MLPWithGRU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.gru, self.fc = (
            nn.Linear(10, 20),
            nn.GRU(20, 20, batch_first=True),
            nn.Linear(20, 2),
        )

    def forward(self, x):
        return self.fc(self.gru(F.relu(self.lin0(x))[:, None])[0][:, 0])


@_model("mlp of four", _vectors)
class MLPOfFour(nn.Module):
    """Linear layers of several shapes, two of them alike."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(10, 20), nn.Linear(20, 20)
        self.lin2, self.lin3 = nn.Linear(20, 20), nn.Linear(20, 2)

    def forward(self, x):
        return self.lin3(F.relu(self.lin2(F.relu(self.lin1(F.relu(self.lin0(x)))))))


class Block(nn.Module):
    def __init__(self, size: int = 10) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x):
        return self.lin1(F.relu(self.lin0(x)))


@_model("deep mlp", _vectors)
class DeepMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(12))
        self.head = nn.Linear(10, 2)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 10)

    def forward(self, x):
        return F.silu(self.linear(x))


@_model("nested", _vectors)
class Nested(nn.Module):
    """The same name at several depths, so that a pattern for one of them must not mean the
    others."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(Inner(), nn.Sequential(Inner(), nn.Sequential(Inner())))
        self.linear = nn.Linear(10, 10)

    def forward(self, x):
        return self.linear(self.model(x))


@_model("embedding and Conv1D", _ids())
class EmbConv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.conv1d, self.lin0 = nn.Embedding(100, 5), Conv1D(1, 5), nn.Linear(2, 2)

    def forward(self, ids):
        return self.lin0(F.relu(self.conv1d(self.emb(ids))).flatten(1))


@_model("wide Conv1D", _ids())
class WideConv1D(nn.Module):
    """A Conv1D with more outputs than one: what is transposed shows."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.conv1d, self.lin0 = nn.Embedding(100, 6), Conv1D(8, 6), nn.Linear(16, 3)

    def forward(self, ids):
        return self.lin0(F.relu(self.conv1d(self.emb(ids))).flatten(1))


@_model("embedding with a getter", _ids())
class EmbWithGetter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.conv1d, self.lin0 = (
            nn.Embedding(100, 5),
            Conv1D(1, 5),
            nn.Linear(2, 2),
        )

    def forward(self, ids):
        return self.lin0(F.relu(self.conv1d(self.embed_tokens(ids))).flatten(1))

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return None


@_model("embedding with a sibling", _ids())
class EmbWithSibling(nn.Module):
    """The name of one embedding is the beginning of the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.embed_tokens_extra = nn.Embedding(100, 5), nn.Embedding(100, 5)
        self.lin0 = nn.Linear(5, 2)

    def forward(self, ids):
        return self.lin0(self.embed_tokens(ids) + self.embed_tokens_extra(ids))

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return None


@_model("two embeddings", _ids())
class TwoEmbeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb_text, self.emb_image, self.lin0 = (
            nn.Embedding(100, 10),
            nn.Embedding(100, 10),
            nn.Linear(10, 4),
        )

    def forward(self, ids):
        return self.lin0(F.silu(self.emb_text(ids) + self.emb_image(ids)))


@_model("tied embedding and head", _ids())
@_model("untied embedding and head", _ids(), False)
class EmbeddingAndHead(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.emb, self.linear, self.head = (
            nn.Embedding(100, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 100, bias=False),
        )
        if tied:
            self.head.weight = self.emb.weight

    def forward(self, ids):
        return self.head(F.silu(self.linear(self.emb(ids))))


@_model("Conv1d", _vectors, 1, 1, 2, 1)
@_model("larger Conv1d", _vectors, 64, 16, 2, 1)
@_model("Conv1d in groups", _vectors, 8, 8, 3, 2)
@_model("Conv1d of kernel 1", _vectors, 3, 10, 1, 1)
class ModelConv1d(nn.Module):
    def __init__(self, in_: int, out: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(in_, out, kernel, groups=groups)
        self.lin0 = nn.Linear(out * (11 - kernel), 2)
        self.register_buffer("spread", torch.linspace(0.5, 1.5, in_)[:, None], persistent=False)

    def forward(self, x):
        return self.lin0(F.silu(self.conv1d(x[:, None] * self.spread)).flatten(1))


@_model("Conv2d", _vectors, 5, 10, 3, 1, True)
@_model("Conv2d without a bias", _vectors, 5, 10, 3, 1, False)
@_model("Conv2d of kernel 1", _vectors, 1, 10, 1, 1, True)
@_model("Conv2d in 8 groups", _vectors, 16, 16, 3, 8, True)
@_model("Conv2d in 2 groups", _vectors, 16, 32, 3, 2, True)
class ModelConv2d(nn.Module):
    def __init__(self, in_: int, out: int, kernel: int, groups: int, bias: bool) -> None:
        super().__init__()
        self.first = nn.Linear(10, in_ * 9)
        self.conv2d = nn.Conv2d(in_, out, kernel, groups=groups, bias=bias)
        self.lin0 = nn.Linear(out * (4 - kernel) ** 2, 2)

    def forward(self, x):
        return self.lin0(
            F.relu(self.conv2d(F.relu(self.first(x)).view(len(x), -1, 3, 3))).flatten(1)
        )


@_model("Conv2d between linear layers", _vectors)
class Conv2dBetween(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.conv2d, self.lin1 = nn.Linear(10, 72), nn.Conv2d(8, 32, 3), nn.Linear(32, 2)

    def forward(self, x):
        return self.lin1(F.relu(self.conv2d(F.relu(self.lin0(x)).view(-1, 8, 3, 3))).flatten(1))


@_model("Conv3d", lambda: (torch.randn(3, 5, 3, 3, 3),))
class ModelConv3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv3d, self.lin0 = nn.Conv3d(5, 10, 3), nn.Linear(10, 2)

    def forward(self, x):
        return self.lin0(F.relu(self.conv3d(x)).flatten(1))


@_model("attention of torch", lambda: (torch.randn(4, 3, 10),))
class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha, self.lin0 = nn.MultiheadAttention(10, 2), nn.Linear(10, 2)

    def forward(self, x):
        return self.lin0(self.mha(x, x, x)[0])


class LinearOfParameters(nn.Module):
    """A linear layer in all but class, with its weight as [in, out]."""

    def __init__(self, in_: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(in_, out)), nn.Parameter(torch.ones(out))

    def forward(self, x):
        return x @ self.weight + self.bias


@_model("mlp of parameters", _vectors)
class MLPOfParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = LinearOfParameters(10, 20), LinearOfParameters(20, 2)

    def forward(self, x):
        return self.lin1(F.relu(self.lin0(x)))


@_model("linear, embedding and Conv2d", lambda: (torch.randn(4, 40),))
class ThreeKinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.embed, self.conv2d = (
            nn.Linear(40, 40),
            nn.Embedding(40, 40),
            nn.Conv2d(10, 20, 3, padding=1),
        )

    def forward(self, x):
        image = x.view(len(x), 10, 2, 2)
        return self.linear(x), self.embed((x.abs() * 10).long() % 40), self.conv2d(image)


@_model(
    "every kind that DoRA knows", lambda: (torch.randint(0, 30, (3, 8)), torch.randn(3, 3, 6, 6))
)
class EveryKind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.conv1d = nn.Embedding(30, 12), nn.Conv1d(12, 16, 3, padding=1)
        self.conv2d, self.linear1, self.linear2 = (
            nn.Conv2d(3, 8, 3),
            nn.Linear(256, 16),
            nn.Linear(16, 4),
        )

    def forward(self, ids, image):
        text = F.relu(self.conv1d(self.embedding(ids).transpose(1, 2))).flatten(1)
        return self.linear2(
            F.relu(self.linear1(torch.cat([text, F.relu(self.conv2d(image)).flatten(1)], 1)))
        )
