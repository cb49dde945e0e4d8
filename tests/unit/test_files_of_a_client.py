"""Files that a client brings, and names that it gives results."""

from __future__ import annotations

import pytest

from lightloom import AsyncClient, Media
from lightloom.client import Result
from services.errors import InvalidRequest

RESULT = Result("r1", "video/mp4", 64, 64, 0, {}, b"clip", 9, 16.0)


async def test_pictures_come_by_name_and_a_missing_one_is_named(tmp_path):
    picture = tmp_path / "first.png"
    picture.write_bytes(b"bytes")
    async with AsyncClient("127.0.0.1:1") as client:
        for images in ([tmp_path / "none.png"], [str(tmp_path / "none.png")]):
            with pytest.raises(InvalidRequest, match=r"none\.png', which cannot be read: No such file"):
                await client.generate("a circle", images=images)
        with pytest.raises(Exception, match="127.0.0.1:1"):
            await client.generate("a circle", images=[str(picture), picture, b"more", Media("image/png", b"m", "mask")])


def test_a_result_is_not_saved_as_what_it_is_not(tmp_path):
    with pytest.raises(InvalidRequest, match="the result is video/mp4, and 'clip.webp' says image/webp"):
        RESULT.save(tmp_path / "clip.webp")
    assert not list(tmp_path.iterdir())
    for name in ("clip.mp4", "clip", "clip.raw"):
        assert RESULT.save(tmp_path / name).read_bytes() == b"clip"
