"""The page at /docs: the OpenAPI description as HTML, and a form to try each call. It needs nothing from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

Schema = Mapping[str, Any]
PAGE = Template((Path(__file__).parent / "docs.html").read_text())
# What a value may be between, as OpenAPI writes it and as people do.
BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "maxItems": "at most {} of them",
}


def docs_page(api: Schema) -> str:
    """The page for an API's OpenAPI description."""
    named = api.get("components", {}).get("schemas", {})
    calls = [
        _call(method, path, call, named) for path, methods in api["paths"].items() for method, call in methods.items()
    ]
    return PAGE.substitute(title=escape(api["info"]["title"]), calls="\n".join(calls))


def _call(method: str, path: str, call: Schema, named: Schema) -> str:
    parameters = [
        (item["name"], type_text(item["schema"], named), item.get("description", ""), item.get("required", False))
        for item in call.get("parameters", [])
    ]
    body = call.get("requestBody", {}).get("content", {})
    tables = [_table(f"Parameters in {method.upper()} {path}", parameters)] if parameters else []
    tables += [_table(f"Body, {kind}", list(_fields(part["schema"], named))) for kind, part in body.items()]
    answers = "".join(
        f"<li><b>{status}</b> {escape(' '.join((answer.get('description', ''), *answer.get('content', {}))))}</li>"
        for status, answer in call["responses"].items()
    )
    kind = next(iter(body), "")
    files = _files(body[kind]["schema"], named) if kind else []
    text = escape(call.get("description", ""))
    return (
        f"<details><summary><code>{method.upper()} {escape(path)}</code> {text}</summary>"
        f"{''.join(tables)}<p>Answers</p><ul>{answers}</ul>{_form(method, path, call, kind, files)}</details>"
    )


def _form(method: str, path: str, call: Schema, kind: str, files: list[str]) -> str:
    parameters = "".join(
        f"<label>{escape(item['name'])} <input name='{escape(item['name'])}' data-in='{item['in']}'></label> "
        for item in call.get("parameters", [])
        if item["in"] in ("path", "query")
    )
    body = f"<textarea name=body>{escape(json.dumps({'prompt': 'a red circle'}))}</textarea>" if kind else ""
    choosers = "".join(f"<label>{name} <input type=file name={name} multiple></label> " for name in files)
    return (
        f"<form data-method='{method.upper()}' data-path='{escape(path)}' data-kind='{kind}'>"
        f"{parameters}{body}{choosers}<button>Send</button><pre></pre></form>"
    )


def _table(title: str, rows: list[tuple[str, str, str, bool]]) -> str:
    lines = "".join(
        f"<tr><td><code>{escape(name)}</code>{' (required)' if required else ''}</td>"
        f"<td>{escape(kind)}</td><td>{escape(text)}</td></tr>"
        for name, kind, text, required in rows
    )
    return f"<p>{escape(title)}</p><table>{lines}</table>"


def _fields(schema: Schema, named: Schema, prefix: str = "") -> Iterator[tuple[str, str, str, bool]]:
    """(name, type, description, required) of an object's fields, and of those of the objects in its lists."""
    schema = _resolved(schema, named)
    for name, field in schema.get("properties", {}).items():
        yield (
            f"{prefix}{name}",
            type_text(field, named),
            field.get("description", ""),
            name in schema.get("required", []),
        )
        items = _resolved(field.get("items", {}), named)
        yield from _fields(items, named, f"{prefix}{name}[].")


def _files(schema: Schema, named: Schema) -> list[str]:
    """The fields that are files."""
    fields = _resolved(schema, named).get("properties", {})
    return [name for name, field in fields.items() if field.get("items", {}).get("format") == "binary"]


def type_text(schema: Schema, named: Schema) -> str:
    """A type in words: "integer, at least 1, at most 10"; null is left out, for a field may be left out as well."""
    schema = _resolved(schema, named)
    if "anyOf" in schema:
        kinds = [type_text(kind, named) for kind in schema["anyOf"] if kind.get("type") != "null"]
        return " or ".join(kinds)
    if "enum" in schema:
        return " | ".join(json.dumps(value) for value in schema["enum"])
    if schema.get("type") == "array":
        text = f"list of {type_text(schema.get('items', {}), named)}"
    else:
        text = "file" if schema.get("format") == "binary" else str(schema.get("type", "any"))
    return ", ".join([text, *(words.format(_whole(schema[key])) for key, words in BOUNDS.items() if key in schema)])


def _whole(bound: float) -> float:
    """10 and not 10.0."""
    return int(bound) if bound == int(bound) else bound


def _resolved(schema: Schema, named: Schema) -> Schema:
    target: Schema = named[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    return target
