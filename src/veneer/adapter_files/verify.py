"""Is this adapter what it says it is, and was it made for this base? Every check, not only the first that fails.

``read`` and ``load`` refuse at the first thing that is wrong, as they must. Whoever is handed a folder wants the whole
list, and also what is no error: files that have no business there, a layer whose change is a hundred times that of its
neighbours, an adapter that changes nothing. So the same checks run here one by one, and each gives a ``Finding``.

    error      read or load refuses it, or it does not fit the base
    warning    it loads, and somebody should look at it
    ok         what was checked and found right

Norms are compared with those of the adapter's own layers of the same shape: d = |log ‖ΔW‖ − median| against the median
of all d (MAD), since means and deviations would be moved by the very layer that is looked for (Leys et al. 2013,
"Detecting outliers"). A layer is odd where d > 6 · 1.4826 · MAD and its norm is also ten times off.

Rejected: one call of ``load`` on the base. It needs all of its weights in memory; here they are read from the files one
at a time. Which tensors of the files are which weight is asked of the model on the meta device that their config means
(``models.meta_model``), as merging does; of files without such a config the names alone tell.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from veneer.adapter_files.base_weights import Weights, weights_of
from veneer.adapter_files.folder import (
    CORE,
    FILES,
    FLOATS,
    AdapterFiles,
    assemble,
    missing,
    odd_numbers,
    read_parameters,
    read_tensors,
)
from veneer.adapter_files.record import PARAMETERS, RECORD, altered, altered_parameters, malformed, record_in
from veneer.attach.weight_tying import UNTIE, same
from veneer.errors import AdapterError, CheckpointError, listing, sentence
from veneer.fileio.hashing import fingerprint
from veneer.fileio.untrusted import misplaced, read_json, what_it_is
from veneer.formats import peft
from veneer.lowrank import LowRank

__all__ = ["Finding", "Report", "verify"]

T = TypeVar("T")
Level = Literal["ok", "warning", "error"]


_CODE = {".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".cmd", ".ps1", ".js", ".jar"}
#: layers of one shape that it takes to call one of them odd; how many deviations and how many times it is off then
ENOUGH, DEVIATIONS, TIMES = 6, 6 * 1.4826, 10


@dataclass(frozen=True)
class Finding:
    """One check: how it went, what was looked at, and what was found."""

    level: Level
    check: str
    message: str

    def __str__(self) -> str:
        """One line, or more that are indented: names in an adapter may hold what would look like another finding, or
        what steers a terminal."""
        shown = "".join(one if one.isprintable() or one == "\n" else ascii(one)[1:-1] for one in self.message)
        return f"{self.level:<8} {self.check:<8} {shown}".replace("\n", "\n" + " " * 18)


@dataclass(frozen=True)
class Report:
    """Everything that was found about an adapter folder. ``str(report)`` is a line for each check."""

    path: Path
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.level == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.level == "warning")

    @property
    def ok(self) -> bool:
        """Whether there is no error. Warnings do not count."""
        return not self.errors

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"path": str(self.path), "ok": self.ok, "findings": [asdict(finding) for finding in self.findings]}

    def __str__(self) -> str:
        counts = f"{len(self.errors)} errors, {len(self.warnings)} warnings"
        return "\n".join([*map(str, self.findings), f"{self.path}: {'good' if self.ok else 'refused'} ({counts})"])


Findings = Iterator[Finding]


def verify(path: str | Path, base: str | Path | nn.Module | None = None) -> Report:
    """Check an adapter folder, and whether it was made for ``base``.

    Without a base no model is needed. With one, each weight that the adapter changes is compared with its fingerprint
    (or, where another library wrote the adapter, by name and shape alone), one weight in memory at a time.

    Args:
        base: a folder with safetensors, or a model. Of a folder whose config transformers knows, weights are found
            as transformers loads them, fused, stacked and tied ones too. Else by name, which may differ by a prefix,
            and either name of a tied embedding will do.

    Returns:
        a report; what is wrong with the adapter is in it and is never raised.

    Raises:
        CheckpointError: ``base`` is a path without such files, or they are damaged.
    """
    path = Path(path)
    weights = None if base is None else weights_of(base)
    return Report(path, tuple(_findings(path, weights)))


def _findings(path: Path, weights: Weights | None) -> Findings:
    yield from _judged("files", missing(path), f"{peft.CONFIG} and {peft.TENSORS} are there, and no pickle of them")
    if not path.is_dir():
        return
    yield from _strangers(path)
    usable = {name for name in CORE if (path / name).is_file() and not misplaced(path, [name])}
    config = tensors = metadata = None
    if peft.CONFIG in usable:
        config = yield from _tried("config", lambda: read_json(path / peft.CONFIG))
    if peft.TENSORS in usable:
        tensors, metadata = (yield from _tried("tensors", lambda: read_tensors(path / peft.TENSORS))) or (None, None)
    if tensors is None or metadata is None:
        return
    yield Finding("ok", "tensors", f"{len(tensors)} tensors, each where the header says")
    record = yield from _tried("record", lambda: record_in(path, metadata))
    parameters: dict[str, Tensor] | None = {}
    if any(os.path.lexists(path / name) and name not in usable for name in (RECORD, PARAMETERS)):
        record, parameters = None, None  # said above; what is no file of the folder is not opened
    if record is not None:
        sound, parameters = yield from _recorded(path, record, config or {}, tensors)
        record = record if sound else None
    elif not (path / RECORD).exists() and "veneer" not in metadata:
        yield Finding(
            "warning", "record", "written by another library: nothing tells whether it was altered, or for which base"
        )
    config = yield from _checked(config, ours="veneer" in metadata)
    yield from _values(tensors if not parameters else {**tensors, **parameters})
    if config is None or parameters is None or (record is None and "veneer" in metadata):
        return
    saved = yield from _tried("layers", lambda: assemble(path, config, record, tensors, parameters))
    if saved is not None:
        yield from _changes(saved, weights)


def _changes(saved: AdapterFiles, weights: Weights | None) -> Findings:
    products = yield from _tried("layers", lambda: saved.products)
    if products is None:
        return
    yield Finding("ok", "layers", f"{len(products)} changes, as the config says, and {len(saved.full)} in full")
    if saved.record is None:
        yield from _unmatched(saved)
    norms = {at: low.norm() for at, low in products.items()}
    yield from _sizes(saved, products, norms)
    fresh = saved.metadata.get("base", {}).get("fresh")
    if fresh:
        found = (
            f"random as it was trained, and in no file: {listing(fresh, 4)}. Whatever reads them gives other answers"
        )
        yield Finding("warning", "proof", f"{found} after each load of the base; train_also would have kept them")
    if weights is not None:
        try:
            yield from _against(saved, products, norms, weights)
        except CheckpointError as error:  # a file that became shorter meanwhile
            yield Finding("error", "base", str(error))


def _checked(config: dict[str, Any] | None, ours: bool) -> Generator[Finding, None, dict[str, Any] | None]:
    """The config, if each of its fields is one that can be honoured."""
    try:
        if config is not None:
            peft.check_config(config, ours)
        return config
    except AdapterError as error:
        yield Finding("error", "config", str(error))
        return None


def _judged(check: str, problems: list[str], right: str) -> Findings:
    yield from (Finding("error", check, problem) for problem in problems)
    if not problems:
        yield Finding("ok", check, right)


def _tried(check: str, step: Callable[[], T]) -> Generator[Finding, None, T | None]:
    """What a step gives, or None and why not."""
    try:
        return step()
    except AdapterError as error:
        yield Finding("error", check, str(error))
        return None


def _strangers(path: Path) -> Findings:
    """Files that an adapter has no need of and that could do harm."""
    for file in sorted(path.iterdir()):
        if file.name in FILES or (file.is_dir() and not file.is_symlink()):
            continue
        if misplaced(path, [file.name]) or not file.is_file():
            yield Finding("warning", "files", f"{file.name} is a link that leads elsewhere, or no regular file")
            continue
        with file.open("rb") as stream:
            head = stream.read(16)
        known = what_it_is(head)
        if known and "pickle" in known:
            yield Finding("warning", "files", f"{file.name} is {known}; Veneer does not open it")
        elif file.suffix.lower() in _CODE or head.startswith((b"#!", b"\x7fELF", b"MZ")) or os.access(file, os.X_OK):
            yield Finding("warning", "files", f"{file.name} is a program; an adapter needs none, and Veneer runs none")


def _recorded(
    path: Path, record: Mapping[str, Any], config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Generator[Finding, None, tuple[bool, dict[str, Tensor] | None]]:
    """(whether the record can be used, the tensors of veneer.safetensors)."""
    checks = (yield from _tried("record", lambda: altered(path, record, config, tensors))) or {}
    problems = list(malformed(record, path))
    yield from (Finding("error", "record", problem) for problem in problems)
    parameters = None if problems else (yield from _tried("record", lambda: read_parameters(path, record)))
    if parameters is not None:
        checks |= altered_parameters(record, parameters)
    changed = [what for what, other in checks.items() if other]
    for what in changed:
        found = sentence(f"{what} changed after it was written", "the files as they were saved", "get another copy")
        yield Finding("error", "record", found)
    sound = bool(checks) and not problems and not changed
    if sound:
        yield Finding("ok", "record", f"the hashes are right: {', '.join(checks)}")
    return sound, parameters


def _values(tensors: Mapping[str, Tensor]) -> Findings:
    problems = list(odd_numbers(tensors, "get another copy"))
    yield from _judged("numbers", problems, "every number is finite")
    types = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values() if tensor.dtype in FLOATS})
    if len(types) > 1:
        yield Finding("warning", "numbers", f"stored in several types: {', '.join(types)}")
    elif types == ["float64"]:
        yield Finding("warning", "numbers", "stored as float64, of which nothing that loads it keeps more than float32")


def _unmatched(saved: AdapterFiles) -> Findings:
    """A PEFT config and its tensors, as far as they can be compared without the model."""
    named = saved.peft_config.get("target_modules") or ()
    held = list(saved.products)
    idle = [] if isinstance(named, str) else [name for name in named if not peft.expected_paths(
        {"target_modules": [name]}, held)]  # fmt: skip
    if idle:
        yield Finding("warning", "config", f"targets without a tensor: {listing(idle)}")


def _sizes(saved: AdapterFiles, products: Mapping[str, LowRank], norms: Mapping[str, float]) -> Findings:
    plain = {entry.at for entry in saved.low.values() if not entry.extras}
    frozen_input = [at for at, norm in norms.items() if norm == 0 and at in plain]
    if frozen_input and len(frozen_input) == len(norms) and not saved.full:
        yield Finding("warning", "norms", "every change is zero: this adapter changes nothing (was it ever trained?)")
    elif frozen_input:
        yield Finding("warning", "norms", f"changes of zero, as before training, at {listing(frozen_input)}")
    odd = list(_outliers(products, norms))
    for at, norm, usual in odd:
        yield Finding(
            "warning",
            "norms",
            f"‖ΔW‖ is {norm:.3g} at {at!r}, and {usual:.3g} in the middle of the layers of its shape",
        )
    if not frozen_input and not odd:
        largest = max(norms.values(), default=0.0)
        yield Finding("ok", "norms", f"no change stands out among those of its shape (‖ΔW‖ up to {largest:.3g})")


def _outliers(products: Mapping[str, LowRank], norms: Mapping[str, float]) -> Iterator[tuple[str, float, float]]:
    """(path, ‖ΔW‖, the median of its like) of each change that is far from those of its shape."""
    alike: dict[tuple[int, ...], dict[str, float]] = {}
    for at, low in products.items():
        if norms[at] > 0:
            shape = (low.B.shape[0], low.B.shape[1], low.A.shape[2])
            alike.setdefault(shape, {})[at] = math.log(norms[at])
    for logs in alike.values():
        middle = statistics.median(logs.values())
        spread = statistics.median(abs(log - middle) for log in logs.values())
        for at, log in logs.items() if len(logs) >= ENOUGH else ():
            if abs(log - middle) > max(DEVIATIONS * spread, math.log(TIMES)):
                yield at, norms[at], math.exp(middle)


# ---------------------------------------------------------------------------------------------- the base


def _against(
    saved: AdapterFiles, products: Mapping[str, LowRank], norms: Mapping[str, float], weights: Weights
) -> Findings:
    """Each weight that the adapter changes, as the base has it."""
    recorded = saved.metadata.get("base", {}).get("weights", {})
    wanted = {at: _product_at(at, products) for at in recorded} or {at: at for at in products}
    lacking, shapes, different, large = [], [], [], []
    for at, change in wanted.items():
        weight = weights(at)
        if weight is None and not recorded:
            weight = weights(f"{at}.weight")
        if weight is None:
            lacking.append(at)
        elif change is not None and not _fits(products[change], weight.shape):
            low = products[change]
            shapes.append(f"{at} is {tuple(weight.shape)}, and B A there {low.B.shape[-2]} × {low.A.shape[-1]}")
        elif recorded and fingerprint(weight, recorded[at]) != recorded[at]:
            different.append(at)
        elif change is not None:
            ratio = norms[change] / max(weight.float().norm().item(), 1e-30)
            large += [f"{at} ({ratio:.3g})"] if ratio > 1 else []
    base = saved.metadata.get("base", {}).get("name") or saved.peft_config.get("base_model_name_or_path")
    do = "take the base that it was trained on" + (f", {base}" if base else "")
    count = f"other numbers in {len(different)} of {len(wanted)} weights"
    problems = [
        sentence(f"{found} ({listing(which, 4)})", expected, do)
        for which, found, expected in (
            (lacking, "weights that the base lacks", "those that the adapter changes"),
            (shapes, "other shapes", "those that the adapter fits"),
            (different, count, "its own base"),
        )
        if which
    ]
    right = f"{len(wanted)} weights have the fingerprints of the record"
    yield from _judged("base", problems, right if recorded else f"{len(wanted)} weights by name and shape alone")
    if recorded:
        yield from _rest(saved, weights, len(recorded) - len(lacking) - len(different), do)
    if large:
        yield Finding("warning", "norms", f"changes larger than the weight itself, ‖ΔW‖ / ‖W‖: {listing(large)}")
    yield from _in_full(saved, weights)
    yield from _ties(saved, weights)


def _rest(saved: AdapterFiles, weights: Weights, proven: int, do: str) -> Findings:
    """Each other tensor that the adapted model computes with, as the base has it; ``proven`` of the changed ones are
    right."""
    record = saved.metadata["base"]
    rest = record.get("rest")
    if rest is None:
        known = f"adapted layers only: {proven} of {len(record['weights'])} tensors proven, and none of the others, of "
        yield Finding("ok", "proof", known + "which the Veneer that saved it recorded nothing")
        return
    lacking, different = [], []
    for at, expected in rest.items():
        weight = weights(at)
        if weight is None:
            lacking.append(at)
        elif fingerprint(weight, expected) != expected:
            different.append(at)
    if different:
        found = f"other numbers in {len(different)} of {len(rest)} tensors that it computes with and does not change "
        yield Finding("error", "base", sentence(f"{found}({listing(different, 4)})", "its own base", do))
    if lacking:
        found = f"{len(lacking)} tensors that it computes with are not in this base: {listing(lacking, 4)}"
        yield Finding("warning", "base", found)
    proven += len(rest) - len(lacking) - len(different)
    yield Finding("ok", "proof", f"{proven} of {len(rest) + len(record['weights'])} tensors proven")


def _product_at(at: str, products: Mapping[str, LowRank]) -> str | None:
    """The key of the change of a weight: by its own path, or by its module's."""
    return next((key for key in (at, at.rpartition(".")[0]) if key in products), None)


