"""Parquet files of a data set from the Hugging Face Hub, or from its local cache when there is no network."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from dynablocks.errors import BadData

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
"""What the system says where a file cannot be stored; of a network it says other things."""
ROOM = "free space, or set HF_HOME to another place"


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE asks to stay off the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in {"1", "ON", "YES", "TRUE"}


def fetch_parquet(repository: str) -> Path:
    """The folder with the parquet files of the Hub data set ``repository``; they are downloaded once.

    A copy in the Hub's cache is used without asking the network; HF_HUB_OFFLINE forbids asking it at all.

    Raises:
        BadData: there is neither a cached copy nor a network, or no room for a copy; the sentence says why.
    """
    cached = _cached_copy(repository)
    if cached is not None:
        return cached
    if is_offline():
        raise BadData(f"HF_HUB_OFFLINE is set and the Hub's cache has no copy of {repository}")
    try:
        return _download(repository)
    except Exception as error:
        # The library raises its own errors, its HTTP client's and the system's; all mean "not from there".
        reason = f"the Hub's {repository} could not be fetched: {type(error).__name__}"
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            reason = f"the Hub's {repository} could not be stored: {error.strerror}; {ROOM}"
    raise BadData(reason)


def _cached_copy(repository: str) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repository, repo_type="dataset", local_files_only=True))
    except Exception:
        # Not cached, in whichever way the installed version of the library says so.
        return None
    whole = all(any(folder.rglob(f"{split}*.parquet")) for split in ("train", "test"))
    return folder if whole else None


def _download(repository: str) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    # list_repo_files retries for half a minute where there is no network; this request fails at once.
    listed = HfApi().dataset_info(repository, timeout=20).siblings or []
    names = [file.rfilename for file in listed if file.rfilename.endswith(".parquet")]
    if not names:
        raise BadData(f"{repository} has no parquet files")
    path = Path()
    for name in names:
        path = Path(hf_hub_download(repository, name, repo_type="dataset"))
    return path.parents[len(Path(names[-1]).parts) - 1]
