"""A stress program for one server that trains and serves: many clients, faults drawn from a seed,
invariants checked.

    python -m tests.stress --minutes 10 --seed 0

`findings.py`: the invariants, and what broke them. `server.py`: the process, its kills, its file
system. `training_clients.py`: clients of the training service. `api_clients.py`: clients of
OpenAI's API. `schedule.py`: kills, a full disk and adapters that are replaced, at times drawn from
the seed.
"""
