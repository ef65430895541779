"""Every error that modelpress raises on purpose.

::

    ModelpressError
    ├── ConfigError                 a value in a config, a setting or an argument is not legal
    │   └── TrustFileError          the file of trusted keys can't be used
    ├── SetupError                  this machine lacks something: a package, a provider, a free port
    ├── WorkloadError               the user's model, data or metric does not fit together
    │   └── OverlapError            training, calibration and evaluation data share samples
    ├── StageError                  a stage could not do its work
    │   ├── ExportError             the model has no ONNX graph
    │   ├── CoverageError           a stage touched nothing, or less than it had to
    │   ├── OutOfMemoryError        a stage asked for more memory than there was
    │   ├── WorkerError             a worker process died, or took too long, before its slice was done
    │   └── BudgetExceededError     the quality budget is spent; the flow stops here
    ├── FormatError                 bytes are not what the format says
    │   ├── CorruptionError         a digest, a length or a checksum does not match
    │   │   └── LogCutError         a pointer's log lost or changed an entry that was seen before
    │   └── UnsupportedFormatError  a newer format version, an unknown codec
    ├── StoreError                  object storage refused or failed
    │   ├── NotFoundError           no object under this key
    │   ├── ConflictError           the object exists already, with other content
    │   ├── AccessDeniedError       wrong key, or a key without this right
    │   ├── StoreUnavailableError   no answer within the deadline
    │   ├── StoreFullError          no space left
    │   └── StoreUnfitError         the store lacks what publishing needs (conditional writes)
    ├── TrustError                  what a signature should vouch for is not vouched for
    │   ├── UnsignedError           there is no signature, or none of a role that is required
    │   ├── SignatureError          a signature is malformed, wrong, or of something else
    │   └── KeyRefusedError         the key is unknown, revoked, expired or not for this pack
    ├── EncryptionKeyError          the key that opens a secret or a pack is not here, or is another
    ├── PageError                   a page can't be drawn, or the page of a run not be kept
    ├── InputError                  what somebody sent can't be made into what the model takes
    ├── GateError                   the gate refused the promotion
    └── ServingError                the server cannot load or answer
        └── SelfTestError           a loaded pack does not answer what it answered when it was published

A message is built from its parts, so that each says what was being done, what was found, what was expected and
the way out; a reader in a terminal and a program that reads the attributes see the same.
"""

from __future__ import annotations

from typing import ClassVar


class ModelpressError(Exception):
    """Base of all errors of modelpress.

    Args:
        doing: what was being done, to which stage, tensor, shard or key ("reading tensor 'conv1.weight'").
        found: what was there.
        expected: what should have been there.
        fix: the way out.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self, doing: str, *, found: str | None = None, expected: str | None = None, fix: str | None = None
    ) -> None:
        self.doing, self.found, self.expected, self.fix = doing, found, expected, fix
        super().__init__(doing, found, expected, fix)

    def __str__(self) -> str:
        parts = [self.doing]
        for label, text in (("found", self.found), ("expected", self.expected), ("fix", self.fix)):
            if text:
                parts.append(f"{label}: {text}")
        return "\n  ".join(parts)


class ConfigError(ModelpressError):
    """A value in a config, a setting or an argument is not legal."""

    exit_code = 2


class TrustFileError(ConfigError):
    """The file of trusted keys can't be used."""


class SetupError(ModelpressError):
    """This machine lacks something that was asked for."""

    exit_code = 3


class WorkloadError(ModelpressError):
    """The user's model, data or metric does not fit together."""

    exit_code = 4


class OverlapError(WorkloadError):
    """Training, calibration and evaluation data share samples."""


class StageError(ModelpressError):
    """A stage could not do its work."""

    exit_code = 5


class ExportError(StageError):
    """The model has no ONNX graph."""


class CoverageError(StageError):
    """A stage touched nothing, or less than it had to."""


class OutOfMemoryError(StageError):
    """A stage asked for more memory than there was."""


class WorkerError(StageError):
    """A worker process died, or took too long, before its slice was done."""


class BudgetExceededError(StageError):
    """The quality budget is spent; the flow stops here."""

    exit_code = 6


class FormatError(ModelpressError):
    """Bytes are not what the format says."""

    exit_code = 7


class CorruptionError(FormatError):
    """A digest, a length or a checksum does not match."""


class LogCutError(CorruptionError):
    """A pointer's log lost, or changed, an entry that was seen before."""


class UnsupportedFormatError(FormatError):
    """A newer format version or an unknown codec."""


class StoreError(ModelpressError):
    """Object storage refused or failed."""

    exit_code = 8


class NotFoundError(StoreError):
    """No object under this key."""


class ConflictError(StoreError):
    """The object exists already, with other content."""


class AccessDeniedError(StoreError):
    """The key is wrong, or has not this right."""


class StoreUnavailableError(StoreError):
    """No answer within the deadline."""


class StoreFullError(StoreError):
    """No space left on the store or on the local disk."""


class StoreUnfitError(StoreError):
    """The store lacks what publishing needs."""


class EncryptionKeyError(ModelpressError):
    """The key that opens a model's secret, or the secret that opens a pack, is not here, or is another."""

    exit_code = 12


class TrustError(ModelpressError):
    """What a signature should vouch for is not vouched for."""

    exit_code = 11


class UnsignedError(TrustError):
    """There is no signature, or none of a role that is required."""


class SignatureError(TrustError):
    """A signature is malformed, wrong, or of something else."""


class KeyRefusedError(TrustError):
    """The key is unknown, revoked, expired or not for this pack."""


class PageError(ModelpressError):
    """A page can't be drawn, or the page of a run can't be kept."""


class InputError(ModelpressError):
    """What somebody sent, a text or an image, can't be made into what the model takes."""

    exit_code = 4


class GateError(ModelpressError):
    """The gate refused the promotion."""

    exit_code = 9


class ServingError(ModelpressError):
    """The server cannot load or answer."""

    exit_code = 10


class SelfTestError(ServingError):
    """A loaded pack does not answer what it answered when it was published."""
