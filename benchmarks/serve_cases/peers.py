"""PEFT's way to serve many adapters, as an engine behind Veneer's own front:
``generate(adapter_names=[…])`` on a batch of what waits. Its API allows at best: a batch is as
large as `rows`, or as what waits when the one before is done; of more than fit, the oldest is taken
with those that are closest to it in length, so that little is padded; adapters are in the weights'
own type; each token is delivered when it is there. A batch cannot be joined or left while it runs:
`generate` has no way to.

    python benchmarks/serve_cases/peers.py PLACE --port 8000 --rows 16 --length 1024
"""

from __future__ import annotations

import argparse
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from veneer.serve.requests import Piece, Request, Token

log = logging.getLogger("serve_cases.peers")

# : seconds without a new request after which a batch starts, and the most that one waits for
# company: clients that got
#: their last token together send their next request together
QUIET, PATIENCE = 0.02, 0.2

Deliver = Callable[[Piece], None]


@dataclass(eq=False)
class Job:
    """A request, the callback that its pieces go to, and its state. The front reads `submitted_at`,
    `started_at` and `cached` when the answer has ended."""

    request: Request
    deliver: Deliver
    submitted_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    cached: int = 0  # `generate` keeps no prefixes
    cancelled: bool = False
    done: bool = False
    count: int = 0

    @property
    def adapter(self) -> str | None:
        """Its one adapter; None is the base."""
        return next(iter(self.request.blend), None)

    def cancel(self) -> None:
        self.cancelled = True

    def end(
        self, finish: Any, text: str = "", tokens: tuple[Token, ...] = (), error: str | None = None
    ) -> None:
        if not self.done:
            self.done = True
            self.deliver(Piece(text, tokens, finish, error))


