"""Resources of a training run or a service, planned from a config alone: nothing is downloaded,
loaded or computed.

count.py           one training step on the meta device: bytes held, operations, bytes moved
memory.py          bytes of weights, adapter and optimiser of any model, and a run's memory by use
hardware.py        published figures of devices, and the time that counted work takes on them
training_plan.py   a run on 1 … n devices by each strategy: memory, bytes sent, time, whether it
                   fits
serving.py         a service: memory and speed of a replica, and the number of replicas for a load
"""
