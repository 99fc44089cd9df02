"""Allow cross-origin requests of browsers (CORS) from the origins that ``--cors`` names.

Before a page sends JSON or a key to another origin, its browser sends a preflight request, without
a key, to ask whether the page may do so. The browser lets the page read an answer only if the
answer names the page's origin. Credentials of the browser (cookies, certificates) are never
allowed: an API key is a header that the page sets.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from starlette.responses import Response

from veneer.serve.refusal import Refusal

ANY_ORIGIN = "*"
ALLOWED_METHODS = "GET, HEAD, POST, PUT, DELETE"
#: response headers that a page may read in addition to the standard ones
EXPOSED_HEADERS = "x-request-id, retry-after"
#: seconds for which a browser may cache the answer to a preflight
CACHE_SECONDS = 600
#: a valid list of header names in a preflight. Any names are allowed, because clients add names
#: such as x-stainless-…
_HEADER_NAMES = re.compile(r"[A-Za-z0-9-]{1,64}(?: *, *[A-Za-z0-9-]{1,64}){0,63}")


def origin_headers(origins: Collection[str], origin: str | None) -> list[tuple[bytes, bytes]]:
    """The CORS headers of the response to a request from ``origin`` (None: no Origin header), on a
    server that allows ``origins``. Empty if ``origins`` is empty."""
    if not origins:
        return []
    if ANY_ORIGIN in origins:
        allowed_origin, headers = ANY_ORIGIN, []
    else:
        allowed_origin = origin if origin in origins else None
        headers = [(b"vary", b"Origin")]
    if allowed_origin is not None:
        headers.append((b"access-control-allow-origin", allowed_origin.encode()))
        headers.append((b"access-control-expose-headers", EXPOSED_HEADERS.encode()))
    return headers


def is_preflight(method: str, headers: Any) -> bool:
    """Whether a request is a preflight, with which a browser asks for permission to send a page's
    request."""
    return (
        method == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers
    )


def preflight_response(origins: Collection[str], headers: Any) -> Response:
    """The response to a preflight. It lacks ``origin_headers``, which ``Guard`` adds to all
    responses. ``Refusal``: the origin is not allowed."""
    origin = headers["origin"]
    if ANY_ORIGIN not in origins and origin not in origins:
        raise Refusal(
            403,
            f"the origin {origin[:200]!r}",
            "one that the server allows",
            "start the server with --cors ORIGIN",
            code="origin",
        )
    requested_names = headers.get("access-control-request-headers", "")
    response_headers = {
        "access-control-allow-methods": ALLOWED_METHODS,
        "access-control-max-age": str(CACHE_SECONDS),
        "access-control-allow-headers": (
            requested_names
            if _HEADER_NAMES.fullmatch(requested_names)
            else "authorization, content-type"
        ),
    }
    return Response(status_code=204, headers=response_headers)
