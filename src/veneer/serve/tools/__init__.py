"""Tool calls: parse the text that a model writes into calls for the server's APIs.

    template.py     whether a chat template shows tools and calls to the model
    deltas.py       the base class of the parsers, and the pieces of text and of calls (deltas) that
                    a parser returns
    json_calls.py   parsers of calls with JSON arguments: hermes, llama3_json, mistral, deepseek_v3
                    and deepseek_v31
    pythonic.py     parser of calls that are written in Python
    xml_calls.py    parser of calls in Qwen 3 Coder's notation
    forced.py       calls that a request demands by ``tool_choice``: the JSON schema to which the
                    answer is constrained, and the parsers of such an answer
    strict.py       the grammar of answers that may contain calls of strict tools, whose arguments
                    must follow the tool's schema
    choose.py       the parsers by the names that vLLM gives them, and detection of the parser from
                    a chat template

Complete answers and streamed answers go through the same parser, so they contain the same calls.
"""
