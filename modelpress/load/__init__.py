"""From a name to verified tensors: resolve, read, check every digest, fail closed.

Nothing is taken for granted: the manifest must have the digest that names it, every blob the digest that the manifest
says, every tensor and file the digest of its own bytes.
"""

from modelpress.load.layouts import Layout, pull
from modelpress.load.names import MAX_MANIFEST_BYTES, MIN_PREFIX, check_trust, load_manifest, resolve
from modelpress.load.read import Parts, fetcher, load_checkpoint, open_parts, verify
from modelpress.load.stream import stream_tensors
from modelpress.load.targets import open_pack, open_session, state_dict

__all__ = [
    "MAX_MANIFEST_BYTES",
    "MIN_PREFIX",
    "Layout",
    "Parts",
    "check_trust",
    "fetcher",
    "load_checkpoint",
    "load_manifest",
    "open_pack",
    "open_parts",
    "open_session",
    "pull",
    "resolve",
    "state_dict",
    "stream_tensors",
    "verify",
]
