"""`langchain-openai`: bind_tools, with_structured_output, a stream, and the responses API."""

from __future__ import annotations

import json
import sys

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Weather(BaseModel):
    """A weather."""

    city: str
    days: int


@tool
def get_weather(city: str, days: int) -> str:
    """The weather."""
    return f"sunny in {city} for {days} days"


options = {"model": "tiny", "base_url": f"{sys.argv[1]}/v1", "api_key": "none"}
read = {}
for name, model in (
    ("chat", ChatOpenAI(**options)),
    ("responses", ChatOpenAI(**options, use_responses_api=True)),
):
    bound, messages = model.bind_tools([get_weather]), [HumanMessage("the weather?")]
    answer = bound.invoke(messages)
    messages += [answer, get_weather.invoke(answer.tool_calls[0])]
    told = bound.invoke(messages).content
    streamed = None
    for chunk in bound.stream("the weather?"):
        streamed = chunk if streamed is None else streamed + chunk
    read[name] = {
        "call": [answer.tool_calls[0]["name"], answer.tool_calls[0]["args"]],
        "told": told if isinstance(told, str) else "".join(block["text"] for block in told),
        "streamed": streamed.tool_calls[0]["args"],
        "any": model.bind_tools([get_weather], tool_choice="any").invoke("a").tool_calls[0]["args"],
        "structured": model.with_structured_output(Weather).invoke("a").model_dump(),
    }
for method in ("json_schema", "function_calling"):
    structured = ChatOpenAI(**options).with_structured_output(Weather, method=method)
    read[method] = structured.invoke("the weather?").model_dump()
print(json.dumps(read))
