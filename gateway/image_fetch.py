"""Pictures by URL: fetched from listed hosts only, within bounds, and never from inside the network by accident.

A gateway stands where its callers do not, next to services that trust it. So the host must be on the list, the address
that it resolves to must be a public one (or of a listed network), the connection goes to that very address, and each
redirect is treated like a URL of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
import ssl
from collections.abc import AsyncIterator, Sequence

import httpx

from gateway.config import InputsSection
from gateway.http_inputs import media_of_bytes
from services.errors import InvalidRequest, StartupError
from services.request import MAX_INPUT_BYTES, Media

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
MAX_REDIRECTS = 3
MAX_URL_CHARS = 2048
# At once, so that what is in memory stays bounded whatever comes.
MAX_FETCHES = 8
INSTEAD = "send the picture itself, as data:image/png;base64,..."
_PORTS = {"https": 443, "http": 80}
# Addresses that carry another one inside.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class ImageFetcher:
    """Fetches for all requests of a gateway.

    Raises:
        StartupError: an entry of the lists cannot be read.
    """

    def __init__(self, section: InputsSection) -> None:
        self._hosts = frozenset(_entry(text) for text in section.image_hosts)
        self._networks = tuple(_network(text) for text in section.image_networks)
        self._timeout_s = section.fetch_timeout_s
        self._slots = asyncio.Semaphore(MAX_FETCHES)
        # Neither proxies nor credentials of this process's environment are the caller's to use.
        self._client = httpx.AsyncClient(
            verify=_trust(section.image_ca), trust_env=False, follow_redirects=False, timeout=None
        )

    async def fetch(self, urls: Sequence[tuple[str, str]]) -> dict[str, Media]:
        """The pictures behind (parameter, URL) pairs, by URL; together no larger than the inputs of a request may be.

        Raises:
            InvalidRequest: a URL that is not allowed, or nothing usable behind it within the time.
        """
        found: dict[str, Media] = {}
        for param, url in urls:
            if url not in found:
                left = MAX_INPUT_BYTES - sum(len(media.data) for media in found.values())
                found[url] = await self._one(url, param, left)
        return found

    async def _one(self, url: str, param: str, max_bytes: int) -> Media:
        if not self._hosts:
            raise InvalidRequest(f"{param} is a URL, and this gateway fetches none: {INSTEAD}", param=param)
        try:
            async with asyncio.timeout(self._timeout_s), self._slots:
                data, mime = await self._follow(url, param, max_bytes)
        except TimeoutError as error:
            raise InvalidRequest(f"{param} did not come within {self._timeout_s:g} s", param=param) from error
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, OSError) as error:
            raise InvalidRequest(f"{param} cannot be fetched: {type(error).__name__}", param=param) from error
        return media_of_bytes(data, mime, param)

    async def _follow(self, text: str, param: str, max_bytes: int) -> tuple[bytes, str]:
        if len(text) > MAX_URL_CHARS:
            raise InvalidRequest(f"{param} has more than {MAX_URL_CHARS} characters", param=param)
        url = httpx.URL(text)
        for _ in range(MAX_REDIRECTS + 1):
            async with self._get(url, param) as answer:
                if answer.is_redirect:
                    url = url.join(answer.headers.get("location", ""))
                    continue
                if answer.status_code != 200:
                    raise InvalidRequest(f"{param} cannot be fetched: HTTP {answer.status_code}", param=param)
                return await _read(answer, param, max_bytes), _mime(answer)
        raise InvalidRequest(f"{param} cannot be fetched: more than {MAX_REDIRECTS} redirects", param=param)

    @contextlib.asynccontextmanager
    async def _get(self, url: httpx.URL, param: str) -> AsyncIterator[httpx.Response]:
        origin = (url.scheme, url.host, url.port or _PORTS.get(url.scheme, 0))
        if origin not in self._hosts or url.userinfo:
            raise InvalidRequest(
                f"{param} leads to {url.scheme[:10]}://{url.host[:100]}, where this gateway fetches nothing: {INSTEAD}",
                param=param,
            )
        address = await self._address(url.host, origin[2], param)
        # To the address that was checked: the name could resolve to another one the second time.
        request = self._client.build_request(
            "GET",
            url.copy_with(host=str(address), fragment=None),
            headers={"Host": url.netloc.decode("ascii"), "Accept": "image/*", "Accept-Encoding": "identity"},
            extensions={"sni_hostname": url.raw_host.decode("ascii")},
        )
        answer = await self._client.send(request, stream=True)
        try:
            yield answer
        finally:
            await answer.aclose()

    async def _address(self, host: str, port: int, param: str) -> Address:
        infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [ipaddress.ip_address(str(info[4][0]).partition("%")[0]) for info in infos]
        if not addresses or not all(self._is_allowed(address) for address in addresses):
            raise InvalidRequest(f"{param} leads to an address that is not public: it is not fetched", param=param)
        return addresses[0]

    def _is_allowed(self, address: Address) -> bool:
        plain = address.ipv4_mapped or address if isinstance(address, ipaddress.IPv6Address) else address
        if any(plain in network for network in self._networks):
            return True
        carrying = isinstance(plain, ipaddress.IPv6Address) and (plain.sixtofour or plain.teredo or plain in _NAT64)
        return plain.is_global and not plain.is_multicast and not carrying

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()


async def _read(answer: httpx.Response, param: str, max_bytes: int) -> bytes:
    if answer.headers.get("content-encoding", "identity") != "identity":
        raise InvalidRequest(f"{param} comes compressed, which nobody asked for: it is not read", param=param)
    data = bytearray()
    async for chunk in answer.aiter_raw():
        data += chunk
        if len(data) > max_bytes:
            raise InvalidRequest(
                f"{param} is too large: the inputs of a request may have {MAX_INPUT_BYTES} bytes in all", param=param
            )
    return bytes(data)


def _mime(answer: httpx.Response) -> str:
    mime: str = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    return mime


def _entry(text: str) -> tuple[str, str, int]:
    """`host`, `host:port` or `http://host:port` as (scheme, host, port)."""
    try:
        url = httpx.URL(text if "://" in text else f"https://{text}")
    except httpx.InvalidURL as error:
        raise StartupError(f"inputs.image_hosts has {text!r}: write HOST, HOST:PORT or http://HOST:PORT") from error
    if (
        url.scheme not in _PORTS
        or not re.fullmatch(r"[a-z0-9:.-]+", url.raw_host.decode("ascii"))
        or url.raw_path != b"/"
        or url.userinfo
    ):
        raise StartupError(f"inputs.image_hosts has {text!r}: write HOST, HOST:PORT or http://HOST:PORT")
    return url.scheme, url.host, url.port or _PORTS[url.scheme]


def _trust(ca: str) -> ssl.SSLContext | bool:
    if not ca:
        return True
    try:
        return ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise StartupError(f"inputs.image_ca {ca} cannot be used: {error.strerror or error}") from error


def _network(text: str) -> Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise StartupError(f"inputs.image_networks has {text!r}: write a network as 10.1.0.0/16") from error
