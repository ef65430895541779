"""Models by name from the Hugging Face Hub: `hf://OWNER/NAME@REVISION`, of one commit, safetensors alone."""

from __future__ import annotations

import re
from pathlib import Path

from modelpress.errors import SetupError, WorkloadError

PREFIX = "hf://"
NAME = re.compile(r"hf://([\w.-]+/[\w.-]+)@([0-9a-f]{40})")
FILES = ["*.json", "*.safetensors", "README.md", "1_Pooling/config.json"]
"""What is fetched: no pickled weights, no code."""


def fetch(model: str) -> Path:
    """The folder of a model in the Hub's local cache, fetched first where it is not there.

    Raises:
        WorkloadError: not such a name, or the Hub has no such model or revision.
        SetupError: it is not in the cache, and the Hub cannot be reached or is switched off.
    """
    found = NAME.fullmatch(model)
    if found is None:
        raise WorkloadError(
            f"reading the name {model}",
            found=repr(model),
            expected="hf://OWNER/NAME@REVISION, the revision a commit's 40 hexadecimal digits",
            fix="pin the commit that the model's page shows under 'Files': a branch changes under a run",
        )
    from huggingface_hub import errors, snapshot_download

    doing = f"fetching {model} from the Hugging Face Hub"
    repository, revision = found.groups()
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=FILES))
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise WorkloadError(
            doing,
            found=str(error).strip().splitlines()[0],
            expected="a model that is public, or that HF_TOKEN may read",
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, errors.IncompleteSnapshotError, OSError) as error:
        raise SetupError(
            doing,
            found=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:300],
            expected="the model in the local cache (HF_HOME), or a Hub that answers",
            fix=f"where there is Internet: hf download {repository} --revision {revision}; then copy that cache here, "
            "or give workload.model the path of a folder with the model",
        ) from error
