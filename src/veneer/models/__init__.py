"""Base models and their files: locate, load, convert, and read tensor by tensor.

The input is the name of a base as the user gives it; the output is a module, or tensors by name.
Except for train/ and serve/, only this package imports transformers. It does so inside functions,
so that importing veneer stays fast. decode/ imports transformers at the top of its files, and is
itself imported when a model is called.
"""

from veneer.models.attention import use_products
from veneer.models.encoders import Encoder, is_causal, load_encoder, must_be_causal
from veneer.models.gguf_conversion import cache_dir
from veneer.models.load import (
    Base,
    Precision,
    context_length,
    load_base,
    load_head,
    load_tokenizer,
    pick_dtype,
    save_plain,
    stored_dtype,
)
from veneer.models.locate import folder_of
from veneer.models.messages import quiet
from veneer.models.meta import ParamSlice, map_checkpoint_names, materialize_meta, meta_model
from veneer.models.remote_code import trust_remote_code

__all__ = [
    "Base",
    "Encoder",
    "ParamSlice",
    "Precision",
    "cache_dir",
    "context_length",
    "folder_of",
    "is_causal",
    "load_base",
    "load_encoder",
    "load_head",
    "load_tokenizer",
    "map_checkpoint_names",
    "materialize_meta",
    "meta_model",
    "must_be_causal",
    "pick_dtype",
    "quiet",
    "save_plain",
    "stored_dtype",
    "trust_remote_code",
    "use_products",
]
