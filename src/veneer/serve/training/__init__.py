"""Training and sampling as a service: `veneer serve --train FOLDER`, in the protocol of the
`tinker` SDK.

    a client ─ HTTP ─> journal on the disk ─ queue ─> trainer: runs of many clients in one batch of
    the base
                                                ╰───> bank and engine: samples, from the weights of
                                                      a run

Any number of clients send requests and get promises of answers. The requests of a run are computed
in order. An accepted request is in the journal, a table on the disk (store.py), before its client
gets the promise, so a server that was killed continues where it stopped.

Locks are numbered in the order in which a thread may take them. A thread that holds a lock takes
only locks with a higher number:

    1  Catalogue._lock    while the adapter folder is read or changed; its holder may load adapters
    2  Bank._loading      while an adapter is loaded, also while the load waits for memory
    3  FairLock._next_in_line   one thread waits for the model lock (4)
    4  FairLock._lock     the model lock: a step of the engine, or a batch of the trainer
    5  Queue.wake         active runs and promises; the training thread sleeps on it
    6  ADAPTER_CHANGE_LOCK   while the model's layers are changed (``attach/layer/state.py``)
    7  Bank._changed      the bank's tables; a load sleeps on it while leases hold the bank's memory
    8  Engine._wake       the engine's queue; the engine sleeps on it
    9  Index.lock         while the index is written
    10 Training._lock     heartbeats of sessions, and last uses of checkpoints
    11 Metrics._lock      which adapters have metrics with their own label

A load of an adapter may wait until leases release memory of the bank. Only the bank's loader and
the threads that change which adapters are served or pinned wait for this. The engine, the training
thread, the thread that writes the journal and the event loop never do, because the holders of the
leases wait for them. A thread that computes with an adapter therefore takes the lease on the
adapter before it takes the model lock.
"""
