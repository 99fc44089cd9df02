"""Hostile bodies for a server with a tiny model: `python -m tests.stress.fuzz_serve --seed 1`.

No answer may be an error of the server, none may hang, and memory stays flat. A body that breaks
one of these is named by its number, and `--only NUMBER` sends it alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from tests.support.api_server import listening
from tests.support.hostile_bodies import (
    ENCODED,
    ROUTES,
    HostileRequest,
    hostile_request,
)
from tests.support.service import open_service
from tests.support.tiny import tiny_tokenizer
from tests.support.tool_models import write_unigram
from transformers import AutoModelForCausalLM, BertConfig, BertModel

import veneer

#: seconds that any answer may take; bodies after which memory is that of the server at work
PATIENCE, WARM = 30.0, 500
#: codes of refusals that are the server's right although their status is 5xx
RIGHTFUL = ("timeout", "out_of_memory")


@contextmanager
def generator(folder: Path) -> Iterator[str]:
    """The address of a server with a tiny causal model, tools and adapters."""
    base = write_unigram(folder / "base", length=512)
    for seed, name in enumerate(("french", "german")):
        model = AutoModelForCausalLM.from_pretrained(base)
        save_adapter(model, folder / "adapters" / name, seed, targets="all-linear")
    service = open_service(base, folder / "adapters", length=512, timeout=PATIENCE / 2)
    with listening(service) as (url, _):
        yield url


@contextmanager
def encoder(folder: Path) -> Iterator[str]:
    """The address of a server with a tiny encoder."""
    shape = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = BertConfig(**shape, num_attention_heads=2, max_position_embeddings=64, pad_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(config).eval()
    model.save_pretrained(folder / "encoder")
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder / "encoder")
    save_adapter(model, folder / "encoders" / "french", 0, targets=["query"])
    service = open_service(folder / "encoder", folder / "encoders", timeout=PATIENCE / 2)
    with listening(service) as (url, _):
        yield url


def save_adapter(model: Any, path: Path, seed: int, **config: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        handle = veneer.attach(model, veneer.LoraConfig(rank=2, **config))
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.normal_(0, 0.1)
    handle.save(path)
    handle.detach()


def resident_bytes() -> int:
    """Memory of this process, in which the server is."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def problem_of(client: httpx.Client, request: HostileRequest, statuses: Counter[int]) -> str | None:
    """A problem of the answer to a request, whose status is counted."""
    headers = {"Content-Type": request.content_type} if request.content_type else {}
    content = b""
    start = time.monotonic()
    try:
        with client.stream(
            "POST", request.route, content=request.content, headers=headers
        ) as answer:
            statuses[answer.status_code] += 1
            for piece in answer.iter_bytes():
                content += piece
                if request.leaves:
                    return None
    except httpx.TimeoutException:
        return f"no answer in {time.monotonic() - start:.0f} s"
    except httpx.TransportError as error:
        return f"a broken connection ({error!r})"
    if answer.status_code >= 500 and not rightful(content):
        return f"status {answer.status_code}: {content[:300]!r}"
    for line in content.split(b"\n"):
        if b'"server_error"' in line[:600] and line.startswith(b"data: {") and not rightful(line):
            return f"an error of the server in a stream: {line[:300]!r}"
    if answer.status_code >= 400 and not json.loads(content).get("error", {}).get("message"):
        return f"a refusal without words: {content[:300]!r}"
    return None


def rightful(content: bytes) -> bool:
    return any(f'"{code}"'.encode() in content for code in RIGHTFUL)


@dataclass
class FuzzReport:
    """Problems in words; bytes of memory after ``WARM`` bodies and after all; answers by status."""

    problems: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)


def run(folder: Path, seed: int, numbers: Sequence[int]) -> FuzzReport:
    """Send hostile bodies to two servers, one after the other."""
    report = FuzzReport()
    with generator(folder) as causal_url, encoder(folder) as encoder_url:
        options: dict[str, Any] = {"timeout": PATIENCE, "trust_env": False}
        with (
            httpx.Client(base_url=causal_url, **options) as causal,
            httpx.Client(base_url=encoder_url, **options) as encoding,
        ):
            for count, number in enumerate(numbers):
                request = hostile_request(seed, number, ROUTES)
                client = encoding if request.route in ENCODED else causal
                if problem := problem_of(client, request, report.statuses):
                    report.problems.append(
                        f"{number} {request.route}: {problem}\n  {request.content[:600]!r}"
                    )
                if count + 1 == WARM:
                    report.memory.append(resident_bytes())
            for client in (causal, encoding):
                if client.get("/ready").status_code != 200:
                    report.problems.append("a server that is not ready at the end")
        report.memory.append(resident_bytes())
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    numbers = range(options.count) if options.only is None else [options.only]
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        report = run(Path(folder), options.seed, numbers)
    for problem in report.problems:
        print(problem)
    sizes = ", ".join(f"{size / 2**20:.0f} MiB" for size in report.memory)
    statuses = ", ".join(f"{count} × {status}" for status, count in report.statuses.most_common())
    seconds, count = time.monotonic() - start, len(report.problems)
    print(f"{len(numbers)} bodies of seed {options.seed} in {seconds:.0f} s: {statuses}")
    print(f"{count} problems; memory {sizes}")
    grown = len(report.memory) > 1 and report.memory[-1] > 1.1 * report.memory[0]
    return 1 if report.problems or grown else 0


if __name__ == "__main__":
    sys.exit(main())