def _fits(low: LowRank, shape: torch.Size) -> bool:
    groups, out, in_ = low.B.shape[0], low.B.shape[1], low.A.shape[2]
    return groups * out * in_ == shape.numel() and (len(shape) != 2 or sorted((groups * out, in_)) == sorted(shape))


def _in_full(saved: AdapterFiles, weights: Weights) -> Findings:
    new, shapes, other = [], [], []
    for file_path, tensors in saved.full.items():
        path, _ = peft.unnested(file_path)
        for name, tensor in tensors.items():
            at = f"{path}.{name}".lstrip(".")
            weight = weights(at)
            if weight is None:
                new.append(at)
            elif weight.shape != tensor.shape:
                shapes.append(f"{at} {tuple(tensor.shape)}, in the base {tuple(weight.shape)}")
            elif path in saved.products and name == "weight" and fingerprint(weight) != fingerprint(tensor):
                other.append(at)  # PEFT writes the frozen weight of an adapted embedding along
    if shapes:
        found = f"trained in full with another shape: {listing(shapes, 4)}"
        yield Finding("error", "base", sentence(found, "the base's", "take the base that it was trained on"))
    if other:
        found = f"another weight of {listing(other)} than the file holds of the base"
        yield Finding("error", "base", sentence(found, "its own base", "take the base that it was trained on"))
    if new:
        yield Finding("warning", "base", f"trained in full, and not in the base: {listing(new)} (a new head?)")


def _ties(saved: AdapterFiles, weights: Weights) -> Findings:
    """What is trained in full under some names of a tied weight alone, or with different values."""
    full = {
        f"{peft.unnested(path)[0]}.{name}".lstrip("."): tensor
        for path, tensors in saved.full.items() for name, tensor in tensors.items()
    }  # fmt: skip
    for names in dict.fromkeys(tuple(weights.names(at)) for at in full):
        own = [full[at] for at in names if at in full]
        if len(names) < 2 or any(one.shape != own[0].shape for one in own):
            continue
        if len(own) < len(names) or not all(same(one, own[0]) for one in own):
            found = (
                f"values of their own for {listing([at for at in names if at in full])} of {listing(names)}, one weight"
            )
            text = "of the base: they load as PEFT computes them, each place with its own. Before a merge,"
            yield Finding("warning", "base", f"{found} {text} {UNTIE}")
