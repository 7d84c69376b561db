"""Patients and DICOM UIDs -> keys that tell who belongs together and not who they are.

HMAC-SHA256 under a salt of the project's own, kept in a file that goes into no store. The same salt gives the same
keys, so data imported on two machines agree when both have the file; without it nobody can try all patient numbers.
"""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from medrl.errors import DataError

SALT_FILE = Path(".medrl-salt")
"""Of the folder a project works in."""
_SALT_BYTES = 32
_KEY_DIGITS = 16


class Salt:
    """The secret of one project."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    @classmethod
    def open(cls, path: Path = SALT_FILE) -> "Salt":
        """The salt in the file ``path``; made, readable by its owner alone, when there is none.

        Raises:
            DataError: the file holds no salt.
        """
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(_SALT_BYTES) + "\n")
        except FileExistsError:
            pass
        wanted = f"it must hold {2 * _SALT_BYTES} hex digits; name another file, and it is made"
        try:
            secret = bytes.fromhex(path.read_text(encoding="ascii").strip())
        except (ValueError, OSError) as error:
            raise DataError(f"salt {path} cannot be read ({type(error).__name__}): {wanted}") from error
        if len(secret) < _SALT_BYTES:
            raise DataError(f"salt {path} holds {len(secret)} bytes: {wanted}")
        return cls(secret)

    def key(self, kind: str, value: str) -> str:
        """16 hex digits for ``value``; ``kind`` (``patient``, ``series``...) keeps equal numbers of two kinds apart."""
        return hmac.new(self._secret, f"{kind}\0{value.strip()}".encode(), hashlib.sha256).hexdigest()[:_KEY_DIGITS]
