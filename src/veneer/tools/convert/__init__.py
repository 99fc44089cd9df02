"""Adapters from one format to another: ``veneer``, ``peft``, ``kohya``, ``diffusers``, ``gguf``,
``dense``.

    source --read--> an adapter folder in PEFT's layout --write--> out

What a format cannot hold is an error that names every reason; what does not change an output and
has no place there is told in the report. To ``peft``, ``kohya`` and ``diffusers`` factors keep
their bits; where a format has another rule for the scale, alpha changes and the product stays.
``veneer`` is the folder with fingerprints of its base, so it asks for the base itself. All of
``gguf`` and the reading of ``kohya`` ask for the names of its weights, and ``dense`` for the
weights where the change depends on them.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter_files import UnverifiedAdapter, folder, install_from, save
from veneer.adapter_files.base_proof import earlier_fingerprints, fingerprints_of
from veneer.adapter_files.derived_folder import write_derived
from veneer.adapter_files.folder import AdapterFiles
from veneer.adapter_files.peft_deviations import deviations
from veneer.adapter_files.peft_mapping import means_parameter, ref_at
from veneer.attach.install import detach
from veneer.attach.lookup import parameter_path
from veneer.attach.refusals import kind_for
from veneer.attach.targets import Names
from veneer.config import LoraConfig
from veneer.errors import AdapterError, BaseMismatchError, ConfigError, listing, raise_all, sentence
from veneer.fileio.atomic import must_not_exist, new_file
from veneer.fileio.hashing import kind_in, prints_in
from veneer.fileio.untrusted import Header, read_header, read_json
from veneer.formats import (
    FORMATS,
    Adapter,
    BaseFacts,
    Contents,
    Format,
    LowRankChange,
    MisreadElsewhere,
    Options,
    peft,
    peft_behaviour,
    peft_fields,
    peft_paths,
    peft_tuners,
)
from veneer.formats._base import cast, kind_of_change, read_tensors
from veneer.formats.parts import PARTS
from veneer.models.base_weights import list_weights
from veneer.tools.convert import deltas
from veneer.tools.convert.base_info import BaseInfo, open_base
from veneer.tools.convert.token_changes import head_apart, need_rows, own_prints, with_tokens
from veneer.tools.report_text import rank_range

__all__ = ["FORMATS", "Conversion", "MisreadElsewhere", "conversion", "convert", "detect"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Conversion:
    """What was converted."""

    path: Path  # what was written
    source: str  # the format that was read
    to: str
    ranks: Mapping[str, int]  # of each weight that changes, by its name
    full: tuple[str, ...]  # parameters that are trained in full
    left_out: tuple[str, ...]  # what the source had and the result has not, with the reason
    # of a dense change that was made a product, ‖ΔW - product‖ / ‖ΔW‖ by its name
    errors: Mapping[str, float]

    def __str__(self) -> str:
        lines = [
            f"{self.source} to {self.to}: {len(self.ranks)} layers,"
            f" {rank_range(self.ranks.values())}"
        ]
        lines += [f"in full: {listing(self.full)}"] if self.full else []
        if self.errors:
            worst = max(self.errors, key=self.errors.__getitem__)
            lines.append(f"relative error of a product {self.errors[worst]:.2g} at most ({worst})")
        lines += [f"left out: {reason}" for reason in self.left_out]
        return "\n".join([*lines, f"written to {self.path}"])


def convert(source: str | Path, out: str | Path, **options: Any) -> Path:
    """``conversion`` for those who want the path alone."""
    return conversion(source, out, **options).path


def conversion(
    source: str | Path,
    out: str | Path,
    *,
    to: str,
    base: nn.Module | str | Path | None = None,
    dtype: str | None = None,
    part: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    whole: bool = False,
    overwrite: bool = False,
    verify_base: bool = True,
) -> Conversion:
    """Write the adapter ``source``, whatever it is, as ``out`` in the format ``to``.

    Args:
        source: an adapter folder or file; what it holds tells what it is (``detect``).
        to: "veneer", "peft", "kohya", "diffusers", "gguf" or "dense".
        base: the model (for names and shapes it may be on the meta device), or what
            ``models.load_base`` takes; for names also the folder of a diffusers pipeline. It is not
            changed.
        dtype: "fp32", "bf16" or "fp16" for the numbers in ``out``; None keeps them as they are, but
            for "veneer", which holds 16-bit factors in float32, as it trains them.
        part: the model of an image pipeline that the adapter is of, where paths do not say it:
            "unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", or "model"
            for names of LyCORIS.
        rank, energy, whole: what a dense change becomes: a product of this rank, or of the least
            one that keeps this share of ‖ΔW‖² (neither: the least one that is off by at most 1e-6 ·
            ‖ΔW‖), or a parameter trained in full.
        verify_base: refuse a base with other weights than those that the adapter's fingerprints
            tell.

    Warns:
        MisreadElsewhere: ``out`` is right, and a common reader of its format reads another adapter
            in it.
        UnverifiedAdapter: without the model, nobody can tell whether PEFT applies its changes as
            those of weights.

    Raises:
        AdapterError: the source cannot be read, or ``to`` cannot hold it (with every reason).
            Nothing was written.
        BaseMismatchError: it was made for another base.
        ConfigError: no such format, type, part or base.
        OutputExistsError: ``out`` exists and ``overwrite`` is False.
    """
    source, out = Path(source), Path(out)
    format_, from_ = FORMATS[to], detect(source)
    options = _options(dtype, part, rank, energy, whole, from_, to)
    must_not_exist(out, overwrite, folder=to == "veneer" or format_.write is None)
    base_info = open_base(base)
    tuner = _tuner(source) if from_ == "peft" else None
    if from_ == to and tuner is None:
        problem = f"{source}, which is of the format {to!r} already"
        raise AdapterError(problem, "another format", "copy it, or choose another format")
    if to == "veneer" and base_info.module is None:
        problem = "no base, whose fingerprints the folder is to hold"
        raise AdapterError(
            problem, "the base that the adapter was made for", 'give base, or choose "peft"'
        )
    with tempfile.TemporaryDirectory() as scratch:
        made, contents, errors = _as_folder(
            source, from_, Path(scratch) / "adapter", base_info, options, verify_base
        )
        left_out = [*contents.left_out, *_lost(made, to)]
        _refuse(made, from_, format_, base_info)
        if made.tuner is not None and to == "peft":
            made = folder.read(write_derived(Path(scratch) / "plain", [made], made.low, made.full))
        on_model = partial(_on_model, base_info, made, verify_base, not FORMATS[from_].peft)
        if to == "veneer":
            provenance = {
                "converted from": from_,
                **contents.about,
                **made.metadata.get("provenance", {}),
            }
            name = made.peft_config.get("base_model_name_or_path") or base_info.facts.name
            with on_model() as model:
                save(
                    model,
                    out,
                    name=deltas.NAME,
                    base_name=name,
                    provenance=provenance,
                    overwrite=overwrite,
                )
            # on a base, some are of another rank
            changes = _changes(folder.read(out), base_info.facts)
        elif format_.write is None:  # peft
            changes = _changes(made, base_info.facts)
            tensors, _ = read_tensors(made.path / peft.TENSORS)
            folder.write(
                out, {key: cast(tensor, options.dtype) for key, tensor in tensors.items()}, made.peft_config, base=None,
                changes=None, config=made.config, provenance={}, overwrite=overwrite, parameters={},
            )  # fmt: skip
        else:
            need_rows(made, to, base_info.facts)
            adapter = _adapter(made, to, _changes(made, base_info.facts), base_info, on_model)
            changes = adapter.changes
            with new_file(out, overwrite=overwrite) as file:
                left_out += format_.write(adapter, file, base_info.facts, options)
    ranks = {parameter_path(at, "weight"): len(tokens.ids) for at, tokens in made.tokens.items()}
    ranks |= {change.weight: change.layer.rank for change in changes}
    full = tuple(parameter_path(at, name) for at, tensors in made.full.items() for name in tensors)
    return Conversion(
        out, from_ if tuner is None else f"peft ({tuner})", to, ranks, full, tuple(left_out), errors
    )


@contextmanager
def _on_model(
    base: BaseInfo, saved: AdapterFiles, verify_base: bool, of_weights: bool
) -> Iterator[nn.Module]:
    """The base with the adapter on it, without the warning that another library wrote that."""
    assert base.module is not None
    model = base.module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnverifiedAdapter)
        install_from(
            model,
            saved.path,
            deltas.NAME,
            trainable=False,
            verify_base=verify_base,
            of_weights=of_weights,
            untie=False,
        )
    try:
        yield model
    finally:
        detach(model, deltas.NAME)


def _options(
    dtype: str | None,
    part: str | None,
    rank: int | None,
    energy: float | None,
    whole: bool,
    from_: str,
    to: str,
) -> Options:
    """The options, where the two formats have a use for them."""
    known = [name for name in FORMATS.names() if FORMATS[name].parts]
    bad_dtype, bad_part = (
        dtype is not None and dtype not in DTYPES,
        part is not None and part not in PARTS,
    )
    useless_part, typed = (
        part is not None and not {from_, to} & set(known),
        dtype is not None and to == "veneer",
    )
    dense = from_ == "dense" or (rank is None and energy is None and not whole)
    holds = f"dtype {dtype!r} for a veneer folder, which holds the numbers as they train"
    factors = f"rank, energy or whole for a {from_} adapter"
    checks = [
        (bad_dtype, f"dtype {dtype!r}", f"one of {', '.join(DTYPES)}", "choose one"),
        (bad_part, f"part {part!r}", f"one of {', '.join(PARTS)}", "choose one"),
        (
            useless_part,
            f"a part, from {from_} to {to}",
            f"one for {listing(known)} alone",
            "leave it out",
        ),
        (typed, holds, "none", 'leave it out, or choose "peft"'),
        (not dense, factors, "them for dense changes alone", "leave them out"),
    ]
    problems = [sentence(*said) for wrong, *said in checks if wrong]
    raise_all(ConfigError, "These options cannot be used", problems)
    deltas.check_rank_options(rank, energy, whole)
    return Options(None if dtype is None else DTYPES[dtype], part, rank, energy, whole)


def detect(path: str | Path) -> str:
    """The format of an adapter, from what it holds and not from its name.

    Raises:
        AdapterError: there is nothing, or nothing that Veneer knows.
    """
    path = Path(path)
    if path.is_dir():
        return _detect_folder(path)
    if not path.is_file():
        raise AdapterError(f"nothing at {path}", "an adapter", "check the path")
    with path.open("rb") as stream:
        start = stream.read(16)
    tensors = start[8:9] == b"{"  # after the length of the header
    if not tensors and start.startswith((b"PK", b"\x80")):
        found = f"{path}, a pickle, which runs code as it is opened"
        raise AdapterError(found, "safetensors or GGUF", "get the adapter as safetensors")
    found = read_header(path) if tensors else Header({}, {}, 0)
    keys, header = found.tensors, found.metadata
    if known := next(
        (format_.name for format_ in FORMATS if format_.recognises(start, keys, header)), None
    ):
        return known
    if any(key.startswith(peft.PREFIX) for key in keys):
        found = f"{path}, the tensors of a PEFT folder without its {peft.CONFIG}"
        raise AdapterError(found, "the folder", "name the folder that holds both")
    what = f" with keys such as {listing(sorted(keys), 2)}" if keys else ""
    raise AdapterError(f"{path}{what}", f"one of {', '.join(FORMATS.names())}", "check the file")


def _detect_folder(path: Path) -> str:
    tensors = path / peft.TENSORS
    if tensors.is_file():
        return "veneer" if "veneer" in read_header(tensors).metadata else "peft"
    files = sorted(path.iterdir())
    if pickles := [file.name for file in files if file.suffix in (".bin", ".pt", ".pth", ".ckpt")]:
        problem = f"{listing(pickles, 2)} in {path}, a pickle, which runs code as it is opened"
        raise AdapterError(problem, peft.TENSORS, "save the adapter again as safetensors")
    inside = [file.name for file in files if file.suffix in (".safetensors", ".gguf")]
    do = f"name the file, such as {path / inside[0]}" if inside else "check the path"
    raise AdapterError(
        f"no {peft.TENSORS} in the folder {path}", "an adapter folder, or a file", do
    )


def _as_folder(
    source: Path,
    from_: str,
    scratch: Path,
    base_info: BaseInfo,
    options: Options,
    verify_base: bool,
) -> tuple[AdapterFiles, Contents, dict[str, float]]:
    """The source as an adapter folder: itself, or one made of it in ``scratch``."""
    reader = FORMATS[from_].read
    if reader is None:
        return folder.read(source, _weights(base_info.facts)), Contents(), {}
    contents = reader(source, base_info.facts, options)
    if not contents.low and not contents.deltas:
        raise AdapterError(f"no change at all in {source}", "at least one", "check the file")
    if contents.deltas:
        errors = _from_deltas(source, contents, scratch, base_info, options, verify_base)
        return folder.read(scratch), contents, errors
    dora = [bool(layer.extras) for layer in contents.low.values()]
    if any(dora) and not all(dora):
        problem = f"{source}, where {sum(dora)} of {len(dora)} layers are DoRA"
        raise AdapterError(problem, "all of them or none", "merge it with the tool that made it")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": contents.base_name,
        "r": 1,
        "lora_alpha": 1,
    }
    config["fan_in_fan_out"] = contents.transposed
    stub = AdapterFiles(source, LoraConfig(), config, None, {}, {}, {})
    write_derived(scratch, [stub], contents.low, variant=contents.variant)
    return folder.read(scratch), contents, {}


def _tuner(source: Path) -> str | None:
    """The type of another tuner of PEFT than LoRA, whose folder is to become LoRA's."""
    tuner = (
        peft_tuners.tuner_of(read_json(source / peft.CONFIG))
        if (source / peft.CONFIG).is_file()
        else None
    )
    return None if tuner is None else tuner.type


