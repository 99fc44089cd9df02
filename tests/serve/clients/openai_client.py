"""The `openai` client: chats, responses, tools, parse. argv[1] is the server's address; the last line
of the output is what it read, as JSON."""

from __future__ import annotations

import json
import sys

import openai
from pydantic import BaseModel


class Weather(BaseModel):
    city: str
    days: int


client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none")
chats, responses = client.chat.completions, client.responses
tool = openai.pydantic_function_tool(Weather, name="get_weather", description="The weather.")
asked = {"role": "user", "content": "the weather?"}
read = {}

message = chats.create(model="tiny", messages=[asked], tools=[tool]).choices[0].message
call = message.tool_calls[0]
read["call"] = [call.function.name, json.loads(call.function.arguments)]
result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
answer = chats.create(model="tiny", messages=[asked, message, result], tools=[tool])
read["told"] = answer.choices[0].message.content

with chats.stream(model="tiny", messages=[asked], tools=[tool]) as stream:
    kinds = {event.type for event in stream}
    streamed = stream.get_final_completion().choices[0]
read["streamed"] = [
    streamed.finish_reason,
    streamed.message.tool_calls[0].function.parsed_arguments.city,
]
read["kinds"] = sorted(kind for kind in kinds if kind.startswith("tool_calls"))

for name, choice in (
    ("required", "required"),
    ("named", {"type": "function", "function": {"name": "get_weather"}}),
):
    forced = chats.create(model="tiny", messages=[asked], tools=[tool], tool_choice=choice)
    read[name] = json.loads(forced.choices[0].message.tool_calls[0].function.arguments)
parsed = chats.parse(model="tiny", messages=[asked], response_format=Weather)
read["parsed"] = parsed.choices[0].message.parsed.model_dump()

flat = openai.pydantic_function_tool(Weather)["function"]
flat = {"type": "function", "name": "get_weather", "parameters": flat["parameters"], "strict": True}
answer = responses.create(model="tiny", input="the weather?", tools=[flat])
called = next(entry for entry in answer.output if entry.type == "function_call")
read["response call"] = [called.name, json.loads(called.arguments)]
sent = [
    asked,
    *answer.output,
    {"type": "function_call_output", "call_id": called.call_id, "output": "sunny"},
]
read["response"] = responses.create(model="tiny", input=sent, tools=[flat]).output_text
read["response parsed"] = responses.parse(
    model="tiny", input="the weather?", text_format=Weather
).output_parsed.model_dump()
with responses.stream(model="tiny", input="the weather?", tools=[flat]) as stream:
    kinds = [event.type for event in stream]
    final = stream.get_final_response()
read["response stream"] = [kinds[0], kinds[-1], final.output[-1].name]
print(json.dumps(read))
