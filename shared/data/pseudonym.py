"""Pseudonymous ids: salted hashes. The salt stays on this machine, beside the stores and never inside one."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

SALT_FILE = ".samgraft-salt"


def pseudonym(kind: str, key: str, *, salt: str) -> str:
    """Return ``<kind>_`` and 12 hex digits, e.g. ``p_3f0c...``.

    Twelve digits are 48 bits: among 100,000 patients two collide with a probability of 2e-5.
    """
    return f"{kind}_{hashlib.sha256(f'{salt}/{kind}/{key}'.encode()).hexdigest()[:12]}"


def local_salt(folder: Path) -> str:
    """Return the salt of the stores in a folder, making it once.

    Stores in one folder share it, so that a patient has one id in all of them and the leak guard can compare.
    """
    path = folder / SALT_FILE
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{SALT_FILE}.{os.getpid()}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        try:
            os.link(temporary, path)  # fails if another process was first: then its salt counts
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    return path.read_text().strip()
