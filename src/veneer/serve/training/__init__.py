"""Training and sampling as a service: `veneer serve --train FOLDER`, in the protocol of the
`tinker` SDK.

    a client ─ wire ─> journal, on the disk ─ queue ─> trainer: runs of many clients in one batch of
    the base
                                                   ╰────> bank and engine: samples, from the numbers
                                                   of a run

In: requests of any number of clients, each run's in its own order. Out: promises of answers. What
was accepted is on the disk before its promise is given, so that a server that was killed goes on
where it was.

Locks, in the order in which a thread may take them; who holds one takes only such as stand below
it:

    1  Catalogue._lock    the adapter folder is read or changed; adapters may be loaded meanwhile
    2  Bank._loading      an adapter is loaded, and memory for it waited for
    3  Turn._next         the turn at the model: a step of the engine, a batch of the trainer (``Turn``)
    4  Turn._now
    5  Queue.wake         lines and promises; the training thread sleeps here
    6  CHANGING           the model's layers are changed (``attach/layer/state.py``)
    7  Bank._changed      the bank's tables; a load sleeps here while leases hold its memory
    8  Engine._wake       the engine's queue; the engine sleeps here
    9  Store._lock        the index is written
    10 Training._lock     who was here, and what is used

Memory of the bank is waited for by its own loader and by threads of administrators: never by the
engine, the training thread, the journal's thread or the event loop, which those wait for that hold
the memory. So whoever computes with an adapter gets its lease before its turn.
"""
