"""The form of `POST /v1/images/edits`: pictures as files beside the fields of `ImageRequest`."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from gateway.http_inputs import media_of_bytes
from gateway.http_schema import ImageRequest
from services.errors import InvalidRequest
from services.request import Media

MAX_FILES = 16
MAX_FIELDS = 64


def form_description() -> dict[str, Any]:
    """The form, for the OpenAPI description."""
    schema = ImageRequest.model_json_schema()
    file = {"type": "string", "format": "binary"}
    schema["properties"] |= {"image": {"type": "array", "items": file, "description": "The pictures to edit."}}
    schema |= {"title": "ImageEdit", "required": ["prompt", "image"], "description": "Files, and fields as text."}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


async def read_form(request: Request) -> tuple[ImageRequest, tuple[Media, ...]]:
    """The fields and the pictures of the request's body.

    Raises:
        InvalidRequest: no form, no picture, or one that is none.
        RequestValidationError: a field that is wrong.
        HTTPException: the body is too large.
    """
    try:
        async with request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS) as form:
            if not form:
                raise InvalidRequest("the body holds no fields: send multipart/form-data with prompt and image")
            return _fields_of(form), await _pictures_of(form)
    except HTTPException as error:
        if error.status_code != 400:
            raise
        raise InvalidRequest(f"the body cannot be read as multipart/form-data: {error.detail}") from error


def _fields_of(form: FormData) -> ImageRequest:
    fields: dict[str, str] = {}
    for name, value in form.multi_items():
        if isinstance(value, str):
            if name in fields:
                raise InvalidRequest(f"{name[:100]} is there twice: send it once", param=name[:100])
            fields[name] = value
    try:
        # A form has nothing but text: "3" is a number here.
        return ImageRequest.model_validate(fields, strict=False)
    except ValidationError as error:
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]) from error


async def _pictures_of(form: FormData) -> tuple[Media, ...]:
    pictures = []
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            # Clients mark several files of one name with brackets.
            kind = name.removesuffix("[]")[:100]
            if kind != "image":
                raise InvalidRequest(f"unknown file {kind!r}: send the pictures to edit, as image", param=kind)
            pictures.append(media_of_bytes(await value.read(), value.content_type or "", kind))
    if not pictures:
        raise InvalidRequest("image is missing: send multipart/form-data with the picture as a file", param="image")
    return tuple(pictures)