class Batches:
    """A queue, and a thread that takes some of it and works them off with `work` before it takes
    more.

    `choose` says which of those that wait are next. It has what the API asks of an engine.
    """

    def __init__(
        self, choose: Callable[[Sequence[Job]], list[Job]], work: Callable[[list[Job]], None]
    ) -> None:
        self._choose, self._work = choose, work
        self._queue: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._closed = self._draining = False
        self._thread = threading.Thread(target=self._loop, name="batches", daemon=True)

    @property
    def running(self) -> int:
        return sum(not job.done for job in self._running)

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def ready(self) -> bool:
        return self._thread.is_alive() and not self._draining

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request, deliver: Deliver) -> Job:
        job = Job(request, deliver)
        with self._changed:
            self._queue.append(job)
            self._changed.notify()
        return job

    def drain(self, seconds: float) -> None:
        self._draining = True
        until = time.monotonic() + seconds
        while (self.running or self.waiting) and time.monotonic() < until:
            time.sleep(0.05)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _gather(self) -> list[Job]:
        """The next batch: waits until one is there, and until nobody has joined it for a moment."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            until = time.monotonic() + PATIENCE
            while not self._closed and time.monotonic() < until and self._changed.wait(QUIET):
                pass
            for job in [job for job in self._queue if job.cancelled]:
                self._queue.remove(job)
                job.end("cancelled")
            self._running = (
                self._choose(tuple(self._queue)) if self._queue and not self._closed else []
            )
            for job in self._running:
                self._queue.remove(job)
                job.started_at = time.monotonic()
            return self._running

    def _loop(self) -> None:
        while not self._closed:
            batch = self._gather()
            try:
                if batch:
                    self._work(batch)
            except Exception as error:
                log.exception("a batch failed")
                for job in batch:
                    job.end("error", error=str(error))
        for job in self._queue:
            job.end("cancelled")


def closest(rows: int) -> Callable[[Sequence[Job]], list[Job]]:
    """The oldest, and those whose prompts are nearest to its own in length."""

    def choose(waiting: Sequence[Job]) -> list[Job]:
        length = len(waiting[0].request.prompt)
        return sorted(waiting, key=lambda job: abs(len(job.request.prompt) - length))[:rows]

    return choose


# ------------------------------------------------------------------------------------------ PEFT,
# mixed batches


def create_engine(folder: Path, rows: int) -> tuple[Batches, Any, Any]:
    """(engine, model, tokenizer): PEFT with every adapter of the folder."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.generation import BaseStreamer, StoppingCriteria, StoppingCriteriaList

    tokenizer = AutoTokenizer.from_pretrained(folder / "base", padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
    folders = sorted((folder / "adapters").iterdir())
    # in bf16 PEFT's adapters are in fp32 unless told otherwise, which is slower
    model = PeftModel.from_pretrained(
        model, folders[0], adapter_name=folders[0].name, autocast_adapter_dtype=False
    )
    for folder in folders[1:]:
        model.load_adapter(folder, folder.name, autocast_adapter_dtype=False)
    model.eval()

    def work(batch: list[Job]) -> None:
        class Tell(BaseStreamer):
            """Called by `generate` with the prompts, then with a token for each row."""

            prompts = True

            def put(self, value: torch.Tensor) -> None:
                if not self.prompts:
                    for job, token in zip(batch, value.tolist(), strict=True):
                        say(job, token, tokenizer)
                self.prompts = False

            def end(self) -> None:
                pass

        class Left(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
                return torch.tensor([job.done or job.cancelled for job in batch])

        ids = [{"input_ids": list(job.request.prompt)} for job in batch]
        with torch.inference_mode():
            model.generate(
                **tokenizer.pad(ids, return_tensors="pt"),
                adapter_names=[job.adapter or "__base__" for job in batch],
                max_new_tokens=max(job.request.sampling.max_tokens for job in batch),
                do_sample=False,
                eos_token_id=None,
                streamer=Tell(),
                stopping_criteria=StoppingCriteriaList([Left()]),
            )
        for job in batch:
            job.end("cancelled" if job.cancelled else "length")

    return Batches(closest(rows), work), model, tokenizer


def say(job: Job, token: int, tokenizer: Any) -> None:
    """Deliver one token. A token is a word (see `place.py`): its text needs no neighbours."""
    if job.done or job.cancelled:
        return
    job.count += 1
    text = (" " if job.count > 1 else "") + tokenizer.convert_ids_to_tokens(token)
    tokens = (Token(token, text),)
    if job.count == job.request.sampling.max_tokens:
        job.end("length", text, tokens)
    else:
        job.deliver(Piece(text, tokens))


# ------------------------------------------------------------------------------------------ the
# front


class Names:
    """The names of the adapters, as the front asks a bank for them: this engine holds its own."""

    def __init__(self) -> None:
        self.names: dict[str, Path] = {}

    def throttle_loads(self) -> None:
        """Names take no time."""

    def register(self, name: str, path: Path) -> None:
        self.names[name] = path

    def remove(self, name: str) -> None:
        del self.names[name]

    def status(self) -> list[Any]:
        return []


def main() -> None:
    """Serve until a signal says to stop."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("place", type=Path)
    for name in ("port", "rows", "length"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    from veneer.serve.access import Keyring
    from veneer.serve.api import Service, create
    from veneer.serve.catalogue import Catalogue
    from veneer.serve.listen import Server, bind
    from veneer.serve.metrics import Metrics

    logging.basicConfig(level=logging.INFO)
    folder = options.place
    engine, model, tokenizer = create_engine(folder, options.rows)
    bank, metrics = Names(), Metrics()
    metrics.watch(engine, bank)
    service = Service(
        base="base",
        source=str(folder / "base"),
        tokenizer=tokenizer,
        bank=bank,
        catalogue=Catalogue(folder / "adapters", bank, "base"),
        keys=Keyring(),
        metrics=metrics,
        engine=engine,
        length=options.length,
        vocabulary=model.config.vocab_size,
    )
    listening = bind("127.0.0.1", options.port)
    engine.start()
    try:
        Server(create(service), service.drain, 5).run([listening])
    finally:
        service.close()


if __name__ == "__main__":
    main()
