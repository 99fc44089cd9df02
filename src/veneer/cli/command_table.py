"""The commands of `veneer`, with their descriptions in `veneer --help`."""

from __future__ import annotations

#: command -> its description in `veneer --help`. The command runs the function <command>_command of
#: the Python module veneer.cli.<command>, or of veneer.cli.<MODULES[command]> if it is in MODULES.
COMMANDS = {
    "train": "Fine-tune a base model with an adapter.",
    "sweep": "Train many settings of a run at once, and keep the best.",
    "advise": "Advise rank and rate to start a run from, each with its source.",
    "plan": "Predict memory, time and devices of a run or a service, from a config alone.",
    "eval": "Measure a model on data, with and without an adapter.",
    "generate": "Write text with a base, an adapter, or both side by side.",
    "chat": "Talk to a base and its adapters, and switch between them.",
    "merge": "Write base and adapter as one plain model.",
    "convert": "Write an adapter in another format: PEFT, kohya, diffusers, GGUF, dense.",
    "inspect": "Show what an adapter is and prove that it is intact.",
    "compose": "Write the sum, or a mixture, of adapters as one.",
    "diff": "Show where two adapters differ.",
    "list": "List the adapters of a library.",
    "add": "Put an adapter into a library.",
    "rm": "Take adapters out of a library.",
    "tag": "Tag an adapter of a library.",
    "gc": "Delete what a library no longer needs, or mend its index.",
    "push": "Put an adapter at a remote place.",
    "pull": "Fetch an adapter from a remote place.",
    "verify": "Check everything about an adapter, and that it was made for a base.",
    "serve": "Serve a base and its adapters: OpenAI's API, and a page.",
    "keygen": "Make an API key for `veneer serve`.",
    "extract": "Write the adapter that best approximates a full fine-tune.",
}
#: command -> the file in veneer/cli (without .py) that defines it, if the two names differ
MODULES = {
    **dict.fromkeys(("list", "add", "rm", "tag", "gc", "push", "pull"), "library"),
    "keygen": "serve",
}