def _weights(facts: BaseFacts) -> peft_tuners.Weights | None:
    """What a base's files say of its weights; nothing without a base."""
    said = facts.config.get("dtype") or facts.config.get("torch_dtype")
    dtype = getattr(torch, str(said).removeprefix("torch."), None)

    def found(at: str) -> tuple[tuple[int, ...], torch.dtype | None] | None:
        return None if at not in facts.shapes else (facts.shapes[at], dtype)

    return found if facts.shapes else None


def _plain_problems(saved: AdapterFiles, base_info: BaseInfo) -> Iterator[str]:
    """Why PEFT's LoRA would apply the plain changes that those of another tuner amount to in
    another way."""
    convolutions = [layer.target_path for layer in saved.low.values() if layer.A.dim() > 2]
    if not convolutions:
        return
    assert base_info.module is not None  # who told that they are
    names = Names(base_info.module())
    for at in convolutions:
        module = names.modules[names.canonical[at]]
        reason = peft_behaviour.deviation_reason(kind_for(module, "weight").name, module)
        if reason is not None:
            yield sentence(
                f"a change of {at!r}: {reason}", "layers that PEFT's LoRA computes", "merge it"
            )


def _from_deltas(
    source: Path,
    contents: Contents,
    scratch: Path,
    base_info: BaseInfo,
    options: Options,
    verify_base: bool,
) -> dict[str, float]:
    """Write a folder of dense changes to ``scratch``; how far its products are off."""
    if base_info.module is None:
        problem = f"{source}, whose changes only a model's layers make products of"
        raise AdapterError(problem, "the base that it was made for", "give the base")
    model = base_info.module()
    if verify_base:
        _verify(model, contents.about.get("base") or {}, source)
    names = frozenset(contents.deltas) if options.whole else contents.full
    errors = deltas.put(model, contents.deltas, names, rank=options.rank, energy=options.energy)
    try:
        save(model, scratch, name=deltas.NAME, base_name=contents.base_name)
    finally:
        detach(model, deltas.NAME)
    return errors


