"""Forms: pictures as files beside the fields of a body, as OpenAI's clients send them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from gateway.http_inputs import media_of_bytes
from gateway.http_schema import ImageRequest, StrictBody
from services.errors import InvalidRequest
from services.request import Media

MAX_FILES = 16
MAX_FIELDS = 64
Body = TypeVar("Body", bound=StrictBody)


@dataclass(frozen=True, slots=True)
class Form(Generic[Body]):
    """What a form may hold.

    Attributes:
        body: the fields, as text.
        file: the name of its pictures.
        about: what they are for.
        required: whether there must be one.
        others: what further files may be there, one of each name, which is an input's role; and what they are for.
    """

    body: type[Body]
    file: str
    about: str
    required: bool
    others: Mapping[str, str] = field(default_factory=dict)


EDIT = Form(
    ImageRequest,
    "image",
    "The pictures to edit.",
    required=True,
    others={"mask": "Transparent where the (first) picture is to be edited, and of its size."},
)


def form_description(form: Form[Any]) -> dict[str, Any]:
    """The form, for the OpenAPI description: beside a JSON body where no picture is needed."""
    fields = form.body.model_json_schema()
    file = {"type": "string", "format": "binary"}
    files: dict[str, Any] = {form.file: {"type": "array", "items": file, "description": form.about}}
    files |= {name: {**file, "description": about} for name, about in form.others.items()}
    required = ["prompt", form.file] if form.required else ["prompt"]
    schema = fields | {"properties": fields["properties"] | files, "required": required}
    schema |= {"title": f"{form.body.__name__}Form", "description": "Files, and fields as text."}
    content: dict[str, Any] = {"multipart/form-data": {"schema": schema}}
    if not form.required:
        content["application/json"] = {"schema": fields}
    return {"requestBody": {"required": True, "content": content}}


async def read_form(request: Request, form: Form[Body]) -> tuple[Body, tuple[Media, ...]]:
    """The fields and the pictures of the request's body.

    Raises:
        InvalidRequest: no form, no picture where one is needed, or one that is none.
        RequestValidationError: a field that is wrong.
        HTTPException: the body is too large.
    """
    try:
        async with request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS) as data:
            if not data:
                raise InvalidRequest(f"the body holds no fields: send multipart/form-data with prompt and {form.file}")
            return _fields_of(data, form.body), await _pictures_of(data, form)
    except HTTPException as error:
        if error.status_code != 400:
            raise
        raise InvalidRequest(f"the body cannot be read as multipart/form-data: {error.detail}") from error


def _fields_of(data: FormData, body: type[Body]) -> Body:
    fields: dict[str, str] = {}
    for name, value in data.multi_items():
        if isinstance(value, str):
            # So do clients write a field of an object, and this one names a picture.
            name = name.removesuffix("[image_url]")
            if name in fields:
                raise InvalidRequest(f"{name[:100]} is there twice: send it once", param=name[:100])
            fields[name] = value
    try:
        # A form has nothing but text: "3" is a number here.
        return body.model_validate(fields, strict=False)
    except ValidationError as error:
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]) from error


async def read_body(request: Request, form: Form[Body]) -> tuple[Body, tuple[Media, ...]]:
    """A form, or the same fields as JSON.

    Raises:
        InvalidRequest, RequestValidationError, HTTPException: as `read_form`, and for JSON that is none.
    """
    if request.headers.get("content-type", "").lower().startswith(("multipart/", "application/x-www-form-urlencoded")):
        return await read_form(request, form)
    try:
        return form.body.model_validate_json(await request.body()), ()
    except ValidationError as error:
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]) from error


async def _pictures_of(data: FormData, form: Form[Any]) -> tuple[Media, ...]:
    pictures = []
    for name, value in data.multi_items():
        if isinstance(value, UploadFile):
            # Clients mark several files of one name with brackets.
            kind = name.removesuffix("[]")[:100]
            if kind != form.file and kind not in form.others:
                allowed = ", ".join((form.file, *form.others))
                raise InvalidRequest(f"unknown file {kind!r}: allowed are {allowed}", param=kind)
            role = kind if kind in form.others else "image"
            pictures.append(media_of_bytes(await value.read(), value.content_type or "", kind, role))
    if form.required and all(media.role != "image" for media in pictures):
        raise InvalidRequest(
            f"{form.file} is missing: send multipart/form-data with the picture as a file", param=form.file
        )
    return tuple(pictures)
