"""File formats of other libraries: how each names and lays out the factors of an adapter.

    _base       the interface of a format: recognise, read and write a file, or say why that is
                impossible
    peft        the layout of the adapter folder itself, as PEFT 0.21 reads it; patterns: its
                regular expressions
    kohya, diffusers, gguf, vllm, dense     one file for each format; a new file registers itself
    parts, gguf_claims      names of the models of a pipeline; sizes that a GGUF file claims

In: tensors by key, and the fields beside them. Out: changes by module path, and back. A format
works with keys and shapes; its caller maps paths to modules of a model.
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

# first the two forms of an adapter folder, which ``adapter_files`` reads and writes
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
