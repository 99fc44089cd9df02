"""``attach`` and ``load``, and the handle that they return: a model, the name of an adapter on it,
and the functions of the package with both filled in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from veneer.attach import (
    METHODS,
    CallPlan,
    Change,
    LayerAdapter,
    Loss,
    MergeReport,
    Names,
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

#: an adapter's id on the Hugging Face hub, and the beginning of its page's address
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_HUB_PAGE = "https://huggingface.co/"


def _cover(model: nn.Module) -> None:
    # files take as long to import as the rest: not before use
    from veneer.adapter_files.trainers import cover

    cover(model)


def attach(
    model: nn.Module,
    config: LoraConfig | None = None,
    name: str = "default",
    *,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    original: nn.Module | Mapping[str, Tensor] | None = None,
) -> Handle:
    """Attach a new adapter to ``model``, in place, and freeze the base. Plain calls of the model
    use it while it is the only one.

    Args:
        model: any module with layers of a kind that Veneer knows.
        config: what to attach; None takes ``LoraConfig()``.
        name: letters, digits, "_" and "-".
        batches: what a data-driven variant (``eva``, ``lora_ga``) looks at: tensors, tuples of
            positional or mappings of keyword arguments of the model.
        loss: (model, batch) -> scalar, for ``lora_ga``; None takes the ``loss`` of the model's own
            output.
        original: the model (or its state dict) from before the base was quantised, for ``loftq``.

    Returns:
        a handle to the adapter. Every function of the package also works without it, given the
        model.

    Raises:
        TargetError: with every problem at once. The model is as it was.
        ConfigError: the variant needs data that was not given, or the other way round. The model is
            as it was.

    Warns:
        FreshWeights: parameters that the checkpoint did not hold (a new head) are not trained in
            full, so that the adapter will not hold them either. "all-linear" trains a new head.
    """
    model = unwrap(model)
    plans = plan(model, LoraConfig() if config is None else config, name)
    calibration = collect_calibration_data(
        model, plans, batches=batches, loss=loss, original=original
    )
    install_adapter(model, name, plans, calibration=calibration)
    _cover(model)
    names = Names(model)
    in_full = {
        id(names.modules[path]._parameters[parameter_name])
        for path, full in plans.full.items()
        for parameter_name in full
    }
    # a head that grew counts as fresh: the adapter holds its new rows, and the fingerprint tells of
    # the others
    in_full |= {
        id(weight_of(names.modules[entry.path], entry.weight))
        for entry in plans.low
        if entry.tokens
    }
    lost = [ref for key, ref in names.fresh_parameters().items() if key not in in_full]
    FreshWeights.warn(lost, "As the adapter is attached", stacklevel=3)
    return Handle(model, name)


def load(
    model: nn.Module, path: str | Path, name: str | None = None, *, trainable: bool = False,
    verify_base: bool = True, untie: bool | None = None, grow: bool = False,
    revision: str | None = None, cache_dir: str | Path | None = None,
) -> Handle:  # fmt: skip
    """Attach the adapter at ``path`` to ``model``: a folder, a remote place (``hf://owner/name``,
    ``s3://…``) or, where there is no such folder, an id on the Hugging Face hub (``owner/name``).

    Everything is verified before the model is touched: the files, every key and shape, and each
    parameter and lasting buffer of the base that the adapter does not replace, against the
    adapter's fingerprints. An adapter that another library wrote has none: it loads with an
    ``UnverifiedAdapter`` warning, as does one that proves less than all of this model.

    Args:
        name: the adapter's name on this model; None takes "default".
        trainable: train it further.
        verify_base: False accepts other base weights of the same shapes.
        untie: where the folder changes a tied weight under one of its names alone (PEFT adapts
            modules one by one), that name needs a weight of its own, until the last adapter is
            detached. None gives it one and warns; True does not warn; False unties nothing: a
            low-rank change of one name is an error then, and values trained in full stand in for
            the weight and cannot be merged.
        revision: a branch, a tag or a commit of the hub's repository; elsewhere the hash that a
            push returned. None takes the newest.
        cache_dir: where what is fetched is kept; None takes ``veneer/adapters`` in
            ``$XDG_CACHE_HOME`` or ``~/.cache``.
        grow: let the vocabulary of ``model`` grow first, where the adapter trains tokens that were
            added to its base (``resize_token_embeddings``). If loading fails, it is as it was.

    Raises:
        AdapterError: the folder is damaged, or does not fit the model.
        BaseMismatchError: a tensor of the base is another than that it was trained on.
        RemoteError: the remote place cannot be read; a revision or a cache of a folder.

    Warns:
        UnverifiedAdapter: see above.
        TieBroken: names of a tied weight have weights of their own now.
        TensorsLeftOut: the folder's config leaves out modules of which it holds tensors.
    """
    model, name = unwrap(model), name if name is not None else "default"
    folder = _local_folder(path, revision, None if cache_dir is None else Path(cache_dir))
    from veneer.adapter_files.save_load import install_from

    install_from(
        model, folder, name, trainable=trainable, verify_base=verify_base, untie=untie, grow=grow
    )
    _cover(model)
    return Handle(model, name)


def _local_folder(path: str | Path, revision: str | None, cache: Path | None) -> str | Path:
    """The folder of an adapter: ``path`` itself, or where the adapter of a remote place is now."""
    if not isinstance(path, str) or path.startswith(_HUB_PAGE) or Path(path).exists():
        remote = None
    elif "://" in path:
        remote = path
    else:
        remote = f"hf://{path}" if _HUB_ID.fullmatch(path) else None
    if remote is None:
        if revision is not None or cache is not None:
            problem = f"a revision or a cache_dir for the path {path}"
            raise RemoteError(problem, "a remote place, such as hf://owner/name", "leave them out")
        return path
    from veneer.store.remote import pull

    try:
        return pull(remote, revision=revision, cache=cache)
    except RemoteError as error:
        if remote == path:
            raise
        problem = f"no folder {path}, and no adapter {remote} ({error.problem})"
        do = "check the path or the id; for a private repository log in with `hf auth login`"
        expected = "an adapter folder, or an adapter's id on the Hugging Face hub"
        raise AdapterError(problem, expected, do) from error


@dataclass(frozen=True, repr=False)
class Handle:
    """One adapter of one model."""

    model: nn.Module
    name: str

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """The error for what a handle does not have: PEFT's methods, and those of the model."""
            do = METHODS.get(name)
            if name == "save_pretrained":
                do = (
                    "handle.save(folder), or model.save_pretrained(folder), which writes the"
                    " adapter too"
                )
            elif (
                do is None
                and not name.startswith("_")
                and hasattr(self.__dict__.get("model"), name)
            ):
                do = f"handle.model.{name}: the model is what runs and trains"
            if do is None:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            raise MethodError(
                f"handle.{name}", "an attribute of veneer.Handle, which stands for one adapter", do
            )

    def __repr__(self) -> str:
        """One line: the adapter, the class of its model, its variant and rank, and whether it is
        the model's default. It may have been detached."""
        attached = adapters_of(self.model)
        config = None if attached is None else attached.configs.get(self.name)
        if attached is None or config is None:
            state = "detached"
        else:
            default = ", default" if attached.default_name == self.name else ""
            merged = ", merged" if self.name in attached.chain else ""
            state = f"{config.variant}, rank {config.rank}{default}{merged}"
        return f"<Handle {self.name!r} of {base_class(self.model).__name__}: {state}>"

    @property
    def config(self) -> LoraConfig:
        return need_adapters(self.model, self.name).configs[self.name]

    @property
    def layers(self) -> dict[str, LayerAdapter]:
        """The adapter's parts, by the path of the module that they change."""
        need_adapters(self.model, self.name)
        return {path: layer for path, _, layer in adapters(self.model, self.name)}

    @property
    def changes(self) -> dict[str, Change]:
        """The low-rank changes, by the path of the weight that they change."""
        need_adapters(self.model, self.name)
        return {
            parameter_path(path, weight): change
            for path, _, weight, change in changes(self.model, self.name)
        }

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(path of the weight and name of the number, or path of what is trained in full;
        parameter)."""
        for path, change in self.changes.items():
            for name, parameter in change.named_parameters():
                yield f"{path}.{name}", parameter
        yielded: set[int] = set()  # tied parameters have one copy
        for path, layer in self.layers.items():
            for name, parameter in layer.full.named_parameters():
                if id(parameter) in yielded:
                    continue
                yielded.add(id(parameter))
                yield parameter_path(path, name), parameter

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def summary(self) -> Summary:
        return summarise(self.model, self.name)

    def plan(self, tokens: int, *, training: bool = True) -> CallPlan:
        """How the plain linear layers compute a call of this many tokens (batch × length), and what
        the cost model says of it: print it. ``with veneer.use(model, name, path=…)`` overrides the
        choice."""
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
        """Write the adapter as a folder. In several processes every rank must call this: see
        ``veneer.save``."""
        from veneer.adapter_files.save_load import save

        return save(
            self.model, path, name=self.name, base_name=base_name, provenance=provenance,
            overwrite=overwrite, alone=alone,
        )  # fmt: skip

    def detach(self, *, keep_merged: bool = False) -> None:
        detach(self.model, self.name, keep_merged=keep_merged)
