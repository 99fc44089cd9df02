"""The page at ``/docs`` (``--docs``): the routes and bodies that ``/openapi.json`` describes, as
HTML.

The server writes the page itself, without a script. The usual viewers of OpenAPI (Swagger UI,
ReDoc) are loaded from another host, which the page's content security policy forbids and which a
server without a network cannot reach.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from html import escape
from typing import Any

from fastapi import APIRouter, Request, Response

from veneer.serve import page

router = APIRouter(include_in_schema=False)

Schema = Mapping[str, Any]


@router.get("/docs")
async def docs(request: Request) -> Response:
    page_html = await asyncio.to_thread(lambda: render(request.app.openapi()))
    headers = {**page.HEADERS, "Cache-Control": "no-cache"}
    return Response(page_html, media_type="text/html; charset=utf-8", headers=headers)


def render(openapi_description: Schema) -> str:
    """The HTML page for an OpenAPI description (the content of ``/openapi.json``)."""
    title = escape(openapi_description["info"]["title"])
    operations = [
        (method.upper(), path, operation)
        for path, methods in openapi_description["paths"].items()
        for method, operation in methods.items()
    ]
    schemas = openapi_description.get("components", {}).get("schemas", {})
    html_lines = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{title}: the API</title>",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<link rel="icon" type="image/svg+xml" href="web/{page.DIGEST}/icon.svg">',
        f'<link rel="stylesheet" href="web/{page.DIGEST}/page.css"></head>',
        f'<body class="docs"><main><h1>{title}</h1>',
        '<p class="words">The same as JSON: <a href="openapi.json">openapi.json</a></p>',
        *(_operation_section(*operation) for operation in operations),
        *(_schema_section(name, schema) for name, schema in sorted(schemas.items())),
        "</main></body></html>",
    ]
    return "\n".join(html_lines)


def _operation_section(method: str, path: str, operation: Schema) -> str:
    """The HTML section of a route: its description, its parameters and the schema of its body."""
    description = operation.get("description") or operation.get("summary", "")
    parameter_rows = [
        (
            entry["name"],
            _type_of(entry.get("schema", {})),
            entry["in"] + ("" if entry.get("required") else ", optional"),
        )
        for entry in operation.get("parameters", ())
    ]
    body_content = operation.get("requestBody", {}).get("content", {})
    body_html = "".join(
        f"<p>Body: {_type_of(media.get('schema', {}))}</p>" for media in body_content.values()
    )
    heading_html = f"<h2><code>{method} {escape(path)}</code></h2>"
    heading_html += f"<p>{escape(description)}</p>" if description else ""
    return f'<section class="card">{heading_html}{_table(parameter_rows)}{body_html}</section>'


def _schema_section(name: str, schema: Schema) -> str:
    """The HTML section of a schema: a table of its fields, or its type if it lists none."""
    required_fields = schema.get("required", ())
    field_rows = [
        (field, _type_of(entry), _field_note(entry, is_required=field in required_fields))
        for field, entry in schema.get("properties", {}).items()
    ]
    content_html = _table(field_rows) if field_rows else f"<p>{_type_of(schema)}</p>"
    description_html = escape(schema.get("description", ""))
    heading_html = f"<h2>{escape(name)}</h2><p>{description_html}</p>"
    return f'<section class="card" id="{escape(name)}">{heading_html}{content_html}</section>'


def _table(rows: list[tuple[str, str, str]]) -> str:
    """An HTML table. Each row is a name, a type in HTML, and a note."""
    if not rows:
        return ""
    rows_html = (
        f"<tr><td><code>{escape(name)}</code></td><td>{type_html}</td><td>{escape(note)}</td></tr>"
        for name, type_html, note in rows
    )
    return f"<table>{''.join(rows_html)}</table>"


def _field_note(schema: Schema, *, is_required: bool) -> str:
    """The note on a field in its table: "required", or the default, or "" if there is neither."""
    if is_required:
        return "required"
    return "" if schema.get("default") is None else f"default {schema['default']}"


def _type_of(schema: Schema) -> str:
    """The type that a schema describes, in HTML."""
    if "$ref" in schema:
        name = escape(str(schema["$ref"]).rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " or ".join(map(_type_of, schema[union]))
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return escape(", ".join(map(repr, values)))
    if schema.get("type") == "array":
        return f"list of {_type_of(schema.get('items', {}))}{_bounds(schema)}"
    if isinstance(schema.get("additionalProperties"), Mapping):
        return f"object of {_type_of(schema['additionalProperties'])}"
    return escape(str(schema.get("type", "anything"))) + _bounds(schema)


def _bounds(schema: Schema) -> str:
    """The bounds that a schema sets, as English text, such as ", at least 0"."""
    words_by_field = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
        "minLength": "at least so many characters:",
        "maxLength": "at most so many characters:",
        "minItems": "at least so many:",
        "maxItems": "at most so many:",
    }
    return "".join(
        f", {words} {schema[field]:,}" for field, words in words_by_field.items() if field in schema
    )
