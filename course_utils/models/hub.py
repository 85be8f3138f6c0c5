"""Models of the Hugging Face hub: pinned by commit, checked by hash, cached whole or not at all.

For a commit the hub lists the files and their hashes: SHA-256 of what lies in its large file storage
(the weights), git's blob id, a SHA-1, of the rest. Only what a causal language model needs is
fetched. The folder appears in the cache when every file is there and right; from then on the hub is
not asked again. A hub that does not answer is given up after `TIMEOUT` seconds, a download that
stops after six tries of as long each; the environment variable `HF_HUB_DOWNLOAD_TIMEOUT` sets the
seconds of a try.
"""

import hashlib
import json
import os
import re
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers, logging

from course_utils.cache import DownloadError, cached, sha256

TIMEOUT = 5  # seconds
if "HF_HUB_DOWNLOAD_TIMEOUT" not in os.environ:
    constants.HF_HUB_DOWNLOAD_TIMEOUT = TIMEOUT
logging.set_verbosity_error()  # our error says what failed: no line for each of the library's tries

WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
CONFIGURATION = re.compile(r"[^/\\]+\.(json|txt|model|jinja)")  # also of the tokenizer, of any kind
# The library's errors derive from those of its HTTP client: requests, httpx or httpx2, by version.
HUB_ERRORS = (OSError, ValueError, *HfHubHTTPError.__bases__)


def hub_folder(repo: str, commit: str, weights_sha256: str | None = None) -> Path:
    """Folder with configuration, tokenizer and safetensors of `repo` at `commit`; fetched once.

    `weights_sha256` pins `model.safetensors` beyond what the hub itself says. Raises `DownloadError`
    with reason and remedy.
    """
    name = f"models/{repo.replace('/', '--')}@{commit}"
    return cached(name, partial(_fetch, repo, commit, weights_sha256))


def _fetch(repo: str, commit: str, weights_sha256: str | None, target: Path) -> None:
    try:
        files = (
            HfApi().model_info(repo, revision=commit, files_metadata=True, timeout=TIMEOUT).siblings
        )
        weights = [file for file in files if WEIGHTS.fullmatch(file.rfilename)]
        if not weights:
            raise DownloadError(
                f"{repo} holds no model.safetensors at {commit}, and pickled weights are not read. "
                "Choose a model or a commit that has safetensors."
            )
        offered = [file.lfs and file.lfs.sha256 for file in weights]
        if weights_sha256 is not None and offered != [weights_sha256]:
            raise DownloadError(
                f"the hub at {constants.ENDPOINT} offers other weights of {repo} than the course was "
                f"tested with, SHA-256 {weights_sha256}. Check HF_ENDPOINT."
            )
        target.mkdir()
        configuration = [file for file in files if CONFIGURATION.fullmatch(file.rfilename)]
        for file in [*configuration, *weights]:
            _download(repo, commit, file, target / file.rfilename)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise DownloadError(
            f"the hub at {constants.ENDPOINT} has no {repo} at commit {commit} for you. Check both on "
            "the model's page; a private or gated model needs a login (HF_TOKEN)."
        ) from error
    except HUB_ERRORS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if isinstance(error, json.JSONDecodeError):
            reason = (
                "the answer is not a hub's, but perhaps a page where the network asks for a login"
            )
        raise DownloadError(
            f"from {constants.ENDPOINT}: {reason}. Check the network and the room on the disk, and try again."
        ) from error


def _download(repo: str, commit: str, file: RepoSibling, path: Path) -> None:
    """Fetch one file and compare it with the hash that the hub's list gave."""
    with path.open("wb") as stream:
        http_get(
            hf_hub_url(repo, file.rfilename, revision=commit),
            stream,
            headers=build_hf_headers(),
            expected_size=file.size,
            displayed_filename=file.rfilename,
        )
    expected = file.lfs.sha256 if file.lfs else file.blob_id
    found = sha256(path) if file.lfs else _git_blob_id(path)
    if found != expected:
        raise DownloadError(
            f"{file.rfilename} of {repo} arrived with hash {found}, the hub says {expected}: it was "
            "altered on the way and is thrown away. Try again, or from another network."
        )


def _git_blob_id(path: Path) -> str:
    """The id that git gives to a file: SHA-1 of a header and the content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