def _verify(model: nn.Module, said: Mapping[str, Any], source: Path) -> None:
    """Compare the fingerprints that a dense file took over from its adapter."""
    tensors = [tensor for tensor in list_weights(Names(model)) if tensor.is_readable]
    fingerprints = zip(tensors, fingerprints_of(tensors, kind=kind_in(said)), strict=True)
    known = {name: fingerprint for tensor, fingerprint in fingerprints for name in tensor.names}
    other = [
        at for at, expected in (said.get("weights") or {}).items() if known.get(at) != expected
    ]
    other += [
        name
        for name, expected in (said.get("rest") or {}).items()
        if known.get(name, expected) != expected
    ]
    earlier = earlier_fingerprints(tensors, kind_in(said)) if other else {}
    other = [name for name in other if earlier.get(name) != prints_in(said).get(name, "")]
    if other:
        problem = (
            f"other weights at {listing(other, 3)} than those of {said.get('name')}, for which"
            f" {source} was made"
        )
        raise BaseMismatchError(problem, "its own base", "give that one, or pass verify_base=False")


def _changes(saved: AdapterFiles, facts: BaseFacts) -> tuple[LowRankChange, ...]:
    said = saved.metadata.get("changes") or {}
    fused = {at for path in saved.low if (at := peft_paths.attention_of(path)) is not None}
    transposed = bool(saved.peft_config.get("fan_in_fan_out"))
    return tuple(
        LowRankChange(
            weight, layer, kind_of_change(path, layer, weight, transposed, facts.shapes.get(weight))
        )
        for path, layer in saved.low.items()
        for weight in [_weight(path, layer, said, fused, facts)]
    )


