"""`instructor` in its default mode, which forces a call, alone and as a stream of partial answers."""

from __future__ import annotations

import json
import sys

import instructor
import openai
from pydantic import BaseModel


class Weather(BaseModel):
    city: str
    days: int


client = instructor.from_openai(openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none"))
asked = {"model": "tiny", "messages": [{"role": "user", "content": "the weather?"}]}
read = {"created": client.chat.completions.create(response_model=Weather, **asked).model_dump()}
partials = list(client.chat.completions.create_partial(response_model=Weather, **asked))
read["partial"] = partials[-1].model_dump()
print(json.dumps(read))
