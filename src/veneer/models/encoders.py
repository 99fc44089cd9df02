"""Text encoders, which turn a text into one vector: recognise them by their configs, and load them
with the pooling that sentence-transformers recorded in their folders.

    is_causal("folder")         whether a base is a causal model, by its config
    load_encoder("folder")      Encoder(model, tokenizer, name, pooling, normal, length)

The pooling is read from files that sentence-transformers writes; the library itself is not needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from veneer.errors import ConfigError
from veneer.fileio.untrusted import parse
from veneer.models.load import Precision, context_length_of, load_head, tokenizer_at
from veneer.models.locate import config_of, find_base, folder_of
from veneer.models.messages import loading
from veneer.precision import at_least_float32

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Encoder(NamedTuple):
    """A loaded encoder, and how to compute one vector from its tokens.

    Fields:
        name: the user's name of the base.
        pooling: how the vectors of the tokens become one: their "mean", their "max", or the first
            of them ("cls").
        normal: whether the vector is divided by its 2-norm.
        length: the maximum number of tokens of a text.
        labels: the number of outputs of the classifier; 0 if none was loaded.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    pooling: str
    normal: bool
    length: int
    labels: int = 0


def is_causal(source: str | Path) -> bool:
    """Whether a base is a causal language model, by its config. ``ConfigError``: the config cannot
    be read, for the reasons that ``load_base`` gives."""
    return _describe_non_causal(str(source)) is None


def must_be_causal(source: str | Path) -> None:
    """Raise an error for a base that is not a causal language model. ``load_base`` would load it as
    one without an error. Only the config is read.

    Raises:
        ConfigError: the base is an encoder, in which positions attend to the tokens that they
            should predict, or its head is not that of a language model; or the config cannot be
            read.
    """
    reason = _describe_non_causal(str(source))
    if reason is not None:
        raise ConfigError(
            f"{source}, {reason}",
            "a causal language model",
            "choose a causal base; to train another kind of model, call veneer.attach on it in"
            " Python and train it with transformers' Trainer or a loop of your own",
        )


def _describe_non_causal(name: str) -> str | None:
    """The reason why the base ``name`` is not a causal language model, by its config, for an error
    text; None if it is one."""
    from transformers.models.auto import modeling_auto as auto
    from transformers.utils.hub import cached_file

    # sentence-transformers writes modules.json, the list of the model and its pooling
    folder_or_hub_id, options = find_base(name), {"_raise_exceptions_for_missing_entries": False}
    with loading(name):
        modules_file = cached_file(folder_or_hub_id, "modules.json", **options)
    if modules_file is not None:
        return "an encoder of sentence-transformers"
    config = config_of(name)
    class_names = getattr(config, "architectures", None) or ()
    registered_classes = [*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()]
    # this mapping also has the classes that the user has registered
    if type(config) in auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        classes: Any = auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        registered_classes += [
            cls.__name__ for cls in (classes if isinstance(classes, tuple) else (classes,))
        ]
    causal_classes = {
        class_name
        for names in registered_classes
        for class_name in ((names,) if isinstance(names, str) else names)
    }
    architecture = " or ".join(class_names) or f"a {config.model_type} model"
    if config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        config, "is_decoder", False
    ):
        structure = "an encoder and a decoder" if config.is_encoder_decoder else "an encoder"
        return (
            f"whose config names {architecture}, {structure}: each position sees the tokens that it"
            " should predict"
        )
    if class_names and not any(class_name in causal_classes for class_name in class_names):
        return f"whose config names {architecture}"
    return None


def is_scorer(source: str | Path) -> bool:
    """Whether a base is a sequence classifier with one label, by its config. Such a classifier's
    only logit is a score of a text or a pair of texts."""
    config = config_of(source)
    class_names = getattr(config, "architectures", None) or ()
    is_classifier = any(
        class_name.endswith("ForSequenceClassification") for class_name in class_names
    )
    return is_classifier and getattr(config, "num_labels", None) == 1


