"""The trust that a store is read with: the file, read again whenever it changes, and what was seen before."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

from modelpress.trust.policy import Policy, now, parse_policy, read_bytes
from modelpress.trust.seen import Seen


class Trust:
    """A trust file, followed: a key that is revoked in it stops counting in processes that run.

    Every method is safe to call from threads.
    """

    def __init__(self, path: Path, seen: Seen, *, pardoned: str | None = None) -> None:
        """
        Args:
            path: the trust file.
            seen: how far pointers were seen.
            pardoned: id of a key that counts though it is revoked or expired.
        """
        self.path, self.seen = path, seen
        self._pardoned = pardoned
        self._lock = threading.Lock()
        self._read: tuple[bytes, Policy] | None = None

    def policy(self) -> Policy:
        """What the file says now.

        Raises:
            TrustFileError: see `read_policy`; nothing is trusted then.
        """
        return self._current()[1]

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the file, and of which of its keys count at this moment: keys begin and expire by themselves.

        Raises:
            TrustFileError: see `policy`.
        """
        (data, policy), moment = self._current(), now()
        counting = [key.id for key in policy.keys if key.state(moment) is None]
        return hashlib.sha256("\n".join([hashlib.sha256(data).hexdigest(), *counting]).encode()).hexdigest()

    def _current(self) -> tuple[bytes, Policy]:
        data = read_bytes(self.path)
        with self._lock:
            if self._read is None or self._read[0] != data:
                policy = parse_policy(data, self.path)
                self._read = data, policy.pardoning(self._pardoned) if self._pardoned else policy
            return self._read

    def pardoning(self, key_id: str) -> Trust:
        """The same trust, with one revoked or expired key counted: to sign again what it signed."""
        return Trust(self.path, self.seen, pardoned=key_id)
