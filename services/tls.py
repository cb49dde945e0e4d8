"""TLS between processes: certificates out of PEM files, checked when they are read, followed when they change.

Servers look at their files with every handshake, so a rotated certificate is used from the next connection on. Used by
every gRPC server and channel and by the REST front. Knows no torch.
"""

from __future__ import annotations

import contextlib
import logging
import ssl
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from services.config import TlsSection
from services.errors import StartupError
from services.files import Stamp, stamp

log = logging.getLogger(__name__)

# In place of a CA file: the public authorities that the library ships.
SYSTEM = "system"
# How long gRPC's connections wait when a server has a new certificate; calls on standing ones may, too. Far below the
# time after which a silent peer is given up.
GRACE_S = 0.25


@dataclass(frozen=True, slots=True)
class Pem:
    """The bytes of the files; None for one that is not given."""

    chain: bytes | None
    key: bytes | None = field(repr=False)
    ca: bytes | None


def read(section: TlsSection) -> Pem:
    """The files of a section.

    Raises:
        StartupError: one cannot be read or is no PEM, the key is another's, or the certificate is not valid now.
    """
    if bool(section.cert) != bool(section.key):
        raise StartupError("tls: cert and key go together: give both or none")
    ca = None
    if section.ca not in ("", SYSTEM):
        ca = _bytes(section.ca)
        _certificates(ca, section.ca)
    if not section.cert:
        return Pem(None, None, ca)
    chain, key = _bytes(section.cert), _bytes(section.key)
    leaf = _certificates(chain, section.cert)[0]
    try:
        private = serialization.load_pem_private_key(key, None)
    except (ValueError, TypeError) as error:
        raise StartupError(f"tls: {section.key} holds no private key in PEM without a passphrase") from error
    if private.public_key() != leaf.public_key():
        raise StartupError(f"tls: the key in {section.key} is not that of the certificate in {section.cert}")
    first, last, now = leaf.not_valid_before_utc, leaf.not_valid_after_utc, datetime.now(UTC)
    if not first <= now <= last:
        when = f"expired at {last:%Y-%m-%d %H:%M}" if now > last else f"is valid only from {first:%Y-%m-%d %H:%M} on"
        raise StartupError(f"tls: the certificate in {section.cert} {when} (UTC)")
    return Pem(chain, key, ca)


def stamps(section: TlsSection) -> tuple[Stamp, ...]:
    """Differs when a file of the section was written or replaced."""
    return stamp(section.cert), stamp(section.key), stamp(section.ca)


def channel_credentials(section: TlsSection) -> grpc.ChannelCredentials:
    """What a client connects with.

    Raises:
        StartupError: as `read`.
    """
    pem = read(section)
    return grpc.ssl_channel_credentials(pem.ca, pem.key, pem.chain)


class ServerCertificates:
    """What a server shows, and whom it lets in: with a CA, only clients that show a certificate signed by it.

    Files that have changed and cannot be used are not: the server goes on with the ones before, and says so in its log.

    Raises:
        StartupError: as `read`, when it is made; or the section has no certificate.
    """

    def __init__(self, section: TlsSection) -> None:
        if not section.cert or section.ca == SYSTEM:
            raise StartupError("tls: a server needs cert and key; its ca is the file that signed the clients it takes")
        self._section = section
        # gRPC's threads and the event loop of a REST front look at the files at once.
        self._reading = threading.Lock()
        self._stamp = stamps(self._section)
        self._pem = read(section)

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For `add_secure_port`."""
        shown = self._pem

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal shown
            before, shown = shown, self._current()
            if shown is before:
                return None
            # gRPC frees what it showed until now as soon as this returns, while another thread that was told "as
            # before" may be about to use it: then the process dies (grpc/grpc#36693). Who comes here now waits for this
            # call, and who has been here needs microseconds of a processor: that makes it rare enough.
            time.sleep(GRACE_S)
            return _configuration(shown)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(shown),
            fetch,  # type: ignore[arg-type]  # None, "as before", is missing in the stubs
            require_client_authentication=bool(self._section.ca),
        )

    def ssl_context(self) -> ssl.SSLContext:
        """For an HTTP server. A new CA counts after a restart only."""
        shown, context = self._pem, self._context()

        def follow(connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext) -> None:
            nonlocal shown, context
            # The files may be changing under us: then it is the next connection that gets the new one.
            with contextlib.suppress(OSError):
                if shown is not self._current():
                    shown, context = self._pem, self._context()
            connection.context = context

        context.sni_callback = follow
        return context

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self._section.cert, self._section.key)
        if self._section.ca:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self._section.ca)
        return context

    def _current(self) -> Pem:
        with self._reading:
            now = stamps(self._section)
            if now != self._stamp:
                self._stamp = now
                self._read_again()
            return self._pem

    def _read_again(self) -> None:
        try:
            pem = read(self._section)
        except StartupError as error:
            log.error("the certificate stays as it was: %s", error)
            return
        # Files written anew with what they held before are no reason to let connections wait.
        if pem != self._pem:
            self._pem = pem
            log.info("read the certificate in %s again", self._section.cert)


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    assert pem.key is not None and pem.chain is not None
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.chain)], pem.ca)


def _bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise StartupError(f"tls: {path} cannot be read: {error.strerror}") from error


def _certificates(pem: bytes, path: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise StartupError(f"tls: {path} holds no certificate in PEM") from error