def _weight(
    path: str, layer: peft.PeftLayer, said: Iterable[str], fused: set[str], facts: BaseFacts
) -> str:
    """The parameter that an entry of the file changes: as the record says, or the base, or else as
    PEFT would."""
    at = layer.target_path
    if peft.of_parameter(path, layer) or at in said or at in facts.shapes:
        return at
    recorded = [weight for weight in said if weight.rpartition(".")[0] == at]
    if len(recorded) == 1:
        return recorded[0]
    name = "in_proj_weight" if at in fused or f"{at}.in_proj_weight" in facts.shapes else "weight"
    return f"{at}.{name}"


def _adapter(
    saved: AdapterFiles, to: str, changes: tuple[LowRankChange, ...], base_info: BaseInfo,
    on_model: Callable[[], AbstractContextManager[nn.Module]],
) -> Adapter:  # fmt: skip
    if peft.not_for_peft(saved.peft_config) is not None and not base_info.facts.shapes:
        problem = f"{saved.path}, with layers that only Veneer and its base know"
        raise AdapterError(problem, "the base that it was made for", "give the base")

    def all_deltas() -> tuple[Mapping[str, Tensor], list[str]]:
        if base_info.module is None:
            return deltas.of_file(changes, saved.full)
        with on_model() as model:
            found = deltas.of_model(model, deltas.NAME)
            apart = head_apart(Names(model), saved) if saved.tokens else None
            return (
                found
                | (
                    {}
                    if apart is None
                    else {parameter_path(*apart[1]): found[parameter_path(*apart[0])]}
                ),
                [],
            )

    base: Mapping[str, Any] = saved.metadata.get("base") or {
        "name": saved.peft_config.get("base_model_name_or_path")
    }
    if saved.tokens:
        with on_model() as model:
            base = {
                **base,
                "weights": {**base.get("weights", {}), **own_prints(Names(model), saved)},
            }
            if to != "dense":  # which takes whole ΔW
                changes = with_tokens(model, deltas.NAME, saved, changes)
    about = {
        "base": base,
        "provenance": saved.metadata.get("provenance", {}),
        "variant": saved.config.variant,
    }
    return Adapter(changes, saved.full, about, all_deltas)


