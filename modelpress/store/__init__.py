"""Object storage: one small interface over S3 and over a local folder.

`open_store` makes a store from a URI; `Store` is what publishing and loading are written against, and
`tests/store/conformance.py` is what every implementation passes.
"""

from modelpress.store.base import ObjectInfo, Store, Unfinished, open_store

__all__ = ["ObjectInfo", "Store", "Unfinished", "open_store"]
