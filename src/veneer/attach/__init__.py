"""From (model, config) to adapted layers and back, in place, on any ``nn.Module``: plan, install,
select; then check, merge or detach. docs/overview.md draws the files.

In: a module and a ``LoraConfig``. Out: the same module, whose layers run on W + ΔW of the selected
adapter, and from ``detach`` the bit-identical one. Nothing here reads or writes files, nor knows a
format, a trainer or transformers.
"""
