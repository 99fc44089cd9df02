"""Small models with features of real ones: blocks, names of attention and MLP layers, a tied output
head, convolutions, shared modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return self.o_proj(
            F.scaled_dot_product_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.self_attn = Attention(width)
        self.mlp = nn.ModuleDict(
            {"up": nn.Linear(width, 2 * width), "down": nn.Linear(2 * width, width)}
        )

    def forward(self, x):
        x = x + self.self_attn(self.norm(x))
        return x + self.mlp["down"](F.silu(self.mlp["up"](x)))


class Body(nn.Module):
    def __init__(self, vocabulary: int, width: int, blocks: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids):
        x = self.embed_tokens(ids)
        for block in self.layers:
            x = block(x)
        return self.norm(x)


class TinyLM(nn.Module):
    """A model like a causal LM. ``tied``: whether its head shares the embedding's weight."""

    base_model_prefix = "model"

    def __init__(
        self, tied: bool = False, vocabulary: int = 17, width: int = 8, blocks: int = 2
    ) -> None:
        super().__init__()
        self.model = Body(vocabulary, width, blocks)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        return self.lm_head(self.model(ids))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.pointwise = nn.Conv2d(6, 8, 1)
        self.score = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        return self.score(F.relu(self.pointwise(self.depthwise(x))).mean((-2, -1)))


class Shared(nn.Module):
    """A model with one layer that has two names and is called three times, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(6, 6)
        self.alias = self.block

    def forward(self, x):
        return self.alias(torch.tanh(self.block(torch.tanh(self.block(x)))))


class Stack(nn.Module):
    """A model with layers for every path of an adapted call: factored, on a view, and with a weight
    that another module reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.recurrent = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, ids):
        x = self.encoder(self.embed(ids))
        return self.head(self.recurrent(self.conv(x.mT).mT)[0])


IDS = torch.tensor([[1, 5, 3, 16], [2, 2, 0, 7]])
