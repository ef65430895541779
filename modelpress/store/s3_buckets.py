"""Buckets and rights on them: what the local stack does for its own S3 server, and no other part of modelpress does."""

from __future__ import annotations

import json

from botocore.exceptions import ClientError

from modelpress import keys
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


def let_count(bucket: str, prefix: str, principal: str, settings: Settings) -> bool:
    """Let a key that may only read write what a server counts of a canary, where the bucket has no policy yet.

    Args:
        bucket: that holds the store.
        prefix: of the store in it.
        principal: whose key it is, as an ARN.
        settings: of who owns the bucket.

    Returns:
        Whether a policy was put; one that stands there is somebody's, and stays.

    Raises:
        StoreError: the server refuses it, or does not answer.
    """
    client, where, _ = connect(bucket, settings)
    statement = {
        "Sid": "ModelpressServerCounts",
        "Effect": "Allow",
        "Principal": {"AWS": [principal]},
        "Action": ["s3:PutObject"],
        "Resource": [f"arn:aws:s3:::{bucket}/{prefix}/{keys.CANARIES}*"],
    }
    with translated(f"letting {principal} write below {bucket}/{prefix}/{keys.CANARIES}", where):
        try:
            client.get_bucket_policy(Bucket=bucket)
        except ClientError as error:
            if error.response["Error"]["Code"] != "NoSuchBucketPolicy":
                raise
        else:
            return False
        client.put_bucket_policy(Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [statement]}))
    return True
