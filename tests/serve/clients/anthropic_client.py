"""The `anthropic` client: tools, with a stream and without, and the count of tokens."""

from __future__ import annotations

import json
import sys

import anthropic

client = anthropic.Anthropic(base_url=sys.argv[1], api_key="none")
schema = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
}
tools = [{"name": "get_weather", "description": "The weather.", "input_schema": schema}]
asked = {"role": "user", "content": "the weather?"}
options = {"model": "tiny", "max_tokens": 300, "tools": tools}
read = {}

message = client.messages.create(messages=[asked], **options)
call = next(block for block in message.content if block.type == "tool_use")
read["call"] = [message.stop_reason, call.name, call.input]
result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
turns = [
    asked,
    {"role": "assistant", "content": message.content},
    {"role": "user", "content": [result]},
]
read["told"] = client.messages.create(messages=turns, **options).content[0].text

with client.messages.stream(messages=[asked], **options) as stream:
    kinds = {event.type for event in stream}
    final = stream.get_final_message()
read["streamed"] = [final.stop_reason, final.content[-1].input, final.usage.output_tokens > 10]
read["kinds"] = sorted(kinds)
for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
    forced = client.messages.create(messages=[asked], tool_choice=choice, **options)
    read[choice["type"]] = forced.content[0].input
counted = client.messages.count_tokens(model="tiny", messages=[asked], tools=tools)
read["counted"] = counted.input_tokens == message.usage.input_tokens
try:
    client.messages.create(messages=[asked], **{**options, "model": "nobody"})
except anthropic.NotFoundError as error:
    read["refused"] = error.body["error"]["type"]
print(json.dumps(read))
