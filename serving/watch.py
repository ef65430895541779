"""Who watches a way in that is not HTTP: the keys that count there, what is written down, and what is counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serving.audit import Audit
    from serving.keyring import Keyring
    from serving.metrics import Metrics
    from serving.tracing import Traces


@dataclass(frozen=True)
class Watch:
    """The same that `serving.guard.Guard` has for HTTP."""

    keyring: Keyring
    audit: Audit
    metrics: Metrics
    traces: Traces | None = None
    """None: spans go nowhere."""
