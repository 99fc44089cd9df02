"""Call a causal language model of transformers on a KV cache of many sequences, to generate text in
training, in evaluation and in the server.

    slots.py, row_memory.py   the KV cache: each sequence is a row, in one of several size classes
    attention.py              the attention of one call over these rows
    forward.py                the calls of the model: prompts, one token of each row, or both
    continuations.py          the loop that generates in training and evaluation; that of the server
                              is in serve/

These files import transformers, so ``veneer.models`` does not import them.
"""
