"""The small models that the cases are about."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


class Holder(nn.Module):
    """One layer under the name ``layer``; its first output, where it has several."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        output = self.layer(*inputs)
        return output[0] if isinstance(output, tuple) else output


class Stack(nn.Module):
    """Linear layers ``body.layers.<i>.linear``; an input with a NaN raises in the middle of it."""

    def __init__(self, blocks: int = 2, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.layers = nn.ModuleList(
            nn.Sequential(OrderedDict(linear=nn.Linear(width, width))) for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.body.layers:
            x = torch.tanh(block(x))
            if not torch.compiler.is_compiling() and x.isnan().any():
                raise ArithmeticError("not a number")
        return x


class Tied(nn.Module):
    """A language model's skeleton, whose head reads the embedding's weight, and which says so as
    transformers does."""

    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}
    config = {"tie_word_embeddings": True, "model_type": "custom"}

    def __init__(self, vocabulary: int = 12, width: int = 8) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.body = nn.Linear(width, width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.body(self.embed_tokens(ids))))


class TwoNames(nn.Module):
    """One linear layer, reachable and called under two names."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))
