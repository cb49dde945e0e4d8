"""An HTTP(S) server of pictures that behaves and misbehaves by the path that is asked for."""

from __future__ import annotations

import contextlib
import itertools
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PNG = b"\x89PNG\r\n\x1a\n" + b"\x00" * 100


@dataclass
class PictureServer:
    """`asked` has (Host header, path) of every request; `/to/URL` redirects there."""

    port: int
    asked: list[tuple[str, str]] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server

    def do_GET(self) -> None:
        self.server.made.asked.append((self.headers["Host"], self.path))
        if self.path.startswith("/to/"):
            self._head(302, Location=self.path.removeprefix("/to/"))
        elif self.path == "/endless":
            self._head(200)
            self._send(itertools.repeat(PNG * 500), 0)
        elif self.path == "/slow":
            self._head(200)
            self._send((bytes([byte]) for byte in PNG), 1)
        elif self.path == "/gzip":
            self._head(200, **{"Content-Encoding": "gzip"})
        elif self.path in ("/a.png", "/html"):
            self._head(200, **{"Content-Type": "image/png" if self.path == "/a.png" else "text/html"})
            self.wfile.write(PNG)
        else:
            self._head(404)

    def _send(self, pieces: Iterable[bytes], pause_s: float) -> None:
        with contextlib.suppress(OSError):
            for piece in pieces:
                self.wfile.write(piece)
                time.sleep(pause_s)

    def _head(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Notes what it is asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.made = PictureServer(self.server_address[1])

    def handle_error(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def picture_server(context: ssl.SSLContext | None = None) -> Iterator[PictureServer]:
    """Serves from a thread."""
    server = Server()
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.made
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
