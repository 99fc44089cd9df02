"""The table of all results, and docs/peft-cases.md: counts by family and way, and every refusal by
its reason."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .ways import EQUAL, REFUSED, WRONG, Result


@dataclass(frozen=True)
class Reason:
    """Why results are refused: the ``pattern`` of their texts, and what a user does then."""

    pattern: str
    title: str
    do: str


_PEFT_SAVES = "Let PEFT save it as LoRA (`save_as_lora`), or merge it there and take the difference (`veneer extract`)."
_FROM_ON = "Keep the adapter beside the base, as with PEFT: no weight acts on some tokens alone."
_REPEATED = (
    "Load it on a base that has these layers: [Repeated layers](from-peft.md#repeated-layers)."
)
_RESEARCH = r"kasa_config|velora_config|monteclora_config|use_bdlora"
_GROUPS = (
    "Neither can say the other's change: train the layer in full (`modules_to_save`, `train_also`)."
)
_FLAT = "Exclude that layer, or run each adapter on its rows alone; PEFT cannot mix them either."
#: the first whose pattern a text has counts
REASONS = [
    Reason(_pattern, _title, _do)
    for _pattern, _title, _do in (
        ("invocation tokens", "aLoRA, merged", _FROM_ON),
        ("layer_replication", "Layers that PEFT repeats", _REPEATED),
        (
            _RESEARCH,
            "Options of LoRA that are research of its own",
            "Run it in PEFT; its merged model is one like any.",
        ),
        (
            "a bias for .* which has none",
            "A bias that a layer does not have, merged",
            "Keep the adapter beside the base, or give the layer a bias of zeros first.",
        ),
        (
            "one of the modules that share this weight",
            "Trained tokens of a tied weight that the model does not declare, saved for PEFT",
            "Load it with Veneer; for PEFT, untie the base first, or name both modules.",
        ),
        (
            "whose 'weight' others read past it",
            "A change of what a module gives, merged",
            "Keep the adapter beside the base, or train one with Veneer, which every reader of the weight sees.",
        ),
        ("peft_type '", "Other tuners of PEFT", _PEFT_SAVES),
        (
            r"is no change of its weight|one product for all \d+ groups",
            "Convolutions in groups",
            _GROUPS,
        ),
        (
            r"out-projection \d times",
            "The out-projection of `nn.MultiheadAttention`, which PEFT applies twice",
            "Load it with Veneer; for PEFT, merge it into the base.",
        ),
        (
            "reads the weight itself, past",
            "A weight that is read past its module",
            "Leave that layer out of the targets, or merge the adapter with the library that trained it.",
        ),
        (
            "rescales the outputs of modules alone",
            "DoRA of a tied weight",
            "Load it with Veneer; for PEFT, untie the base and train both, or merge it.",
        ),
        (
            r"do not hold the \d+ rows",
            "A model that flattens rows and tokens, in a mixed batch",
            _FLAT,
        ),
    )
]


def reason_of(text: str) -> Reason | None:
    return next((reason for reason in REASONS if re.search(reason.pattern, text)), None)


def unexplained(results: Iterable[Result]) -> list[Result]:
    """Refusals with a text that no reason knows: each needs one, with what a user can do."""
    return [
        result for result in results if result.status == REFUSED and reason_of(result.text) is None
    ]


def summary(results: Iterable[Result]) -> str:
    counts = Counter(result.status for result in results)
    return ", ".join(f"{counts[status]} {status}" for status in (EQUAL, REFUSED, WRONG))


def page(results: list[Result], ways: Mapping[str, str], versions: str) -> str:
    """The generated page. ``ways``: what each means, by its name."""
    cases = len({(result.family, result.name) for result in results})
    lines = [
        "# PEFT's cases",
        "",
        "Written by `python -m tests.peft_cases`, which runs every case; nothing here is typed.",
        "",
        f"The models and configs of PEFT's own tests, told again in our words (`tests/peft_cases/`): {cases} cases and",
        f"{len(results):,} results, {summary(results)}. {versions}",
        "",
        "**Equal** is within 1e-9 of the other library's output in float64 (the small models) and 2e-5 in float32",
        "(those of transformers), relative to its norm; ten times that where weights are merged or rows mixed, and",
        "1e-5 where PEFT decomposes in 32 bits. What is trained has random numbers, B too. **Refused** is an error",
        "that says what was found and what to do, and nothing half applied; a case that cannot be loaded ends there.",
        "",
        "| way | what must be equal |",
        "|---|---|",
        *(f"| {way} | {meaning} |" for way, meaning in ways.items()),
        "",
        "## Counts",
        "",
        *_counts(results),
        "",
        "## What is refused",
        "",
        *_refusals(results),
    ]
    if wrong := [result for result in results if result.status == WRONG]:
        lines += ["", "## What is wrong", "", "| case | way | |", "|---|---|---|"]
        lines += [
            f"| {_cell(result.name)} | {result.way} | {_cell(result.text)} |" for result in wrong
        ]
    return "\n".join([*lines, ""])


def _counts(results: list[Result]) -> list[str]:
    families = list(dict.fromkeys(result.family for result in results))
    lines = ["| family | way | equal | refused | wrong |", "|---|---|---|---|---|"]
    for family in families:
        own = [result for result in results if result.family == family]
        for way in dict.fromkeys(result.way for result in own):
            counts = Counter(result.status for result in own if result.way == way)
            lines.append(
                f"| {family} | {way} | "
                + " | ".join(str(counts[s]) for s in (EQUAL, REFUSED, WRONG))
                + " |"
            )
    counts = Counter(result.status for result in results)
    lines.append(
        "| **all** | | " + " | ".join(f"**{counts[s]}**" for s in (EQUAL, REFUSED, WRONG)) + " |"
    )
    return lines


def _refusals(results: list[Result]) -> list[str]:
    refused = [result for result in results if result.status == REFUSED]
    lines: list[str] = []
    for reason in [*REASONS, None]:
        own = [result for result in refused if reason_of(result.text) is reason]
        if own:
            title, do = (
                (reason.title, reason.do) if reason is not None else ("Without a reason", "")
            )
            lines += [f"### {title}: {len(own)}", "", do, "", f"> {_cell(own[0].text)}", ""]
            cases: dict[str, list[str]] = {}
            for result in own:
                cases.setdefault(result.name, []).append(result.way)
            lines += [*(f"- {_cell(name)} ({', '.join(ways)})" for name, ways in cases.items()), ""]
    return lines[:-1] or ["Nothing."]


def _cell(text: str) -> str:
    """A text in a line of a table: without line breaks, bars, and the folder of a run."""
    text = re.sub(r"\S*/tmp\w*/(\S+)", r"\1", " ".join(text.split()))
    return re.sub(r"([|*_<>`\[\]])", r"\\\1", text[:300] + "…" * (len(text) > 300))
