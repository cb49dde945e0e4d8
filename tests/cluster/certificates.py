"""Certificates for tests, signed by authorities of their own."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import trustme


def new_authority(folder: Path) -> tuple[trustme.CA, dict[str, str]]:
    """A CA, and the files of a certificate for this machine (`ca`, `cert`, `key`) that it signed, in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    return authority, {"ca": str(folder / "ca.pem"), **issue(authority, folder)}


def issue(authority: trustme.CA, folder: Path, not_after: datetime | None = None) -> dict[str, str]:
    """The files of a new certificate, `cert` and `key`; those of the same folder are written over."""
    folder.mkdir(parents=True, exist_ok=True)
    leaf = authority.issue_cert("127.0.0.1", "localhost", not_after=not_after)
    # The key first, as a careful rotation would not: between the two files, a reader must keep what it had.
    leaf.private_key_pem.write_to_path(str(folder / "key.pem"))
    leaf.cert_chain_pems[0].write_to_path(str(folder / "cert.pem"))
    return {"cert": str(folder / "cert.pem"), "key": str(folder / "key.pem")}
