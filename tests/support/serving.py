"""Helpers for tests of the engine: tiny models of several architectures, a bank that only records,
a client."""

from __future__ import annotations

import contextlib
import itertools
import queue
import random
import threading
from concurrent.futures import Future

import torch
import transformers

from veneer.serve.requests import Piece, Request, Sampling

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 259, "max_position_embeddings": 256, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": 2,
}  # fmt: skip

SLIDING = {**SHAPE, "head_dim": 16, "sliding_window": 6}
#: a window in one of the layers, which is longer than the trial of an engine
WINDOW = {**SHAPE, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}

MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**WINDOW)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**SLIDING, use_sliding_window=True, max_window_layers=1)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=259, n_positions=256, bos_token_id=2,
            eos_token_id=2
        )
    ),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SLIDING)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SLIDING)),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**{**SHAPE, "sliding_window": 6, "num_key_value_heads": 4})
    ),
}  # fmt: skip

#: models whose attention or calls the slots do not support
OTHERS = {
    "gpt_oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**SLIDING, num_local_experts=2, num_experts_per_tok=1)
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **WINDOW,
            num_experts=2,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        )
    ),
    "bloom": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=259)
    ),
    "mamba": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(
            hidden_size=32, num_hidden_layers=2, vocab_size=259, pad_token_id=0
        )
    ),
    "llama4": lambda: transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(**SHAPE, head_dim=16)
    ),
}


def make(name: str, seed: int = 0):
    """A model of an architecture, with random weights that are large enough for different answers
    to different prompts."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = {**MODELS, **OTHERS}[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.3)
        return model.eval()


def prompts(count: int, longest: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Random prompts as token ids, of 1 to ``longest`` tokens."""
    draw = random.Random(seed)
    return [
        tuple(draw.randrange(3, 259) for _ in range(draw.randint(1, longest))) for _ in range(count)
    ]


def alone(model, prompt, tokens: int) -> list[int]:
    """The greedy tokens of transformers' own generate, for one prompt."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def asked(
    prompt, tokens: int = 8, *, blend=None, timeout: float = 60, id: str = "", **sampling
) -> Request:
    return Request(
        tuple(prompt),
        blend or {},
        Sampling(tokens, **{"temperature": 0.0, **sampling}),
        timeout,
        id,
    )


class Client:
    """Sends one request, and collects the pieces of its answer."""

    def __init__(self, engine, request: Request, on_piece=None) -> None:
        self.pieces: list[Piece] = []
        self.over = threading.Event()
        self.first = threading.Event()
        self.on_piece = on_piece
        self.ticket = engine.submit(request, self._take)

    def _take(self, piece: Piece) -> None:
        self.pieces.append(piece)
        if self.on_piece is not None:
            self.on_piece(piece)
        self.first.set()
        if piece.finish is not None:
            self.over.set()

    def wait(self, seconds: float = 60) -> Client:
        assert self.over.wait(seconds), "no finishing piece"
        finishes = [piece.finish for piece in self.pieces]
        assert finishes[-1] is not None
        assert not any(finishes[:-1]), finishes
        return self

    @property
    def tokens(self) -> list[int]:
        return [token.id for piece in self.pieces for token in piece.tokens]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def finish(self):
        return self.pieces[-1].finish

    @property
    def error(self):
        return self.pieces[-1].error


#: numbers of adapters in memory, none of which is used twice
_UIDS = itertools.count()


class Adapter:
    """A stand-in for an adapter in memory."""

    invocation_tokens = ()

    def __init__(self, name: str) -> None:
        self.name, self.uid = name, next(_UIDS)


class Lease:
    def __init__(self, bank: Recorder, blend) -> None:
        self.bank, self.blend = bank, dict(blend)
        self.uses = [
            (bank.adapters.setdefault(name, Adapter(name)), w) for name, w in blend.items()
        ]

    def release(self) -> None:
        self.bank.held.remove(self)


class Recorder:
    """A stand-in for the bank. It holds no adapters, and records the leases and the adapters of
    each call.

    ``slow``: names whose blends are loaded when ``arrive`` is called. ``failing``: the error of
    each adapter that does not load, by name.
    """

    crowded = False

    def __init__(self, slow=(), failing=None) -> None:
        self.slow, self.failing = set(slow), dict(failing or {})
        self.held: list[Lease] = []
        self.adapters: dict[str, Adapter] = {}
        self.calls: list[list[object]] = []
        self.pending: queue.Queue[tuple[Future, dict]] = queue.Queue()

    def acquire(self, blend) -> Future:
        future: Future = Future()
        error = next((self.failing[name] for name in blend if name in self.failing), None)
        if error is not None:
            future.set_exception(error)
        elif self.slow & set(blend):
            self.pending.put((future, blend))
        else:
            future.set_result(self._lease(blend))
        return future

    def _lease(self, blend) -> Lease:
        self.held.append(Lease(self, blend))
        return self.held[-1]

    def arrive(self) -> None:
        """Finish the load of the first slow blend."""
        future, blend = self.pending.get(timeout=30)
        self.slow -= set(blend)
        future.set_result(self._lease(blend))

    @contextlib.contextmanager
    def rows(self, entries, *, invoked):
        assert invoked
        for entry in entries:
            assert entry is None or entry in self.held
        self.calls.append([None if entry is None else entry.blend for entry in entries])
        yield
