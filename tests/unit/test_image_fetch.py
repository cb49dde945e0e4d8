"""Pictures by URL, from real servers: what is fetched, what is refused, and that the checked address is called."""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.config import InputsSection
from gateway.image_fetch import ImageFetcher
from services.errors import InvalidRequest, StartupError
from tests.cluster.certificates import new_authority
from tests.cluster.picture_server import PNG, PictureServer, picture_server

HERE = ("127.0.0.0/8", "::1/128")


@pytest.fixture(scope="module")
def server() -> Iterator[PictureServer]:
    with picture_server() as running:
        yield running


@asynccontextmanager
async def fetcher(*hosts: str, networks: tuple[str, ...] = HERE, **options: Any) -> AsyncIterator[ImageFetcher]:
    made = ImageFetcher(InputsSection(image_hosts=hosts, image_networks=networks, **options))
    yield made
    await made.close()


async def refusal(fetching: ImageFetcher, url: str) -> str:
    with pytest.raises(InvalidRequest) as error:
        await fetching.fetch([("input_image.0", url)])
    assert error.value.param == "input_image.0"
    return error.value.message


async def test_a_listed_host_is_fetched_from(server: PictureServer) -> None:
    url = f"http://127.0.0.1:{server.port}/a.png"
    async with fetcher(f"http://127.0.0.1:{server.port}") as fetching:
        found = await fetching.fetch([("a", url), ("b", url)])
        assert (found[url].mime, found[url].data) == ("image/png", PNG)
        redirected = f"http://127.0.0.1:{server.port}/to/a.png"
        assert (await fetching.fetch([("a", redirected.replace("/to/", "/to//"))]))[redirected.replace("/to/", "/to//")]


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/a.png",
        "https://127.0.0.1:{port}/a.png",
        "http://127.0.0.1:1/a.png",
        "http://127.0.0.1/a.png",
        "http://localhost:{port}/a.png",
        "http://127.0.0.1.:{port}/a.png",
        "http://2130706433:{port}/a.png",
        "http://me@127.0.0.1:{port}/a.png",
        "http://127.0.0.1:{port}@example.com/a.png",
        "http://127.0.0.1:{port}/to/http://example.com/a.png",
        "http://127.0.0.1:{port}/to/file:///etc/passwd",
        "http://127.0.0.1:{port}/to/https://127.0.0.1:{port}/a.png",
    ],
)
async def test_nothing_else_is_fetched_from(server: PictureServer, url: str) -> None:
    async with fetcher(f"http://127.0.0.1:{server.port}") as fetching:
        message = await refusal(fetching, url.format(port=server.port))
    assert "where this gateway fetches nothing: send the picture itself" in message


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none", "cannot be fetched: HTTP 404"),
        ("endless", "too large: the inputs of a request may have 7340032 bytes"),
        ("slow", "did not come within 1 s"),
        ("gzip", "comes compressed"),
        ("html", "says it is text/html, but its bytes are image/png"),
        ("to/http://127.0.0.1:{port}/to/http://127.0.0.1:{port}/to//to//to//a.png", "more than 3 redirects"),
    ],
)
async def test_bounds(server: PictureServer, path: str, message: str) -> None:
    async with fetcher(f"http://127.0.0.1:{server.port}", fetch_timeout_s=1.0 if path == "slow" else 30.0) as fetching:
        assert message in await refusal(fetching, f"http://127.0.0.1:{server.port}/{path.format(port=server.port)}")


async def test_without_a_list_nothing_is_fetched() -> None:
    async with fetcher() as fetching:
        assert "this gateway fetches none: send the picture itself" in await refusal(
            fetching, "https://example.com/a.png"
        )


async def test_an_address_inside_the_network_is_not_called(server: PictureServer) -> None:
    asked = len(server.asked)
    async with fetcher(f"http://localhost:{server.port}", networks=()) as fetching:
        assert "an address that is not public" in await refusal(fetching, f"http://localhost:{server.port}/a.png")
    assert len(server.asked) == asked


@pytest.mark.parametrize(
    ("address", "allowed"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("10.1.2.3", False),
        ("10.7.0.1", True),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.7.0.1", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
    ],
)
async def test_which_addresses_are_called(address: str, allowed: bool) -> None:
    async with fetcher("a", networks=("10.7.0.0/16",)) as fetching:
        assert fetching._is_allowed(ipaddress.ip_address(address)) is allowed


async def test_the_address_that_was_checked_is_the_one_that_is_called(tmp_path: Path, monkeypatch) -> None:
    """A name that resolves once to this machine, and to nothing ever after; its certificate is checked by its name."""
    authority, files = new_authority(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("pictures.test").configure_cert(context)
    answers = [[(2, 1, 6, "", ("127.0.0.1", 0))]]

    async def resolve(_loop: Any, host: str, *_: Any, **__: Any) -> list[Any]:
        assert host == "pictures.test"
        return answers.pop()

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolve)
    with picture_server(context) as server:
        host = f"pictures.test:{server.port}"
        async with fetcher(host, image_ca=files["ca"]) as fetching:
            url = f"https://{host}/a.png"
            assert (await fetching.fetch([("a", url)]))[url].data == PNG
        assert server.asked == [(host, "/a.png")] and not answers


async def test_a_certificate_of_another_name_or_authority_is_refused(tmp_path: Path) -> None:
    authority, files = new_authority(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("elsewhere.test").configure_cert(context)
    with picture_server(context) as server:
        for options in ({"image_ca": files["ca"]}, {}):
            async with fetcher(f"localhost:{server.port}", **options) as fetching:
                message = await refusal(fetching, f"https://localhost:{server.port}/a.png")
                assert message == "input_image.0 cannot be fetched: ConnectError"
        assert not server.asked


@pytest.mark.parametrize("entry", ["*.example.com", "ftp://a", "https://a/b", "a b", "https://me@a", ""])
def test_wrong_hosts_start_nothing(entry: str) -> None:
    with pytest.raises(StartupError, match="write HOST, HOST:PORT or http://HOST:PORT"):
        ImageFetcher(InputsSection(image_hosts=(entry,)))


def test_wrong_networks_and_authorities_start_nothing(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="write a network as 10.1.0.0/16"):
        ImageFetcher(InputsSection(image_networks=("10.1.0.1/16",)))
    with pytest.raises(StartupError, match="image_ca .* cannot be used: No such file"):
        ImageFetcher(InputsSection(image_ca=str(tmp_path / "none")))
