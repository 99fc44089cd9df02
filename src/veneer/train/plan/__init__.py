"""What a run or a service takes, from a config alone: nothing is downloaded, loaded or computed.

count.py      a training step on the meta device: bytes that it holds, operations, bytes that it moves
memory.py     bytes of weights, adapter and optimiser, of any model; of a run, by what holds them
hardware.py   published numbers of devices, and the time that counted work takes on them
training.py   a run on 1 … n devices by each strategy: memory, bytes sent, time, what fits
serving.py    keys and values, adapters of a replica, replicas for a load
"""
