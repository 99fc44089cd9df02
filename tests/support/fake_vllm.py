"""A stand-in for vLLM's server: a program at a Unix socket with predictable answers on the routes
that Veneer's front needs. It takes vLLM's flags. GET /state returns the requests that it received.

An answer is "NAME:PROMPT:SUM": the name of the model or adapter in vLLM, the prompt, and the sum of
the absolute values of the adapter's first tensor, which tells a test which files were loaded. A
prompt of "slow" is answered after POST /go, and a stream of "stall" goes on after it; "die" ends
the program.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import uvicorn
from safetensors import safe_open
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

STATE: dict[str, Any] = {"asked": [], "loaded": {}, "unloaded": [], "line": sys.argv[1:]}
GO = asyncio.Event()


def error(status: int, message: str) -> Response:
    body = {"message": message, "type": "BadRequestError", "param": None, "code": status}
    return JSONResponse({"error": body}, status)


async def load(request: Request) -> Response:
    body = await request.json()
    name, path = body["lora_name"], Path(body["lora_path"])
    config = json.loads((path / "adapter_config.json").read_text())
    if config["r"] > int(STATE["line"][STATE["line"].index("--max-lora-rank") + 1]):
        return error(400, "the rank is greater than max_lora_rank")
    if name in STATE["loaded"]:
        return error(400, f"The lora adapter '{name}' has already been loaded.")
    with safe_open(path / "adapter_model.safetensors", "numpy") as tensors:
        first = sorted(tensors.keys())[0]
        number = float(abs(tensors.get_tensor(first)).sum())
    STATE["loaded"][name] = {"path": str(path), "rank": config["r"], "sum": round(number, 3)}
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


async def unload(request: Request) -> Response:
    name = (await request.json())["lora_name"]
    if STATE["loaded"].pop(name, None) is None:
        return error(404, f"The lora adapter '{name}' cannot be found.")
    STATE["unloaded"].append(name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


async def models(request: Request) -> Response:
    name = STATE["line"][STATE["line"].index("--served-model-name") + 1]
    return JSONResponse({"object": "list", "data": [{"id": name, "max_model_len": 128}]})


async def answer(request: Request) -> Response:
    body = await request.json()
    STATE["asked"].append({"path": request.url.path, **body})
    name, prompt = body["model"], body.get("prompt") or body["messages"][-1]["content"]
    if name.startswith("veneer-") and name not in STATE["loaded"]:
        return error(404, f"The model `{name}` does not exist.")
    if prompt == "die":
        os._exit(3)
    if prompt == "slow":
        await GO.wait()
    number = STATE["loaded"].get(name, {"sum": 0.0})["sum"]
    text = f"{name}:{prompt}:{number}"
    common = {"id": "cmpl-1", "model": name}
    if not body.get("stream"):
        usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
        choice = {"index": 0, "text": text, "finish_reason": "stop"}
        return JSONResponse({**common, "choices": [choice], "usage": usage})

    async def events():
        for piece in text.split(":"):
            chunk = json.dumps(
                {**common, "choices": [{"index": 0, "text": piece}]}, ensure_ascii=False
            )
            # send an event in two parts, because a socket may split it
            yield f"data: {chunk[:20]}"
            await asyncio.sleep(0)
            yield f"{chunk[20:]}\n\n"
            if piece == "cut":
                os._exit(3)
            if piece == "stall":
                await GO.wait()
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


async def go(request: Request) -> Response:
    GO.set()
    return PlainTextResponse("")


ANSWERED = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/tokenize",
    "/score",
)
ROUTES = [
    Route("/health", lambda request: PlainTextResponse("")),
    Route("/metrics", lambda request: PlainTextResponse("vllm:num_requests_running 0.0\n")),
    Route("/state", lambda request: JSONResponse(STATE)),
    Route("/go", go, methods=["POST"]),
    Route("/v1/models", models),
    Route("/v1/load_lora_adapter", load, methods=["POST"]),
    Route("/v1/unload_lora_adapter", unload, methods=["POST"]),
    *(Route(path, answer, methods=["POST"]) for path in ANSWERED),
]


def write_program(folder: Path) -> Path:
    """Write a program `vllm` that runs this file into ``folder``."""
    folder.mkdir(parents=True)
    program = folder / "vllm"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__)}" "$@"\n')
    program.chmod(0o755)
    return program


if __name__ == "__main__":
    if os.environ.get("FAKE_VLLM_FAILS"):
        sys.exit(f"no such base: {sys.argv[2]}")
    socket = sys.argv[sys.argv.index("--uds") + 1]
    uvicorn.run(Starlette(routes=ROUTES), uds=socket, log_level="error")
