"""Least rights on a bucket: who publishes creates, who serves reads, who collects garbage deletes; nobody does two.

::

    python infra/s3/policies.py show  --bucket B --prefix models --server arn:aws:iam::111122223333:role/serving
    python infra/s3/policies.py apply --bucket B --prefix models --publisher ARN --server ARN --collector ARN

`--rollback ARN` beside `--server ARN` lets a server append to pointers, for MODELPRESS_SERVING_ROLLBACK.

`show` prints the policy, `apply` puts it on the bucket, with the rights of whoever runs it (the owner of the bucket).
Statements of the bucket's policy that are not modelpress's stay; its own are replaced. A role can be given several
times. A principal of Ceph RGW is `arn:aws:iam:::user/NAME`. The templates in policies/ are also good without their
`Principal`, as policies of IAM roles.

Where the server has it (AWS does), a bucket can moreover refuse to overwrite: deny s3:PutObject on packs/* where
`s3:if-none-match` is null. Ceph RGW knows no such condition; there the digests alone tell.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError

ROLES = ("publisher", "server", "rollback", "collector")
HELP = {
    "publisher": "who publishes and promotes",
    "server": "who serves",
    "rollback": "which server may also move pointers back",
    "collector": "who collects garbage",
}
FOLDER = Path(__file__).parent / "policies"
OURS = "Modelpress"


def statements(role: str, users: list[str], bucket: str, prefix: str) -> list[dict[str, Any]]:
    """The statements of a role for these users, on `bucket` below `prefix` (empty, or without slashes at its ends)."""
    text = (FOLDER / f"{role}.json").read_text()
    text = text.replace("${BUCKET}", bucket).replace("${PREFIX}", f"{prefix}/" if prefix else "")
    found: list[dict[str, Any]] = json.loads(text)["Statement"]
    for statement in found:
        statement["Principal"] = {"AWS": users}
    return found


def policy(users: dict[str, list[str]], bucket: str, prefix: str, kept: list[dict[str, Any]]) -> dict[str, Any]:
    """The bucket's policy: what is kept of the present one, and the roles' statements."""
    foreign = [statement for statement in kept if not str(statement.get("Sid", "")).startswith(OURS)]
    ours = [one for role in ROLES if users.get(role) for one in statements(role, users[role], bucket, prefix)]
    return {"Version": "2012-10-17", "Statement": [*foreign, *ours]}


def present(client: Any, bucket: str) -> list[dict[str, Any]]:
    """Statements of the policy that the bucket has; a single one may stand there without a list."""
    try:
        found: Any = json.loads(client.get_bucket_policy(Bucket=bucket)["Policy"])["Statement"]
    except ClientError as error:
        if error.response["Error"]["Code"] == "NoSuchBucketPolicy":
            return []
        raise
    return [found] if isinstance(found, dict) else list(found)


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("command", choices=["show", "apply"])
    parser.add_argument("--bucket", required=True)
    parser.add_argument("--prefix", default="", help="of the store in the bucket")
    for role in ROLES:
        parser.add_argument(f"--{role}", action="append", default=[], metavar="ARN", help=HELP[role])
    arguments = parser.parse_args()
    users = {role: getattr(arguments, role) for role in ROLES}
    if not any(users.values()):
        parser.error("give " + ", ".join(f"--{role}" for role in ROLES))
    place = (arguments.bucket, arguments.prefix.strip("/"))
    if arguments.command == "show":
        print(json.dumps(policy(users, *place, []), indent=2))
        return 0
    endpoint, region = os.environ.get("MODELPRESS_S3_ENDPOINT_URL"), os.environ.get("MODELPRESS_S3_REGION", "us-east-1")
    client = boto3.session.Session().client("s3", endpoint_url=endpoint or None, region_name=region)
    try:
        document = policy(users, *place, present(client, arguments.bucket))
        client.put_bucket_policy(Bucket=arguments.bucket, Policy=json.dumps(document))
    except (BotoCoreError, ClientError) as error:
        print(f"no policy was put on bucket {arguments.bucket}: {error}", file=sys.stderr)
        return 1
    print(f"bucket {arguments.bucket}: {len(document['Statement'])} statements")
    return 0


if __name__ == "__main__":
    sys.exit(main())
