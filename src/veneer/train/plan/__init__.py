"""Resources of a training run or a service, planned from a config alone: nothing is downloaded,
loaded or computed.

count.py           counts one training step on torch's meta device: bytes held, operations, bytes
                   moved
memory.py          bytes of weights, adapter and optimiser of any model, and how many bytes a run
                   holds for each use (base, adapter, activations, …)
hardware.py        published figures of devices, and the time that counted work takes on them
training_plan.py   a run on 1 … n devices by each strategy (ddp, fsdp, tp): memory, bytes sent,
                   time, whether it fits
serving.py         a service: memory and speed of a replica, and the number of replicas for a load
"""
