"""``attach`` and ``load``, and the ``Handle`` that they return: a model and the name of an adapter
on it. Its methods call the package's functions of the same name with this model and adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from veneer.attach import (
    PEFT_METHODS,
    CallPlan,
    Change,
    LayerAdapter,
    Loss,
    MergeReport,
    ModelIndex,
    Summary,
    adapters,
    adapters_of,
    changes,
    collect_calibration_data,
    detach,
    install_adapter,
    merge,
    need_adapters,
    plan,
    summarise,
    unmerge,
    unwrap,
    use,
)
from veneer.bases import weight_of
from veneer.config import LoraConfig
from veneer.distributed import base_class
from veneer.errors import AdapterError, FreshWeights, MethodError, RemoteError
from veneer.layers import parameter_path

#: matches the id of a repository on the Hugging Face hub; the beginning of the hub's page addresses
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_HUB_PAGE = "https://huggingface.co/"


def attach(
    model: nn.Module,
    config: LoraConfig | None = None,
    name: str = "default",
    *,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    original: nn.Module | Mapping[str, Tensor] | None = None,
) -> Handle:
    """Attach a new adapter to ``model``, in place, and freeze the base. Calls of the model use the
    adapter while it is the only one.

    Args:
        model: any module with layers of a kind that Veneer supports.
        config: what to attach; None stands for ``LoraConfig()``.
        name: the adapter's name: letters, digits, "_" and "-".
        batches: the data that some variants (``eva``, ``lora_ga``) start from. Each batch is a
            tensor, a tuple of positional arguments or a mapping of keyword arguments of the model.
        loss: a function (model, batch) -> scalar, for ``lora_ga``. None stands for the ``loss`` of
            the model's output.
        original: the model (or its state dict) from before the base was quantised, for ``loftq``.

    Returns:
        a handle to the adapter. Every function of the package can also be called without it, with
        the model.

    Raises:
        TargetError: lists every problem at once. The model is not changed.
        ConfigError: data that the variant needs was not passed, or data was passed that the variant
            does not use. The model is not changed.

    Warns:
        FreshWeights: parameters that were not in the checkpoint (a new head) are not trained in
            full, so that the adapter will not hold them either. "all-linear" trains a new head.
    """
    # imported here, because ``adapter_files`` takes as long to import as the rest of the package
    from veneer.adapter_files.trainers import patch_model

    model = unwrap(model)
    plans = plan(model, LoraConfig() if config is None else config, name)
    calibration = collect_calibration_data(
        model, plans, batches=batches, loss=loss, original=original
    )
    install_adapter(model, name, plans, calibration=calibration)
    patch_model(model)
    model_index = ModelIndex(model)
    adapter_parameter_ids = {
        id(model_index.modules[path]._parameters[parameter_name])
        for path, parameter_names in plans.full.items()
        for parameter_name in parameter_names
    }
    # ``fresh_parameters`` also returns an output head that grew with the vocabulary. It needs no
    # warning: the adapter holds its new rows, and its fingerprint shows at loading whether the
    # other rows differ.
    adapter_parameter_ids |= {
        id(weight_of(model_index.modules[weight_plan.path], weight_plan.weight))
        for weight_plan in plans.low_rank_plans
        if weight_plan.tokens
    }
    untrained_names = [
        ref
        for key, ref in model_index.fresh_parameters().items()
        if key not in adapter_parameter_ids
    ]
    FreshWeights.warn(untrained_names, "As the adapter is attached", stacklevel=3)
    return Handle(model, name)


def load(
    model: nn.Module,
    path: str | Path,
    name: str | None = None,
    *,
    trainable: bool = False,
    verify_base: bool = True,
    untie: bool | None = None,
    grow: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> Handle:
    """Attach the adapter at ``path`` to ``model``. The path is a folder, a remote address
    (``hf://owner/name``, ``s3://…``) or, if there is no such folder, an id on the Hugging Face hub
    (``owner/name``).

    Everything is verified before the model is changed: the files, every key and shape, and the base
    against the adapter's fingerprints. Each parameter and persistent buffer that the adapter does
    not replace must match its fingerprint. An adapter that another library wrote has no
    fingerprints, so it loads with an ``UnverifiedAdapter`` warning. So does an adapter whose
    fingerprints do not cover all of this model.

    Args:
        name: the adapter's name on this model; None stands for "default".
        trainable: whether the adapter's parameters require gradients, to train it further.
        verify_base: False accepts other base weights of the same shapes.
        untie: what to do if the folder changes a tied weight under only one of its names, as
            folders of PEFT may, because PEFT adapts modules one by one. That name then needs a new
            parameter, until the last adapter is detached. None creates the parameter and warns;
            True creates it without a warning. False unties nothing: then a low-rank change of one
            name is an error, and values that are trained in full replace the weight at that name
            and cannot be merged.
        revision: a branch, a tag or a commit of the hub's repository; for other remote addresses
            the hash that a push returned. None takes the newest.
        cache_dir: the folder in which downloaded files are kept. None stands for
            ``veneer/adapters`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
        grow: whether to grow the vocabulary of ``model`` first (``resize_token_embeddings``), if
            the adapter trains tokens that were added to its base. If loading fails, the growth is
            undone.

    Raises:
        AdapterError: the folder is damaged, or does not fit the model.
        BaseMismatchError: a tensor of the base differs from the one that the adapter was trained
            on.
        RemoteError: the remote address cannot be read; or ``revision`` or ``cache_dir`` was passed
            for a local folder.

    Warns:
        UnverifiedAdapter: the fingerprints do not prove all of the base.
        TieBroken: names of a tied weight have separate parameters now.
        TensorsLeftOut: the folder's config leaves out modules of which it holds tensors.
    """
    from veneer.adapter_files.save_load import install_from
    from veneer.adapter_files.trainers import patch_model

    model, name = unwrap(model), name if name is not None else "default"
    adapter_folder = _local_folder(path, revision, None if cache_dir is None else Path(cache_dir))
    install_from(
        model,
        adapter_folder,
        name,
        trainable=trainable,
        verify_base=verify_base,
        untie=untie,
        grow=grow,
    )
    patch_model(model)
    return Handle(model, name)


def _local_folder(path: str | Path, revision: str | None, cache_folder: Path | None) -> str | Path:
    """The local folder of an adapter: ``path`` itself, or the folder to which this function
    downloads the adapter at a remote address. The arguments and errors are those of ``load``."""
    if not isinstance(path, str) or path.startswith(_HUB_PAGE) or Path(path).exists():
        remote_address = None
    elif "://" in path:
        remote_address = path
    else:
        remote_address = f"hf://{path}" if _HUB_ID.fullmatch(path) else None
    if remote_address is None:
        if revision is not None or cache_folder is not None:
            raise RemoteError(
                f"a revision or a cache_dir for the path {path}",
                "a remote place, such as hf://owner/name",
                "leave them out",
            )
        return path
    from veneer.store.remote import pull

    try:
        return pull(remote_address, revision=revision, cache=cache_folder)
    except RemoteError as error:
        if remote_address == path:
            raise
        raise AdapterError(
            f"no folder {path}, and no adapter {remote_address} ({error.problem})",
            "an adapter folder, or an adapter's id on the Hugging Face hub",
            "check the path or the id; for a private repository log in with `hf auth login`",
        ) from error


@dataclass(frozen=True, repr=False)
class Handle:
    """One adapter of one model, as ``attach`` and ``load`` return it. ``name``: the adapter's."""

    model: nn.Module
    name: str

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Raise MethodError, which says what to use instead, for the name of a method of PEFT
            or of an attribute of the model; AttributeError for any other name."""
            advice = PEFT_METHODS.get(name)
            if name == "save_pretrained":
                advice = (
                    "handle.save(folder), or model.save_pretrained(folder), which writes the"
                    " adapter too"
                )
            elif (
                advice is None
                and not name.startswith("_")
                and hasattr(self.__dict__.get("model"), name)
            ):
                advice = f"handle.model.{name}: the model is what runs and trains"
            if advice is None:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            raise MethodError(
                f"handle.{name}",
                "an attribute of veneer.Handle, which stands for one adapter",
                advice,
            )

    def __repr__(self) -> str:
        """One line: the adapter, the class of its model, its variant and rank, and whether it is
        the model's default or merged; or "detached"."""
        model_adapters = adapters_of(self.model)
        config = None if model_adapters is None else model_adapters.configs.get(self.name)
        if model_adapters is None or config is None:
            status_text = "detached"
        else:
            default_text = ", default" if model_adapters.default_name == self.name else ""
            merged_text = ", merged" if self.name in model_adapters.merge_order else ""
            status_text = f"{config.variant}, rank {config.rank}{default_text}{merged_text}"
        return f"<Handle {self.name!r} of {base_class(self.model).__name__}: {status_text}>"

    @property
    def config(self) -> LoraConfig:
        return need_adapters(self.model, self.name).configs[self.name]

    @property
    def layers(self) -> dict[str, LayerAdapter]:
        """The ``LayerAdapter`` of each layer that the adapter changes, by the path of the layer."""
        need_adapters(self.model, self.name)
        return {path: layer_adapter for path, _, layer_adapter in adapters(self.model, self.name)}

    @property
    def changes(self) -> dict[str, Change]:
        """The low-rank changes, by the path of the weight that they change."""
        need_adapters(self.model, self.name)
        return {
            parameter_path(path, weight): change
            for path, _, weight, change in changes(self.model, self.name)
        }

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (path, parameter). The path of a low-rank parameter is the path of the changed
        weight, a dot and the parameter's name, such as "q_proj.weight.A". The path of a parameter
        that is trained in full is its path in the model."""
        for path, change in self.changes.items():
            for name, parameter in change.named_parameters():
                yield f"{path}.{name}", parameter
        yielded_ids: set[int] = set()  # tied parameters share one trained copy: yield it once
        for path, layer_adapter in self.layers.items():
            for name, parameter in layer_adapter.full.named_parameters():
                if id(parameter) in yielded_ids:
                    continue
                yielded_ids.add(id(parameter))
                yield parameter_path(path, name), parameter

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def summary(self) -> Summary:
        return summarise(self.model, self.name)

    def plan(self, tokens: int, *, training: bool = True) -> CallPlan:
        """The form in which the plain linear layers compute a call of ``tokens`` (batch × length)
        tokens, and the estimated costs of both forms: factored, W x + B A x, or materialised,
        (W + B A) x. Print the result to read it. ``with veneer.use(model, name, path=…)`` forces
        one form."""
        return CallPlan.of(self.model, self.name, tokens, training)

    def use(self):
        return use(self.model, self.name)

    def merge(
        self,
        *,
        keep: bool = True,
        rounding: str = "auto",
        inputs: Mapping[str, Tensor] | None = None,
    ) -> MergeReport:
        return merge(self.model, self.name, keep=keep, rounding=rounding, inputs=inputs)

    def unmerge(self) -> None:
        unmerge(self.model, self.name)

    def save(
        self,
        path: str | Path,
        *,
        base_name: str | None = None,
        provenance: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        alone: bool = False,
    ) -> Path:
        """Write the adapter to the folder ``path``, and return the path. If several processes hold
        the model, every rank must call this method. The arguments are those of ``veneer.save``."""
        from veneer.adapter_files.save_load import save

        return save(
            self.model,
            path,
            name=self.name,
            base_name=base_name,
            provenance=provenance,
            overwrite=overwrite,
            alone=alone,
        )

    def detach(self, *, keep_merged: bool = False) -> None:
        detach(self.model, self.name, keep_merged=keep_merged)
