"""`pydantic-ai`: tools with an answer in words, and the default output type, which is a forced
call; through chats and through responses."""

from __future__ import annotations

import json
import sys

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class Weather(BaseModel):
    city: str
    days: int


def get_weather(city: str, days: int) -> str:
    """The weather."""
    return f"sunny in {city} for {days} days"


async def read_events(context, events) -> None:
    """With a reader of events, a run takes each answer as a stream."""
    async for _ in events:
        pass


provider = OpenAIProvider(base_url=f"{sys.argv[1]}/v1", api_key="none")
read = {}
for name, kind in (("chat", OpenAIChatModel), ("responses", OpenAIResponsesModel)):
    model = kind("tiny", provider=provider)
    talking = Agent(model, tools=[get_weather])
    read[name] = {
        "told": talking.run_sync("the weather?").output,
        "streamed": talking.run_sync("the weather?", event_stream_handler=read_events).output,
        "output": Agent(model, output_type=Weather).run_sync("the weather?").output.model_dump(),
        "native": Agent(model, output_type=NativeOutput(Weather)).run_sync("a").output.model_dump(),
        "both": Agent(model, output_type=Weather, tools=[get_weather])
        .run_sync("a")
        .output.model_dump(),
    }
print(json.dumps(read))
