"""What `benchmarks/serve.py` is made of.

place.py     a model, adapters and merged models on the disk, with a tokenizer in which each token is a word
client.py    many clients at once: when each token came
servers.py   a server as a process: started, warmed, its memory, stopped
peers.py     PEFT's mixed batches, and merged models that take turns, behind Veneer's own front
against.py   the rate of each candidate: 32 clients over 8 adapters
cold.py      does loading one adapter slow the rows of others
vanish.py    what clients that go away leave behind
"""
