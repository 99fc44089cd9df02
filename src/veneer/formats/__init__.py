"""File formats of other libraries: the keys and shapes under which each stores A and B.

    _base                   the interface of a format: recognise, read and write a file
    peft, peft_*            PEFT's layout, which Veneer's adapter folder shares (as of PEFT 0.21)
    patterns                the regular expressions in PEFT's config
    kohya, diffusers, gguf, vllm, dense     one file for each format; a new file registers itself
    parts                   the prefixes that name the models of an image pipeline
    gguf_claims             the sizes that a GGUF file claims, checked before it is read
    vera_projections        the matrices that the layers of PEFT's VeRA share

A reader turns the tensors of a file into changes by module path; a writer does the reverse. A
format knows keys and shapes only; its caller maps the paths to the modules of a model.
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

# These two have no functions ``read`` and ``write``, because ``adapter_files`` handles the folders
# of Veneer and PEFT. The submodules that ``import_all`` imports register all other formats.
register(Format("veneer", "an adapter folder that proves what it is", "nothing that Veneer reads"))
_PEFT_LACKS = (
    "what PEFT would compute otherwise (the folder then says so); the parameters of variants that"
    " PEFT lacks"
)
register(Format("peft", "an adapter folder of PEFT", _PEFT_LACKS, peft=True))
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
