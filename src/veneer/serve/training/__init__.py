"""Training and sampling as a service: `veneer serve --train FOLDER`, in the protocol of the `tinker` SDK.

    a client  ─ wire ─>  journal, on the disk  ─ queue ─>  trainer: runs of many clients in one batch of the base
                                                   ╰────>  bank and engine: samples, from the numbers of a run

In: requests of any number of clients, each run's in its own order. Out: promises of answers. What was accepted is on
the disk before its promise is given, so that a server that was killed goes on where it was.
"""
