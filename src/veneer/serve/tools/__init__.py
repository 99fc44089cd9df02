"""Tool calls: from the text that a model writes to calls in an API's form.

    template.py     which tools and calls a chat template shows to the model
    deltas.py       text and calls as they become certain; the base of all parsers
    json_calls.py   hermes, llama3_json, mistral, deepseek_v3, deepseek_v31
    pythonic.py xml_calls.py   calls in Python's form, and in Qwen 3 Coder's
    forced.py       calls that a request demands: the schema of the answer, and its parsers
    strict.py       calls of strict tools that a model may write or not: the grammar of the answer
    choose.py       parsers by vLLM's names, and the one that a template means

An answer that is sent whole and one that is streamed go through the same parser.
"""
