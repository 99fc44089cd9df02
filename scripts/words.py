"""Count names and sentences that a reader has to look up elsewhere.

    python scripts/words.py                check the bounds of each folder in BOUNDS
    python scripts/words.py DIR [--list]   the counts of one folder; --list names each place

Counted over all bound names (arguments, assignments, loop variables, functions, attributes):

    vague        names that fit any variable: one, own, found, part, made, …
    participles  functions named after what was done to something (told, made, asked)

and over comments and docstrings: sentences that begin with a relative clause ("Who has none …",
"Whose …"). Such a name or sentence is not always wrong, so each folder has a bound instead of zero.
"""

from __future__ import annotations

import ast
import collections
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: by folder: the largest share of vague names and of participles, and the most relative clauses
BOUNDS = {
    "src/veneer": (0.015, 0.010, 15),
    "tests/support": (0.030, 0.020, 30),
    "benchmarks": (0.030, 0.020, 30),
    "scripts": (0.030, 0.020, 30),
}

_VAGUE_WORDS = (
    "one own found told what part parts made said given kept seen asked known whole other"
    " others at place places which where now who left taken there here does way ways thing"
    " things stuff tell"
)
VAGUE = frozenset(_VAGUE_WORDS.split())
PARTICIPLE = re.compile(
    r"_?(told|made|asked|said|seen|given|kept|taken|known|found|left|gone|met|held|drawn|shown"
    r"|written|worn|begun|[a-z]+(?<!n)(?<!f)(?<!sp)(?<!se)ed)"
)
#: words that end like a participle, and participles that are terms of the field
_TERM_WORDS = (
    "seed need feed embed speed shared named id closed running cached_property fused"
    " materialised factored masked packed padded truncated merged quantised resized sorted"
    " detached nested red"
)
TERMS = frozenset(_TERM_WORDS.split())
RELATIVE = re.compile(
    r"(?:^|[.:] )(Who|Whose|Whoever|What|Whatever|Those|That which)\b(?! is the| does| to )"
)
#: arguments of functions that make error messages
ERROR_ARGUMENTS = {"found", "expected", "do"}


@dataclass
class Counts:
    """The counts of one folder. ``places``: a line of text for each counted name or sentence."""

    names: int = 0
    functions: int = 0
    vague: collections.Counter[str] = field(default_factory=collections.Counter)
    participles: int = 0
    sentences: int = 0
    relative: int = 0
    wide: int = 0
    places: list[str] = field(default_factory=list)

    @property
    def vague_share(self) -> float:
        return self.vague.total() / max(self.names, 1)

    @property
    def participle_share(self) -> float:
        return self.participles / max(self.functions, 1)

    def __str__(self) -> str:
        return (
            f"vague {self.vague.total()} of {self.names} names ({self.vague_share:.1%});"
            f" participles {self.participles} of {self.functions} functions"
            f" ({self.participle_share:.1%}); relative clauses {self.relative} in"
            f" {self.sentences} sentences; {self.wide} lines over 100"
        )


def bound_names(tree: ast.AST) -> Iterator[tuple[str, int, bool]]:
    """(name, line, whether it names a function) for each name that a module binds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            arguments = node.args
            names = [
                argument.arg
                for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
            ]
            makes_errors = "found" in names and {"expected", "do"}.intersection(names)
            ignored = {"self", "cls", "_"} | (ERROR_ARGUMENTS if makes_errors else set())
            yield from ((name, node.lineno, False) for name in names if name not in ignored)
            if not isinstance(node, ast.Lambda) and not node.name.startswith("__"):
                yield node.name, node.lineno, True
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id != "_":
            yield node.id, node.lineno, False
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno, False


def prose(text: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of each docstring and comment of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield getattr(node, "lineno", 1), ast.get_docstring(node, clean=True) or ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("#: ")


def count_file(path: Path, counts: Counts) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    for name, line, is_function in bound_names(tree):
        counts.names += 1
        bare = name.strip("_")
        if is_function:
            counts.functions += 1
            if PARTICIPLE.fullmatch(name) and bare not in TERMS:
                counts.participles += 1
                counts.places.append(f"{path}:{line}: def {name}")
        if bare.rstrip("0123456789") in VAGUE:
            counts.vague[bare] += 1
            counts.places.append(f"{path}:{line}: {name}")
    for line, block in prose(text, tree):
        counts.sentences += len(re.findall(r"[.!?](?:\s|$)", block)) or bool(block)
        clauses = len(RELATIVE.findall(block))
        counts.relative += clauses
        if clauses:
            counts.places.append(f"{path}:{line}: {block.strip().splitlines()[0][:80]}")
    counts.wide += sum(len(line) > 100 for line in text.splitlines())


def count_folder(folder: Path) -> Counts:
    counts = Counts()
    for path in sorted(folder.rglob("*.py")):
        count_file(path, counts)
    return counts


def check_bounds() -> list[str]:
    """Print the counts of each folder in BOUNDS. Returns a problem for each folder above them."""
    problems = []
    for folder, (most_vague, most_participles, most_relative) in BOUNDS.items():
        counts = count_folder(ROOT / folder)
        print(f"{folder}: {counts}")
        is_within = (
            counts.vague_share <= most_vague
            and counts.participle_share <= most_participles
            and counts.relative <= most_relative
        )
        if not is_within:
            problems.append(
                f"{folder} exceeds its bounds: vague {most_vague:.1%}, participles"
                f" {most_participles:.1%}, relative clauses {most_relative}."
                f" List the places: python scripts/words.py {folder} --list"
            )
    return problems


def main(arguments: list[str]) -> int:
    folders = [argument for argument in arguments if not argument.startswith("--")]
    if not folders:
        problems = check_bounds()
        print(*problems, sep="\n", file=sys.stderr, end="\n" if problems else "")
        return 1 if problems else 0
    for folder in folders:
        counts = count_folder(Path(folder))
        if "--list" in arguments:
            print(*counts.places, sep="\n")
        print("most common:", ", ".join(f"{n} {c}" for n, c in counts.vague.most_common(20)))
        print(f"{folder}: {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