def _refuse(saved: AdapterFiles, from_: str, to: Format, base_info: BaseInfo) -> None:
    """Refuse what PEFT computes in another way than the rest: for a format of its own, or from one.
    And what the factors of a folder do not say, where no model is asked: a start that PEFT takes
    off the base, a bias beside B."""
    # else `install_from` asks the model
    unasked = to.name not in ("veneer", "dense") or base_info.module is None
    if unasked:
        peft_fields.check_config(saved.peft_config, saved.record is not None)
        alone = [
            at for at, said in saved.metadata.get("changes", {}).items() if said.get("module_only")
        ]
        if alone and not to.peft:
            problem = (
                f"changes of what modules give ({listing(alone, 3)}), whose weights others read"
                " unchanged"
            )
            raise AdapterError(
                problem,
                "changes of weights",
                'keep the adapter beside its base, or convert it to "peft"',
            )
    if to.peft and (why := peft.not_for_peft(saved.peft_config)) is not None:
        problem = f"an adapter that PEFT would apply in another way ({why})"
        raise AdapterError(
            problem, "changes that PEFT computes", "merge it, or convert it to dense"
        )
    if to.peft and saved.tuner is not None:
        raise_all(
            AdapterError, f"{saved.path} cannot be LoRA", list(_plain_problems(saved, base_info))
        )
    if unasked and not to.peft and FORMATS[from_].peft and saved.record is None:
        _must_be_of_weights(saved, to, base_info.structure)


