"""Base models and their files: found, loaded, converted, read tensor by tensor.

In: what a user calls a base. Out: modules, or tensors by name. The one room below train/ and serve/
that imports transformers, and only when it is called.
"""

from veneer.models.attention import use_products
from veneer.models.encoders import Encoder, is_causal, load_encoder, must_be_causal
from veneer.models.gguf import cache_dir
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
from veneer.models.meta import Place, filled, map_checkpoint_names, meta_model
from veneer.models.remote_code import trust_remote_code

__all__ = [
    "Base", "Encoder", "Place", "Precision", "cache_dir", "context_length", "filled", "folder_of", "is_causal",
    "load_base", "load_encoder", "load_head", "load_tokenizer", "map_checkpoint_names", "meta_model", "must_be_causal",
    "pick_dtype", "quiet", "save_plain", "stored_dtype", "trust_remote_code",
    "use_products",
]  # fmt: skip
