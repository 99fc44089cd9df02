"""Tool calls: parse the text that a model writes into calls for the server's APIs.

    template.py     whether a chat template shows tools and calls to the model
    deltas.py       pieces of text and calls, emitted as soon as they are certain; the base class of
                    the parsers
    json_calls.py   parsers hermes, llama3_json, mistral, deepseek_v3, deepseek_v31
    pythonic.py     parser of calls that are written in Python
    xml_calls.py    parser of calls in Qwen 3 Coder's notation
    forced.py       calls that a request demands: the schema of the answer, and its parsers
    strict.py       the grammar of answers that may contain calls of strict tools, whose arguments
                    must follow the tool's schema
    choose.py       parsers by vLLM's names, and detection of the parser from a chat template

A complete answer and a streamed answer go through the same parser.
"""
