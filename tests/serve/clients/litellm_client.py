"""`litellm`: tools, with a stream and without, and a schema."""

from __future__ import annotations

import json
import sys

import litellm
from pydantic import BaseModel


class Weather(BaseModel):
    city: str
    days: int


options = {"model": "openai/tiny", "api_base": f"{sys.argv[1]}/v1", "api_key": "none"}
parameters = Weather.model_json_schema()
tools = [{"type": "function", "function": {"name": "get_weather", "parameters": parameters}}]
messages = [{"role": "user", "content": "the weather?"}]
read = {}

message = litellm.completion(messages=messages, tools=tools, **options).choices[0].message
call = message.tool_calls[0]
read["call"] = [call.function.name, json.loads(call.function.arguments)]
result = {"role": "tool", "tool_call_id": call.id, "name": "get_weather", "content": "sunny"}
answer = litellm.completion(messages=[*messages, message, result], tools=tools, **options)
read["told"] = answer.choices[0].message.content

chunks = list(litellm.completion(messages=messages, tools=tools, stream=True, **options))
built = litellm.stream_chunk_builder(chunks, messages=messages).choices[0]
read["streamed"] = [built.finish_reason, json.loads(built.message.tool_calls[0].function.arguments)]
forced = litellm.completion(messages=messages, tools=tools, tool_choice="required", **options)
read["required"] = json.loads(forced.choices[0].message.tool_calls[0].function.arguments)
answer = litellm.completion(messages=messages, response_format=Weather, **options)
read["parsed"] = json.loads(answer.choices[0].message.content)
print(json.dumps(read))
