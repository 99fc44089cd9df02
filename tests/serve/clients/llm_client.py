"""`llm`: a chain with a tool, and a schema; its models come from a file of its own folder."""

from __future__ import annotations

import json
import os
import pathlib
import sys

folder = pathlib.Path(os.environ["LLM_USER_PATH"])
folder.mkdir(parents=True, exist_ok=True)
(folder / "extra-openai-models.yaml").write_text(
    f"- model_id: tiny\n  model_name: tiny\n  api_base: {sys.argv[1]}/v1\n"
    "  supports_tools: true\n  supports_schema: true\n"
)

import llm  # noqa: E402


def get_weather(city: str, days: int) -> str:
    """The weather."""
    return f"sunny in {city} for {days} days"


model = llm.get_model("tiny")
model.key = "none"
schema = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
}
read = {"told": model.chain("the weather?", tools=[get_weather]).text()}
read["plain"] = model.prompt("hi").text()
read["schema"] = json.loads(model.prompt("the weather?", schema=schema).text())
read["whole"] = json.loads(model.prompt("the weather?", schema=schema, stream=False).text())
print(json.dumps(read))