def _must_be_of_weights(saved: AdapterFiles, to: Format, model: nn.Module | None) -> None:
    """``AdapterError``: changes that PEFT does not apply as those of weights. ``UnverifiedAdapter``
    is warned of where no model can tell."""
    if model is None:
        odd = "a dilation, a padding mode or a forward of its own"
        warnings.warn(
            f"Nobody checked what PEFT makes of {saved.path}: where a module reads another one's"
            f" weight, or a layer has {odd}, that is no change of the weight, which is what"
            f" {to.name!r} holds. Give the model as base to have it checked.",
            UnverifiedAdapter,
            stacklevel=4,
        )
        return
    names, config, problems = Names(model), saved.peft_config, []
    for path, layer in saved.low.items():
        ref = ref_at(names, path, config)
        if ref is None:
            continue
        past, reason = deviations(
            names, ref, layer, means_parameter(names, ref, config), saved.tuner
        )
        if reason := past or reason:
            problem = (
                f"a change of {layer.target_path!r} that PEFT applies in another way: {reason}"
            )
            problems.append(sentence(problem, "a change of the weight", "use PEFT for it"))
    raise_all(AdapterError, "This adapter is none of the weights", problems)


def _lost(saved: AdapterFiles, to: str) -> list[str]:
    """What the source says and ``to`` has no place for, beyond what would change an output."""
    kept = "hashes" if to == "dense" else "fingerprints of the base, hashes"
    variant, dropout = saved.config.variant, saved.config.dropout
    numbers = f"the numbers of variant {variant!r}; the change that they amount to is kept"
    rows = (
        "the rows of trained tokens; kept is how they differ from this base's own, so it fits this"
        " base alone"
    )
    losses = [
        (saved.metadata and to != "veneer", f"the record: {kept} and provenance"),
        (saved.adapter_parameters and to != "veneer", numbers),
        (saved.tokens and to not in ("veneer", "peft"), rows),
        (
            dropout and to not in ("veneer", "peft"),
            f"dropout {dropout:g}, which counts in training alone",
        ),
    ]
    return [loss for lost, loss in losses if lost]
