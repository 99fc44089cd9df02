"""The web page at ``/``, with its files in ``web/``.

All files except the page itself are served under ``/web/<digest>/``. The digest is the hash of all
files together, so browsers may cache them for ever. The page contains the digest and is not
cached. The page needs no key, but its requests to the API do.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request, Response

FOLDER = Path(__file__).parent / "web"
TYPES = {
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}

# The page runs scripts of this server only. No script can turn a text, such as a model's output,
# into HTML.
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def digest(files: dict[str, bytes]) -> str:
    """The hash of all files with their names, as 16 hexadecimal digits."""
    file_hash = hashlib.sha256()
    for name, content in sorted(files.items()):
        file_hash.update(f"{name}\0{len(content)}\0".encode() + content)
    return file_hash.hexdigest()[:16]


# The files are read once: a running server serves one version, even after an update on disk.
FILES = {file.name: file.read_bytes() for file in sorted(FOLDER.iterdir()) if file.suffix in TYPES}
PAGE = (FOLDER / "index.html").read_bytes()
DIGEST = digest({**FILES, "index.html": PAGE})
INDEX = PAGE.replace(b"web/@/", f"web/{DIGEST}/".encode())

router = APIRouter(include_in_schema=False)


@router.api_route("/", methods=["GET", "HEAD"])
def index(request: Request) -> Response:
    """The page; status 304 if the client has this version."""
    headers = {**HEADERS, "Cache-Control": "no-cache", "ETag": f'"{DIGEST}"'}
    client_tags = [
        tag.strip().removeprefix("W/")
        for tag in request.headers.get("If-None-Match", "").split(",")
    ]
    if headers["ETag"] in client_tags or "*" in client_tags:
        return Response(status_code=304, headers=headers)
    return Response(INDEX, media_type="text/html; charset=utf-8", headers=headers)


@router.api_route("/web/{version}/{name}", methods=["GET", "HEAD"])
def file(version: str, name: str) -> Response:
    """A file of the page, which clients may cache for ever. Status 404: no such name or version."""
    if version != DIGEST or name not in FILES:
        return Response("Not found", 404, media_type="text/plain; charset=utf-8", headers=HEADERS)
    headers = {**HEADERS, "Cache-Control": "public, max-age=31536000, immutable"}
    return Response(FILES[name], media_type=TYPES[Path(name).suffix], headers=headers)
