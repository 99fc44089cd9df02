"""Base models and their files: found, loaded, converted, read tensor by tensor.

    load            a causal language model and its tokenizer            encoders    one that embeds
    locate          where a base is: a folder, a .gguf file, a package, a hub id
    messages        transformers kept quiet, its errors explained
    gguf            a .gguf file as a folder that loads in seconds
    attention       attention as plain matrix products, for transformers' models
    meta            a model without its numbers, and what each tensor of a file is in it
    safetensors_dir a folder of safetensors, read tensor by tensor
    named_weights   the weights of a model by name, wherever they lie

In: what a user calls a base. Out: modules, or tensors by name. The one room below train/ and serve/ that imports
transformers, and only when it is called.
"""

from veneer.models.attention import use_products
from veneer.models.encoders import Encoder, is_causal, load_encoder, must_be_causal
from veneer.models.gguf import cache_dir
from veneer.models.load import (
    Base,
    Precision,
    context_length,
    load_base,
    load_tokenizer,
    pick_dtype,
    save_plain,
    stored_dtype,
)
from veneer.models.locate import folder_of
from veneer.models.messages import quiet
from veneer.models.meta import Place, filled, map_checkpoint_names, meta_model

__all__ = [
    "Base", "Encoder", "Place", "Precision", "cache_dir", "context_length", "filled", "folder_of", "is_causal",
    "load_base", "load_encoder", "load_tokenizer", "map_checkpoint_names", "meta_model", "must_be_causal", "pick_dtype",
    "quiet", "save_plain", "stored_dtype", "use_products",
]  # fmt: skip
