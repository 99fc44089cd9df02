"""Training and sampling as a service: `veneer serve --train FOLDER`, in the protocol of the
`tinker` SDK.

    a client ─ HTTP ─> journal on the disk ─ queue ─> trainer: runs of many clients in one batch of
    the base model
                                                ╰───> bank and engine: samples, from the weights of
                                                      a run

A run is one LoRA adapter that a client trains. The bank holds the adapters with which the engine
generates samples; a lease keeps an adapter in the bank's memory while it is used. The journal is
the table of requests on the disk (store.py).

Any number of clients send requests. The answer to an HTTP request is only an id, with which the
client asks for the result later. The requests of a run are computed in order. An accepted request
is in the journal before its client gets the id, so a server that was killed continues with the
requests that it has not answered.

Locks are numbered in the order in which a thread may take them. A thread that holds a lock takes
only locks with a higher number, so that no two threads can wait for each other:

    1  Catalogue._lock    while the adapter folder is read or changed; its holder may load adapters
    2  Bank._loading      while an adapter is loaded, also while the load waits for memory
    3  FairLock._next_in_line   one thread waits for the model lock (4)
    4  FairLock._lock     the model lock: a step of the engine, or a batch of the trainer
    5  Queue.wake         active runs and the futures of their answers; the training thread sleeps
                          on it
    6  ADAPTER_CHANGE_LOCK   while the model's layers are changed (``attach/layer/state.py``)
    7  Bank._changed      the bank's tables; a load sleeps on it while leases hold the bank's memory
    8  Engine._wake       the engine's queue; the engine sleeps on it
    9  Index.lock         while the SQLite file of the store is written
    10 Training._lock     heartbeats of sessions, last uses of adapters, download tokens
    11 Metrics._lock      which adapters have metrics with their own label

A load of an adapter may wait until leases release memory of the bank. Only the bank's loader and
the threads that change which adapters are served or pinned wait for a load. The engine, the
training thread, the thread that writes the journal and the event loop never wait for a load,
because the holders of the leases wait for these threads. A thread that computes with an adapter
therefore takes the lease on the adapter before it takes the model lock.
"""
