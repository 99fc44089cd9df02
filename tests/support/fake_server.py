"""A stand-in for Veneer's server, with the routes that its page uses. Its answers are predictable,
and it can fail on demand.

base                     repeats the words of the prompt until max_tokens
adapter                  writes its name before each word
adapter named broken…    fails after three tokens
adapter named cut…       closes the connection after three tokens
adapter named bytes…     sends an answer byte by byte, with the line ends of Windows
adapter named html…      answers with HTML
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from veneer.serve import page

MEBIBYTE = 2**20
BYTES = "naïve 🙂 – 你好\nzwei Zeilen\r\nund Ende"
HTML = '<img src=x onerror="window.pwned = 1"><script>window.pwned = 1</script><b>bold</b>'


@dataclass
class Fake:
    """The state of the server, and the requests that it received."""

    adapters: dict[str, dict[str, Any]] = field(default_factory=dict)
    key: str | None = None  # the key that requests must have; None: none
    admin: bool = True  # whether the key may read /metrics, manage adapters and use the base
    pace: float = 0.01  # seconds between two tokens
    held: bool = False  # whether answers wait after their third token
    ready: bool = True
    running: int = 0
    tokens: int = 0
    vanished: int = 0  # number of streams that the client closed
    asked: list[dict[str, Any]] = field(default_factory=list)
    refuse: dict[str, tuple[int, str]] = field(
        default_factory=dict
    )  # model → (status, message) that a completion answers instead
    prompts: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # model → its prompt format; the default is chat

    def add(self, name: str, pinned: bool = False, resident: bool = True) -> None:
        size = (4 + len(self.adapters)) * MEBIBYTE
        status = {
            "name": name,
            "resident": resident,
            "bytes": size,
            "pinned": pinned,
            "users": 0,
            "rank": 8,
        }
        self.adapters[name] = {**status, "variant": "lora"}


def error(status: int, message: str, **headers: str) -> JSONResponse:
    body = {
        "error": {
            "message": message,
            "type": "invalid_request_error",
            "param": None,
            "code": status,
        }
    }
    return JSONResponse(body, status, headers)


def pieces(model: str, prompt: str, count: int) -> list[str]:
    if model.startswith("html"):
        return [HTML[i : i + 7] for i in range(0, len(HTML), 7)]
    words = list(islice(cycle(prompt.split() or ["nothing"]), count))
    return [f"{word} " if model == "tiny-base" else f"{model}:{word} " for word in words]


async def answer(
    fake: Fake, request: Request, body: dict[str, Any], chat: bool
) -> AsyncIterator[bytes]:
    model, count = "+".join(body.get("adapters", {})) or body["model"], body["max_tokens"]
    prompt = body["messages"][-1]["content"] if chat else body["prompt"]

    def event(text: str, finish: str | None = None, **more: Any) -> str:
        choice = {
            "index": 0,
            "finish_reason": finish,
            **({"delta": {"content": text}} if chat else {"text": text}),
        }
        return f"data: {json.dumps({'choices': [choice], **more}, ensure_ascii=False)}\n\n"

    fake.running += 1
    try:
        if model.startswith("bytes"):
            stream = f": a comment\n{event(BYTES)}{event('', 'stop')}data: [DONE]\n\n"
            for byte in stream.replace("\n", "\r\n").encode():
                yield bytes([byte])
                await asyncio.sleep(0)
            return
        for i, text in enumerate(pieces(model, prompt, count)):
            await asyncio.sleep(fake.pace)
            while i == 3 and fake.held and not model.startswith("broken"):
                await asyncio.sleep(0.01)
            if i == 3 and model.startswith("cut"):
                return
            if i == 3 and model.startswith("broken"):
                error = b'{"message": "The adapter gave numbers that are not finite."}'
                yield b'data: {"error": ' + error + b"}\n\n"
                return
            fake.tokens += 1
            yield event(text).encode()
        yield event("", "length").encode()
        usage = {"prompt_tokens": 3, "completion_tokens": i + 1, "total_tokens": i + 4}
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode()
    except asyncio.CancelledError:
        fake.vanished += 1
        raise
    finally:
        fake.running -= 1


def metrics(fake: Fake) -> str:
    lines = [
        "# HELP veneer_running Rows of the batch\n# TYPE veneer_running gauge",
        f"veneer_running {fake.running}",
    ]
    lines += [
        "veneer_waiting 2.0",
        f'veneer_generated_tokens_total{{adapter="a}}\\"x 9"}} {fake.tokens}.0',
    ]
    return "\n".join([*lines, 'veneer_generated_tokens_total{adapter="b"} 1e0', ""])


def application(fake: Fake) -> FastAPI:
    app = FastAPI()
    app.include_router(page.router)

    @app.middleware("http")
    async def keys(request: Request, call_next):
        path, held = request.url.path, request.headers.get("authorization")
        if fake.key and (path.startswith("/v1") or path == "/metrics"):
            if held != f"Bearer {fake.key}":
                return error(401, "No such key.")
            if not fake.admin and (path == "/metrics" or "lora" in path):
                return error(403, "This key may not do that.")
        return await call_next(request)

    @app.get("/ready")
    def ready() -> Response:
        ready = {"status": "ready", "extensions": []}
        return JSONResponse(ready) if fake.ready else error(503, "Draining.")

    @app.get("/metrics")
    def numbers() -> Response:
        return PlainTextResponse(metrics(fake))

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        base = {"id": "tiny-base", "object": "model", "root": "tiny-base", "parent": None}
        adapters = [
            {"id": name, "object": "model", "root": name, "parent": "tiny-base"}
            for name in fake.adapters
        ]
        return {"object": "list", "data": [*([base] if fake.admin else []), *adapters]}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        form = {"mode": "chat", "system": None, "example": None, **fake.prompts.get(name, {})}
        return {"id": name, "object": "model", "prompt": form}

    @app.get("/v1/adapters")
    def statuses() -> list[dict[str, Any]]:
        return list(fake.adapters.values())

    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Response:
        body = await request.json()
        fake.asked.append(body)
        name, path = body["lora_name"], body.get("lora_path")
        if path is None:  # the request changes a pin alone
            fake.adapters[name]["pinned"] = body["pin"]
        elif path.startswith("missing"):
            return error(404, f"There is no adapter at {path!r}.")
        else:
            fake.add(name, pinned=body.get("pin", False))
        return PlainTextResponse("Success")

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Response:
        del fake.adapters[(await request.json())["lora_name"]]
        return PlainTextResponse("Success")

    async def complete(request: Request, chat: bool) -> Response:
        body = await request.json()
        fake.asked.append(body)
        if body["model"] in fake.refuse:
            status, message = fake.refuse[body["model"]]
            return error(status, message, **({"Retry-After": "3"} if status == 429 else {}))
        return StreamingResponse(answer(fake, request, body, chat), media_type="text/event-stream")

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await complete(request, True)

    @app.post("/v1/completions")
    async def completion(request: Request) -> Response:
        return await complete(request, False)

    return app


@contextmanager
def serve_fake(fake: Fake) -> Iterator[str]:
    """Run the server in a thread, and yield its address."""
    config = uvicorn.Config(
        application(fake), port=0, ws="none", log_level="error", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        threading.Event().wait(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive(), "the server did not stop"
