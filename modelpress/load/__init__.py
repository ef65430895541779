"""From a name to verified tensors: resolve, read, check every digest, fail closed.

Nothing is taken for granted: the manifest must have the digest that names it, every blob the digest that the manifest
says, every tensor and file the digest of its own bytes.
"""

from modelpress.load.layouts import Layout, pull
from modelpress.load.names import MAX_MANIFEST_BYTES, MIN_PREFIX, load_manifest, resolve
from modelpress.load.read import fetcher, load_checkpoint, open_pack, verify

__all__ = [
    "MAX_MANIFEST_BYTES",
    "MIN_PREFIX",
    "Layout",
    "fetcher",
    "load_checkpoint",
    "load_manifest",
    "open_pack",
    "pull",
    "resolve",
    "verify",
]
