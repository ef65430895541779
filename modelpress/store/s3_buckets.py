"""Make a bucket: what the local stack does for its own S3 server, and no other part of modelpress does."""

from __future__ import annotations

from modelpress.settings import Settings
from modelpress.store.s3_client import connect
from modelpress.store.s3_errors import translated


def make_bucket(name: str, settings: Settings) -> bool:
    """Make a bucket where there is none of this name; whether it was made.

    Raises:
        StoreError: the server refuses it, or does not answer.
    """
    client, where, _ = connect(name, settings)
    with translated(f"making bucket {name!r}", where):
        if name in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
            return False
        client.create_bucket(Bucket=name)
    return True