def load_encoder(
    source: str | Path,
    *,
    precision: Precision = "auto",
    device: str | None = None,
    with_head: bool = False,
    **base_options: Any,
) -> Encoder:
    """An encoder in eval mode, with the pooling in its sentence-transformers files. Without such
    files, a text's vector is the mean over its tokens, divided by its 2-norm.

    Args:
        precision, device: as for ``load_base``.
        with_head: load the base's classifier too, if it has one with a single label.
        base_options: further arguments of ``load_head``.

    Raises:
        ConfigError: the base cannot be loaded, for the reasons that ``load_base`` gives; or its
            sentence-transformers files name modules or a pooling that are not supported.
    """
    name = str(source)
    folder_or_hub_id = find_base(name)
    pooling, normal, max_length = _pooling(folder_of(name))
    has_scorer = with_head and is_scorer(source)
    auto_class = "AutoModelForSequenceClassification" if has_scorer else "AutoModel"
    model: Any = load_head(source, auto_class, precision=precision, device=device, **base_options)
    tokenizer = tokenizer_at(folder_or_hub_id, name)
    length_limits = (
        max_length,
        context_length_of(model.config),
        tokenizer.model_max_length,
    )
    length = min(int(limit) for limit in length_limits if limit)
    return Encoder(model, tokenizer, name, pooling, normal, length, int(has_scorer))


def pool(hidden: Tensor, mask: Tensor, pooling: str, normalize: bool) -> Tensor:
    """One vector for each row, [rows, width], from ``hidden``, the hidden states [rows, tokens,
    width]. The result is in float32, or in float64 if ``hidden`` is.

    Args:
        mask: [rows, tokens], 0 for padding.
        pooling: "mean", "cls" (the first token) or "max" over the tokens that are not padding.
        normalize: divide each vector by its 2-norm.
    """
    hidden, is_token = hidden.to(at_least_float32(hidden.dtype)), mask.bool()[..., None]
    if pooling == "cls":
        vectors = hidden[:, 0]
    elif pooling == "max":
        vectors = hidden.masked_fill(~is_token, float("-inf")).amax(1)
    else:
        vectors = (hidden * is_token).sum(1) / is_token.sum(1)
    return nn.functional.normalize(vectors, dim=-1) if normalize else vectors


def _pooling(folder: Path) -> tuple[str, bool, int | None]:
    """(pooling, whether to divide vectors by their 2-norm, maximum number of tokens or None), as
    the files of sentence-transformers in ``folder`` say. ("mean", True, None) without such files.

    Raises:
        ConfigError: a file is no JSON, or a module or the pooling is not supported.
    """

    def read_json(file: Path) -> Any:
        try:
            return parse(file.read_bytes()) if file.is_file() else {}
        except ValueError as error:
            raise ConfigError(
                f"{file}, which is no JSON ({error})", "JSON", "get it again"
            ) from error

    modules = read_json(folder / "modules.json")
    if not modules:
        return "mean", True, None
    path_of_type = {
        str(module["type"]).rpartition(".")[2]: folder / module["path"] for module in modules
    }
    unknown_types = sorted(path_of_type.keys() - {"Transformer", "Pooling", "Normalize"})
    config = read_json(path_of_type["Pooling"] / "config.json") if "Pooling" in path_of_type else {}
    pooling_of_key = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_max_tokens": "max",
    }
    # sentence-transformers 6 writes one name or a list of names; earlier versions write one flag
    # for each pooling
    poolings = config.get("pooling_mode") or [
        pooling_of_key.get(key, key)
        for key, value in config.items()
        if key.startswith("pooling_mode_") and value is True
    ]
    poolings = poolings if isinstance(poolings, list) else [poolings]
    if unknown_types or len(poolings) != 1 or poolings[0] not in ("mean", "cls", "max"):
        raise ConfigError(
            f"modules {sorted(path_of_type)} with pooling {poolings} in {folder}",
            "a transformer, one pooling of mean, cls or max, and Normalize",
            "use another",
        )
    max_length = read_json(folder / "sentence_bert_config.json").get("max_seq_length")
    return poolings[0], "Normalize" in path_of_type, max_length
