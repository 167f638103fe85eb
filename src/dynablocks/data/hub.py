"""Parquet files of a data set from the Hugging Face Hub, or from its local cache when there is no network."""

from __future__ import annotations

import os
from pathlib import Path

from dynablocks.errors import BadData


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE asks to stay off the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in {"1", "ON", "YES", "TRUE"}


def fetch_parquet(repository: str) -> Path:
    """The folder with the parquet files of the Hub data set ``repository``; they are downloaded once.

    With HF_HUB_OFFLINE set or no network, the newest cached copy is used.

    Raises:
        BadData: there is neither a network nor a cached copy; the sentence says why.
    """
    reason = "HF_HUB_OFFLINE is set"
    if not is_offline():
        try:
            return _download(repository)
        except Exception as error:
            # The library raises its own errors, its HTTP client's and the system's; all mean "not from there".
            reason = f"the Hub could not be reached: {type(error).__name__}"
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(repository, repo_type="dataset", allow_patterns="*.parquet", local_files_only=True)
        )
    except Exception as error:
        raise BadData(f"{reason} and the Hub's cache has no copy of {repository}") from error


def _download(repository: str) -> Path:
    from huggingface_hub import hf_hub_download, list_repo_files

    names = [name for name in list_repo_files(repository, repo_type="dataset") if name.endswith(".parquet")]
    if not names:
        raise BadData(f"{repository} has no parquet files")
    path = Path()
    for name in names:
        path = Path(hf_hub_download(repository, name, repo_type="dataset"))
    return path.parents[len(Path(names[-1]).parts) - 1]
