"""Training and sampling as a service: `veneer serve --train FOLDER`, in the protocol of the
`tinker` SDK.

    a client ─ wire ─> journal, on the disk ─ queue ─> trainer: runs of many clients in one batch of
    the base
                                                   ╰────> bank and engine: samples, from the weights
                                                   of a run

In: requests of any number of clients, each run's in its own order. Out: promises of answers. An
accepted request is on the disk before its client gets the promise, so a killed server continues
where it stopped.

Locks, in the order in which a thread may take them. A thread that holds one takes only locks below
it:

    1  Catalogue._lock    the adapter folder is read or changed; adapters may be loaded meanwhile
    2  Bank._loading      an adapter is loaded, after waiting for memory
    3  Turn._next         the turn at the model: a step of the engine, a batch of the trainer
                          (``Turn``)
    4  Turn._now
    5  Queue.wake         lines and promises; the training thread sleeps here
    6  CHANGING           the model's layers are changed (``attach/layer/state.py``)
    7  Bank._changed      the bank's tables; a load sleeps here while leases hold its memory
    8  Engine._wake       the engine's queue; the engine sleeps here
    9  Index.lock         the index is written
    10 Training._lock     heartbeats of sessions, and last uses of checkpoints
    11 Metrics._lock      which adapters have series of their own

Only the bank's loader and threads of administrators wait for memory of the bank. The engine, the
training thread, the journal's thread and the event loop never do, because the holders of that
memory wait for them. A thread that computes with an adapter therefore takes its lease before its
turn at the model.
"""
