"""Is this adapter what it says it is, and was it made for this base? Every check, not only the
first that fails.

``read`` and ``load`` refuse at the first thing that is wrong. Whoever is handed a folder wants the
whole list, and also what is no error: so the same checks run here one by one, and each gives a
``Finding``.

    error      read or load refuses it, or it does not fit the base
    warning    it loads, and somebody should look at it
    ok         what was checked and found right

Norms are compared with those of the adapter's own layers of the same shape: d = |log ‖ΔW‖ − median|
against the median of all d (MAD), since means and deviations would be moved by the very layer that
is looked for (Leys et al. 2013, "Detecting outliers"). A layer is odd where d > 6 · 1.4826 · MAD
and its norm is also ten times off.

The base's weights are read from the files one at a time. Which tensors are which weight is asked of
the model on the meta device that their config means (``models.meta_model``); of files without such
a config the names alone tell.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from veneer.adapter_files import folder
from veneer.adapter_files.folder import AdapterFiles
from veneer.adapter_files.record import PARAMETERS, RECORD, altered, malformed, record_in
from veneer.attach.weight_tying import UNTIE, same
from veneer.errors import (
    AdapterError,
    CheckpointError,
    escape_controls,
    listing,
    sentence,
)
from veneer.fileio.hashing import fingerprint, fingerprint_beside
from veneer.fileio.tensors import read_tensors
from veneer.fileio.untrusted import MAX_JSON, misplaced, read_json, what_it_is
from veneer.formats import peft, peft_tokens
from veneer.formats.peft_targets import describe
from veneer.formats.peft_tuners import check_config, tuner_of
from veneer.lowrank import LowRank
from veneer.models.base_weights import BaseWeights, open_base_weights

__all__ = ["Finding", "Report", "verify"]

T = TypeVar("T")
Level = Literal["ok", "warning", "error"]

_CODE = {
    ".py",
    ".pyc",
    ".pyd",
    ".so",
    ".dll",
    ".dylib",
    ".exe",
    ".sh",
    ".bat",
    ".cmd",
    ".ps1",
    ".js",
    ".jar",
}
#: layers of one shape that it takes to call one of them odd; how many deviations and how many
#: times it is off then
ENOUGH, DEVIATIONS, TIMES = 6, 6 * 1.4826, 10


@dataclass(frozen=True)
class Finding:
    """One check: how it went, what was looked at, and what was found."""

    level: Level
    check: str
    message: str

    def __str__(self) -> str:
        """Indented from its second line on: names may hold what looks like another finding, or
        steers a terminal."""
        return f"{self.level:<8} {self.check:<8} {escape_controls(self.message)}".replace(
            "\n", "\n" + " " * 18
        )


@dataclass(frozen=True)
class Report:
    """Everything that was found about an adapter folder. ``str(report)`` is a line for each
    check."""

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
        return {
            "path": str(self.path),
            "ok": self.ok,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def __str__(self) -> str:
        counts = f"{len(self.errors)} errors, {len(self.warnings)} warnings"
        return "\n".join(
            [
                *map(str, self.findings),
                f"{self.path}: {'good' if self.ok else 'refused'} ({counts})",
            ]
        )


def verify(path: str | Path, base: str | Path | nn.Module | None = None) -> Report:
    """Check an adapter folder, and whether it was made for ``base``.

    Without a base no model is needed. With one, each weight that the adapter changes is compared
    with its fingerprint (or, where another library wrote the adapter, by name and shape alone), one
    weight in memory at a time.

    Args:
        base: a folder with safetensors, or a model. Of a folder whose config transformers knows,
            weights are found as transformers loads them, fused, stacked and tied ones too. Else by
            name, which may differ by a prefix, and either name of a tied embedding will do.

    Returns:
        a report; what is wrong with the adapter is in it and is never raised.

    Raises:
        CheckpointError: ``base`` is a path without such files, or they are damaged.
    """
    checks = _Checks(Path(path), None if base is None else open_base_weights(base))
    checks.run()
    return Report(checks.path, tuple(checks.findings))


class _Checks:
    def __init__(self, path: Path, weights: BaseWeights | None) -> None:
        self.path, self.weights = path, weights
        self.findings: list[Finding] = []

    def add(self, level: Level, check: str, message: str) -> None:
        self.findings.append(Finding(level, check, message))

    def judge(self, check: str, problems: Iterable[str], right: str) -> None:
        """The problems as errors, or that all is right."""
        problems = list(problems)
        for problem in problems:
            self.add("error", check, problem)
        if not problems:
            self.add("ok", check, right)

    def tried(self, check: str, step: Callable[..., T], *args: Any) -> T | None:
        """What a step gives, or None and why not."""
        try:
            return step(*args)
        except AdapterError as error:
            self.add("error", check, str(error))
            return None

    def run(self) -> None:
        """Everything, as far as the check before allows the next."""
        path = self.path
        self.judge(
            "files",
            folder.missing(path),
            f"{peft.CONFIG} and {peft.TENSORS} are there, and no pickle of them",
        )
        if not path.is_dir():
            return
        self.strangers()
        usable = {
            name for name in folder.CORE if (path / name).is_file() and not misplaced(path, [name])
        }
        config = (
            self.tried("config", read_json, path / peft.CONFIG) if peft.CONFIG in usable else None
        )
        content = (
            self.tried("tensors", read_tensors, path / peft.TENSORS)
            if peft.TENSORS in usable
            else None
        )
        if content is None:
            return
        tensors, metadata = content
        ours = "veneer" in metadata
        self.add("ok", "tensors", f"{len(tensors)} tensors, each where the header says")
        record = self.tried("record", record_in, path, metadata)
        parameters: dict[str, Tensor] | None = {}
        if any(
            os.path.lexists(path / name) and name not in usable for name in (RECORD, PARAMETERS)
        ):
            # said above; what is no file of the folder is not opened
            record, parameters = (
                None,
                None,
            )
        if record is not None:
            sound, parameters = self.recorded(record, config or {}, tensors)
            record = record if sound else None
        elif not (path / RECORD).exists() and not ours:
            text = (
                "written by another library: nothing tells whether it was altered, or for which"
                " base"
            )
            self.add("warning", "record", text)
        source = config, tensors
        if config is not None:
            config, tensors = peft_tokens.as_lora(config, tensors)
        if (said := config) is not None:  # and if each of its fields is one that can be honoured
            config = self.tried("config", lambda: check_config(said, ours, with_base=True) or said)
        self.numbers({**tensors, **(parameters or {})})
        if config is None or parameters is None or (record is None and ours):
            return
        if record is None:
            meant = self.tried("layers", folder.applied, *source)
            if meant is None:
                return
            config, tensors, left_out = meant
            if left_out:
                self.add("warning", "config", describe(left_out))
        tuned = tuner_of(config) if record is None else None
        shapes = None if self.weights is None or tuned is None else self.shape_of
        saved = self.tried(
            "layers", folder.assemble, path, config, record, tensors, parameters, shapes
        )
        if saved is not None and saved.tuner is not None and saved.tuner.needs_base_shapes:
            text = (
                f"{len(saved.tuner.paths)} changes of {saved.tuner.tuner.type}, whose shapes only"
                " the base tells: "
            )
            self.add("warning", "layers", f"{text}give it to have them checked")
            return
        products = None if saved is None else self.tried("layers", lambda: saved.products)
        if saved is not None and products is not None:
            self.changes(saved, products)

    def changes(self, saved: AdapterFiles, products: Mapping[str, LowRank]) -> None:
        rows = sum(len(one.ids) for one in saved.tokens.values())
        tokens = f", {rows} tokens" if rows else ""
        problem = (
            f"{len(products)} changes, as the config says, and {len(saved.full)} in full{tokens}"
        )
        self.add("ok", "layers", problem)
        # a config and its tensors, as far as they can be compared without the model
        if saved.record is None:
            named = saved.peft_config.get("target_modules") or ()
            single = () if isinstance(named, str) else named
            idle = [
                name
                for name in single
                if not peft.expected_paths({"target_modules": [name]}, products)
            ]
            if idle:
                self.add("warning", "config", f"targets without a tensor: {listing(idle)}")
        norms = {at: low.norm() for at, low in products.items()}
        self.sizes(saved, products, norms)
        fresh = saved.metadata.get("base", {}).get("fresh")
        if fresh:
            problem = (
                f"random as it was trained, and in no file: {listing(fresh, 4)}. Whatever reads"
                " them gives other"
            )
            text = f"{problem} answers after each load of the base; train_also would have kept them"
            self.add("warning", "proof", text)
        if self.weights is not None:
            try:
                self.against(saved, products, norms, self.weights)
            except CheckpointError as error:  # a file that became shorter meanwhile
                self.add("error", "base", str(error))

    def shape_of(self, at: str) -> tuple[tuple[int, ...], torch.dtype | None] | None:
        """The shape and dtype of a weight of the base, if there is one of that path."""
        weight = None if self.weights is None else self.weights.get(at)
        return None if weight is None else (weight.shape, weight.dtype)

    def strangers(self) -> None:
        """Files that an adapter has no need of and that could do harm."""
        for file in sorted(self.path.iterdir()):
            if file.name in folder.FILES or (file.is_dir() and not file.is_symlink()):
                continue
            if misplaced(self.path, [file.name]) or not file.is_file():
                self.add(
                    "warning",
                    "files",
                    f"{file.name} is a link that leads elsewhere, or no regular file",
                )
                continue
            with file.open("rb") as stream:
                head = stream.read(16)
            known = what_it_is(head)
            runs = file.suffix.lower() in _CODE or head.startswith((b"#!", b"\x7fELF", b"MZ"))
            if known and "pickle" in known:
                self.add("warning", "files", f"{file.name} is {known}; Veneer does not open it")
            elif code := _code_named_in(file):
                problem = (
                    f"{file.name} names code that is to run when it is loaded ({listing(code, 3)})"
                )
                self.add(
                    "warning", "files", f"{problem}; an adapter needs none, and Veneer runs none"
                )
            elif runs or os.access(file, os.X_OK):
                self.add(
                    "warning",
                    "files",
                    f"{file.name} is a program; an adapter needs none, and Veneer runs none",
                )

    def recorded(
        self, record: Mapping[str, Any], config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> tuple[bool, dict[str, Tensor] | None]:
        """(whether the record can be used, the tensors of veneer.safetensors)."""
        problems = list(malformed(record, self.path))
        parameters = (
            None if problems else self.tried("record", folder.read_parameters, self.path, record)
        )
        checks = self.tried("record", altered, self.path, record, config, tensors, parameters) or {}
        again = "the files as they were saved", "get another copy"
        problems += [
            sentence(f"{at} changed after it was written", *again)
            for at, other in checks.items()
            if other
        ]
        for problem in problems:
            self.add("error", "record", problem)
        if checks and not problems:
            self.add("ok", "record", f"the hashes are right: {', '.join(checks)}")
        return bool(checks) and not problems, parameters

    def numbers(self, tensors: Mapping[str, Tensor]) -> None:
        self.judge(
            "numbers", folder.odd_numbers(tensors, "get another copy"), "every number is finite"
        )
        floats = {tensor.dtype for tensor in tensors.values() if tensor.dtype in folder.FLOATS}
        types = sorted(str(dtype).removeprefix("torch.") for dtype in floats)
        if len(types) > 1:
            self.add("warning", "numbers", f"stored in several types: {', '.join(types)}")
        elif types == ["float64"]:
            self.add(
                "warning",
                "numbers",
                "stored as float64, of which nothing that loads it keeps more than float32",
            )

    def sizes(
        self, saved: AdapterFiles, products: Mapping[str, LowRank], norms: Mapping[str, float]
    ) -> None:
        plain = {entry.at for entry in saved.low.values() if not entry.extras}
        zero = [at for at, norm in norms.items() if norm == 0 and at in plain]
        if zero and len(zero) == len(norms) and not saved.full:
            self.add(
                "warning",
                "norms",
                "every change is zero: this adapter changes nothing (was it ever trained?)",
            )
        elif zero:
            self.add("warning", "norms", f"changes of zero, as before training, at {listing(zero)}")
        odd = list(_outliers(products, norms))
        for at, norm, usual in odd:
            problem = (
                f"‖ΔW‖ is {norm:.3g} at {at!r}, and {usual:.3g} in the middle of the layers of its"
                " shape"
            )
            self.add("warning", "norms", problem)
        if not zero and not odd:
            largest = f"‖ΔW‖ up to {max(norms.values(), default=0.0):.3g}"
            self.add("ok", "norms", f"no change stands out among those of its shape ({largest})")

    def against(
        self,
        saved: AdapterFiles,
        products: Mapping[str, LowRank],
        norms: Mapping[str, float],
        weights: BaseWeights,
    ) -> None:
        """Each weight that the adapter changes, as the base has it."""
        record = saved.metadata.get("base", {})
        recorded = record.get("weights", {})
        # a change goes by the path of its weight, or by its module's
        wanted = {
            at: next((key for key in (at, at.rpartition(".")[0]) if key in products), None)
            for at in recorded
        }
        wanted = wanted or {at: at for at in products}
        lacking, shapes, different, large = [], [], [], []
        for at, change in wanted.items():
            weight = _read(weights, at)
            if weight is None and not recorded:
                weight = _read(weights, f"{at}.weight")
            if weight is None:
                lacking.append(at)
            elif change is not None and not _fits(products[change], weight.shape):
                low = products[change]
                shapes.append(
                    f"{at} is {tuple(weight.shape)}, and B A there {low.B.shape[-2]} ×"
                    f" {low.A.shape[-1]}"
                )
            elif (
                recorded
                and fingerprint_beside(weight, saved.token_ids(at), recorded[at]) != recorded[at]
            ):
                different.append(at)
            elif change is not None:
                ratio = norms[change] / max(weight.float().norm().item(), 1e-30)
                large += [f"{at} ({ratio:.3g})"] if ratio > 1 else []
        base = record.get("name") or saved.peft_config.get("base_model_name_or_path")
        do = "take the base that it was trained on" + (f", {base}" if base else "")
        problems = (
            (lacking, "weights that the base lacks", "those that the adapter changes"),
            (shapes, "other shapes", "those that the adapter fits"),
            (
                different,
                f"other numbers in {len(different)} of {len(wanted)} weights",
                "its own base",
            ),
        )
        sentences = [
            sentence(f"{found} ({listing(at, 4)})", expected, do)
            for at, found, expected in problems
            if at
        ]
        right = "have the fingerprints of the record" if recorded else "by name and shape alone"
        self.judge("base", sentences, f"{len(wanted)} weights {right}")
        if recorded:
            self.rest(record, weights, len(recorded) - len(lacking) - len(different), do)
        if large:
            self.add(
                "warning",
                "norms",
                f"changes larger than the weight itself, ‖ΔW‖ / ‖W‖: {listing(large)}",
            )
        self.in_full(saved, weights)

    def rest(self, record: Mapping[str, Any], weights: BaseWeights, proven: int, do: str) -> None:
        """Each other tensor that the model computes with; ``proven`` of the changed ones are
        right."""
        rest, changed = record.get("rest"), len(record["weights"])
        if rest is None:
            known = (
                f"adapted layers only: {proven} of {changed} tensors proven, and none of the"
                " others, of "
            )
            self.add("ok", "proof", known + "which the Veneer that saved it recorded nothing")
            return
        fingerprints = {at: weights.fingerprint(at, rest[at]) for at in rest}
        lacking = [at for at, value in fingerprints.items() if value is None]
        different = [at for at, value in fingerprints.items() if value not in (None, rest[at])]
        if different:
            problem = (
                f"other numbers in {len(different)} of {len(rest)} tensors "
                "that it computes with and does not change"
            )
            self.add(
                "error",
                "base",
                sentence(f"{problem} ({listing(different, 4)})", "its own base", do),
            )
        if lacking:
            problem = (
                f"{len(lacking)} tensors that it computes with are not in this base:"
                f" {listing(lacking, 4)}"
            )
            self.add("warning", "base", problem)
        proven += len(rest) - len(lacking) - len(different)
        self.add("ok", "proof", f"{proven} of {len(rest) + changed} tensors proven")

    def in_full(self, saved: AdapterFiles, weights: BaseWeights) -> None:
        """What is trained in full, beside what the base has there; of a tied weight, under each of
        its names."""
        full = {
            f"{peft.unnested(path)[0]}.{name}".lstrip("."): tensor
            for path, tensors in saved.full.items()
            for name, tensor in tensors.items()
        }
        new, shapes, other = [], [], []
        for at, tensor in full.items():
            weight, (path, _, name) = _read(weights, at), at.rpartition(".")
            if weight is None:
                new.append(at)
            elif weight.shape != tensor.shape:
                shapes.append(f"{at} {tuple(tensor.shape)}, in the base {tuple(weight.shape)}")
            elif (
                path in saved.products
                and name == "weight"
                and fingerprint(weight) != fingerprint(tensor)
            ):
                other.append(at)  # PEFT writes the frozen weight of an adapted embedding along
        do = "take the base that it was trained on"
        if shapes:
            problem = f"trained in full with another shape: {listing(shapes, 4)}"
            self.add("error", "base", sentence(problem, "the base's", do))
        if other:
            problem = f"another weight of {listing(other)} than the file holds of the base"
            self.add("error", "base", sentence(problem, "its own base", do))
        if new:
            self.add(
                "warning",
                "base",
                f"trained in full, and not in the base: {listing(new)} (a new head?)",
            )
        for names in dict.fromkeys(tuple(weights.aliases(at)) for at in full):
            own = {at: full[at] for at in names if at in full}
            first, *others = own.values()
            if len(names) < 2 or any(one.shape != first.shape for one in others):
                continue
            if len(own) < len(names) or not all(same(one, first) for one in others):
                problem = (
                    f"values of their own for {listing(own)} of {listing(names)}, one weight of the"
                    " base"
                )
                text = "they load as PEFT computes them, each place with its own. Before a merge,"
                self.add("warning", "base", f"{problem}: {text} {UNTIE}")


def _code_named_in(file: Path) -> list[str]:
    """The classes of code beside a model that a config of transformers names (``auto_map``), or
    none."""
    if not file.name.endswith("config.json"):
        return []
    with file.open("rb") as stream:
        raw = stream.read(MAX_JSON)
    if b'"auto_map"' not in raw:
        return []
    try:  # not ``read_json``: a tokenizer's longest row is a number of 31 digits
        classes = json.loads(raw)["auto_map"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return ["auto_map"]
    names = classes.values() if isinstance(classes, dict) else [classes]
    flat = (name for value in names for name in (value if isinstance(value, list) else [value]))
    return sorted({str(name)[:100] for name in flat if name is not None})


def _outliers(
    products: Mapping[str, LowRank], norms: Mapping[str, float]
) -> Iterator[tuple[str, float, float]]:
    """(path, ‖ΔW‖, the median of its like) of each change that is far from those of its shape."""
    alike: dict[tuple[int, ...], dict[str, float]] = {}
    for at, low in products.items():
        if norms[at] > 0:
            alike.setdefault(_sizes(low), {})[at] = math.log(norms[at])
    for logs in alike.values():
        middle = statistics.median(logs.values())
        spread = statistics.median(abs(log - middle) for log in logs.values())
        for at, log in logs.items() if len(logs) >= ENOUGH else ():
            if abs(log - middle) > max(DEVIATIONS * spread, math.log(TIMES)):
                yield at, norms[at], math.exp(middle)


def _sizes(low: LowRank) -> tuple[int, int, int]:
    """(groups, out, in) of what a product changes."""
    return low.B.shape[0], low.B.shape[1], low.A.shape[2]


def _fits(low: LowRank, shape: torch.Size) -> bool:
    groups, out, in_ = _sizes(low)
    return groups * out * in_ == shape.numel() and (
        len(shape) != 2 or sorted((groups * out, in_)) == sorted(shape)
    )


def _read(weights: BaseWeights, at: str) -> Tensor | None:
    weight = weights.get(at)
    return None if weight is None else weight.read()
