"""Name the extra of Veneer (``veneer[train]``, …) that installs a missing package."""

from __future__ import annotations

import re
from importlib import metadata

#: module -> package, where their names differ
_PACKAGES = {"yaml": "pyyaml", "google": "protobuf"}
#: extras from smallest to largest; each contains those before it, so the first match is the
#: smallest extra with a package
_ORDER = ("cli", "train", "serve", "remote")


def extra_with(module: str) -> str | None:
    """Return the smallest extra (``pip install 'veneer[…]'``) that installs a module, or None."""
    top = module.partition(".")[0]
    package = _PACKAGES.get(top, top).replace("_", "-").lower()
    extras = []
    for requirement in metadata.requires("veneer") or ():
        name, extra = (
            re.match(r"[\w.-]+", requirement),
            re.search(r"extra == ['\"]([\w-]+)['\"]", requirement),
        )
        if name and extra and name[0].replace("_", "-").lower() == package:
            extras.append(extra[1])
    ranked = sorted(
        extras, key=lambda extra: (_ORDER.index(extra) if extra in _ORDER else len(_ORDER), extra)
    )
    return next(iter(ranked), None)


def missing_package(error: ModuleNotFoundError) -> str | None:
    """Return the error text for a missing package, or None if no extra of Veneer contains it."""
    extra = extra_with(error.name or "")
    if extra is None:
        return None
    package = str(error.name).partition(".")[0]
    return (
        f"Found: no Python package {package!r}. Expected: veneer[{extra}]. Do: pip install"
        f" 'veneer[{extra}]'."
    )
