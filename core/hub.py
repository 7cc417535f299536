"""The Hugging Face Hub: download with resuming and checksums, sizes beforehand, and upload.

Everything goes through huggingface_hub, so that its cache, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN
and its login are honoured. Every failure is one line that names the file and says what to do.
"""

import contextlib
import fnmatch
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from core.errors import InputError
from core.files import file_sha256

SHA256_DIGITS = 64


class NotOnHubError(InputError):
    """The repository is there, the file or revision is not."""


class HubFile(NamedTuple):
    """A file of a Hub repository; `filename` may be a pattern with * that one file matches."""

    repository: str
    filename: str
    revision: str | None = None
    sha256: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repository}/{self.filename}{revision}"


def parse_hub_id(hub_id: str) -> HubFile | None:
    """`owner/name[/file][@revision]` -> its parts ("" for no file); None for anything else."""
    name, _, revision = hub_id.partition("@")
    parts = name.split("/")
    if len(parts) < 2 or any(part in ("", ".", "..") for part in parts):
        return None
    return HubFile("/".join(parts[:2]), "/".join(parts[2:]), revision or None)


def fetch(file: HubFile) -> Path:
    """The path of a file in the Hub's cache, downloaded if need be; a broken download resumes.

    A fresh download is compared with the sha256 that the Hub publishes for it, and every one with
    `file.sha256`. Raises NotOnHubError if the repository lacks it, InputError for other failures.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils.logging import set_verbosity_error

    set_verbosity_error()  # its retries are not our one line
    repository, filename, revision, _ = file = resolve(file)
    with _explained(file):
        cached = try_to_load_from_cache(repository, filename, revision=revision)
    with _explained(file, known_missing=not isinstance(cached, str | None)):
        path = Path(hf_hub_download(repository, filename, revision=revision))
    fresh = not isinstance(cached, str)
    published = path.resolve().name  # the Hub's cache names a large file by its sha256
    expected = file.sha256 or (published if fresh and len(published) == SHA256_DIGITS else None)
    if expected and (found := file_sha256(path)) != expected:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise InputError(
            f"{file}: downloaded with sha256 {found[:12]}, expected {expected[:12]}; the copy was "
            "removed: run again to download it again"
        )
    return path


def resolve(file: HubFile) -> HubFile:
    """The file that a pattern means; raises NotOnHubError unless exactly one matches."""
    if "*" not in file.filename:
        return file
    from huggingface_hub import HfApi

    with _explained(file):
        names = HfApi().list_repo_files(file.repository, revision=file.revision)
    matching = fnmatch.filter(names, file.filename)
    if len(matching) != 1:
        raise NotOnHubError(
            f"{file}: {len(matching)} files match ({', '.join(matching) or 'none'}); name one"
        )
    return file._replace(filename=matching[0])


def download_size(file: HubFile) -> int:
    """Bytes that `fetch` would download: 0 if the cache has the file already.

    Raises NotOnHubError and InputError as `fetch` does.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    file = resolve(file)
    with _explained(file):
        cached = try_to_load_from_cache(file.repository, file.filename, revision=file.revision)
        if isinstance(cached, str):
            return 0
        url = hf_hub_url(file.repository, file.filename, revision=file.revision)
        return get_hf_file_metadata(url).size or 0


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise InputError unless the disk of `folder` (or of its first parent) has `needed` bytes."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise InputError(
            f"{folder}: {what} needs {gigabytes(needed)}, the disk has {gigabytes(free)} free"
        )


def gigabytes(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def cache_folder() -> Path:
    """Where huggingface_hub keeps what it downloads."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def push_to_hub(
    folder: Path,
    repository: str,
    files: Iterable[str],
    message: str = "Upload model",
    private: bool = False,
    revision: str | None = None,
) -> str:
    """Upload files of a folder as one commit, creating the repository; returns the commit's URL.

    revision: a branch to commit to, created if it does not exist.
    """
    from huggingface_hub import HfApi

    files = list(files)
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder}: has no {', '.join(missing)}")
    api, target = HfApi(), HubFile(repository, "", revision)
    with _explained(target):
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=files,
            commit_message=message,
            revision=revision,
        )
    return commit.commit_url


@contextlib.contextmanager
def _explained(file: HubFile, known_missing: bool = False) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line.

    known_missing: the cache knows that the repository lacks the file.
    """
    from huggingface_hub import errors

    home = f"https://huggingface.co/{file.repository}"
    connection = errors.HfHubHTTPError.__bases__[0]  # HTTPError of the client that it uses
    try:
        yield
    except InputError:
        raise
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if known_missing:
            raise NotOnHubError(f"{file}: no such file or revision at {home}") from error
        reason = (
            "neither a local path nor to be had from the Hub: it is not in the cache, and there "
            f"is no connection (or HF_HUB_OFFLINE is set); it is published at {home}"
        )
        raise InputError(f"{file}: {reason}") from error
    except errors.GatedRepoError as error:
        reason = f"gated: accept its conditions at {home}, then run `hf auth login`"
        raise InputError(f"{file}: {reason}") from error
    except errors.RepositoryNotFoundError as error:
        reason = f"no such repository, or a private one: see {home}, then `hf auth login`"
        raise InputError(f"{file}: {reason}") from error
    except (errors.EntryNotFoundError, errors.RevisionNotFoundError) as error:
        raise NotOnHubError(f"{file}: no such file or revision at {home}") from error
    except (connection, OSError, ValueError) as error:  # pyright: ignore[reportGeneralTypeIssues]
        text = " ".join(str(error).split())[:200]
        reason = f"neither a local path nor to be had from the Hub ({text}); see {home}"
        raise InputError(f"{file}: {reason}") from error


Weights = Literal["auto", "model", "ema"]  # auto: EMA weights if there are any


@dataclass(frozen=True, kw_only=True)
class CardConfig:
    """What the model card says besides what the model's own files tell.

    Args:
        results: Folders of autoregressive.sample, evaluations.score or tokenizer.reconstruct that
            were made with these weights: their scores, with the protocol, and their image grid.
        dataset: What the model was trained on, e.g. ImageNet-1k train; null for what the run's own
            configuration says.
        licence: Licence of the weights, by the Hub's name for it (mit, apache-2.0); null to state
            none.
        private: Create the repository as a private one.
    """

    results: tuple[Path, ...] = ()
    dataset: str | None = None
    licence: str | None = None
    private: bool = False


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Which weights of a model to export, and where to.

    Args:
        out: Output folder; null if push_to is given and no folder is wanted.
        weights: Which weights to take; auto takes the EMA weights of our runs.
        verify_weights: Compare the files of our checkpoints with their checksums.
        push_to: Upload the folder with a model card to `owner/name[@branch]` on the Hub; null for
            no upload.
        card: What the model card says.
    """

    out: Path | None = None
    weights: Weights = "auto"
    verify_weights: bool = True
    push_to: str | None = None
    card: CardConfig = field(default_factory=CardConfig)
