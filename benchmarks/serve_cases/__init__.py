"""The servers of cases/serving.py, and their clients.

place.py     a model, adapters and merged models on the disk; each token of the tokenizer is a word
client.py    many clients at once: when each token came
servers.py   a server as a process: started, warmed, its memory, stopped
peers.py     PEFT's mixed batches behind Veneer's own front
"""
