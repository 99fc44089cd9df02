"""Other people's file formats: how each names and lays out the factors of an adapter.

    _base       the contract of a format: what recognises a file, reads it, writes it, or says why it cannot
    peft        the layout of the adapter folder itself, as PEFT 0.21 reads it; patterns: its regular expressions
    kohya, diffusers, gguf, vllm, dense     one file a format; a new one is one new file, found through the registry
    parts, gguf_claims      weights that a file splits or joins; sizes that a GGUF file claims

In: tensors by key, and the fields beside them. Out: changes by module path, and back. A format
knows keys and shapes; what a path means in a model is asked of whoever calls.
"""

from veneer.formats._base import (
    FORMATS,
    Adapter,
    BaseFacts,
    Contents,
    Format,
    LowRankChange,
    MisreadElsewhere,
    Options,
    register,
)
from veneer.formats.peft import PeftLayer
from veneer.registry import import_all

# the two forms of an adapter folder, which ``adapter_files`` reads and writes, before the others
register(Format("veneer", "an adapter folder that proves what it is", "nothing that Veneer reads"))
_NOT_PEFT = (
    "what PEFT would compute otherwise (the folder then says so); the parameters of variants that"
    " PEFT lacks"
)
register(Format("peft", "an adapter folder of PEFT", _NOT_PEFT, peft=True))
import_all(__name__, list(__path__))

__all__ = [
    "FORMATS",
    "Adapter",
    "BaseFacts",
    "Contents",
    "Format",
    "LowRankChange",
    "MisreadElsewhere",
    "Options",
    "PeftLayer",
    "register",
]
