"""Runs on the Hugging Face hub: fetched into a cache, whole or not at all, and pushed as they are.

A repository holds the files of one run and a README.md. Of a stranger's, only these are fetched.
"""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unipelt_cli.errors import RunError, UnipeltError
from unipelt_cli.system import network

if TYPE_CHECKING:
    from unipelt_cli.runs.run import Run

PREFIX = "hub:"
CARD, ATTRIBUTES = "README.md", ".gitattributes"
SECONDS = 10.0
LARGEST, LARGEST_MODEL = 100_000_000, 10_000_000_000  # bytes; of tensors, a whole backbone's
AGAIN = "run the command again"
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
_NAME = r"[A-Za-z0-9][\w.-]*"
_REPOSITORY = re.compile(f"({_NAME})/({_NAME})")
_ADDRESS = re.compile(rf"{PREFIX}({_NAME}/{_NAME})(?:@(\S+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_remote(run: str | Path) -> bool:
    """Say whether a run is named by its place on the hub."""
    return str(run).startswith(PREFIX)


def directory_of(run: str | Path, *, offline: bool) -> Path:
    """Return the directory of a run; one on the hub is fetched, unless it is in the cache."""
    return fetch(str(run), offline=offline) if is_remote(run) else Path(run)


def parse(name: str) -> tuple[str, str | None]:
    """Return repository and revision of `hub:owner/name[@revision]`; raise RunError for another."""
    match = _ADDRESS.fullmatch(name)
    if match is None:
        raise RunError(
            f"{name}: names no repository on the hub",
            "write hub:OWNER/NAME, or hub:OWNER/NAME@REVISION",
        )
    return match[1], match[2]


def fetch(name: str, *, offline: bool) -> Path:
    """Return a directory that holds a run of the hub; nothing in it is checked yet but sizes.

    Settles whether the network is used: without it, and for a commit that was fetched before, the
    cache answers. Raises RunError.
    """
    repository, revision = parse(name)
    kept = network.home() / "unipelt" / repository.replace("/", "--")
    if revision is not None and _COMMIT.fullmatch(revision) and (kept / revision).is_dir():
        return kept / revision
    network.configure_network(offline=offline, needed=True)
    from huggingface_hub import HfApi

    api, commit = HfApi(), None
    with _naming_errors(name):
        if not network.is_offline():
            info = api.model_info(
                repository, revision=revision, timeout=SECONDS, files_metadata=True
            )
            _check(name, {file.rfilename: file.size or 0 for file in info.siblings or ()})
            commit = info.sha
        names = [*_names()]
        snapshot = Path(api.snapshot_download(repository, revision=revision, allow_patterns=names))
    if commit not in (None, snapshot.name):
        raise RunError(f"{name}: the repository has changed meanwhile", AGAIN)
    return _kept(name, snapshot, kept / snapshot.name)


def _kept(name: str, snapshot: Path, directory: Path) -> Path:
    """Copy the hub's own cache, which holds links, to where a run may lie."""
    if directory.is_dir():
        return directory
    from unipelt_cli.files import atomic

    files = {file: snapshot / file for file in _names() if (snapshot / file).is_file()}
    _check(name, {file: path.stat().st_size for file, path in files.items()})
    try:
        with atomic.new_directory(directory) as temporary:
            for file, path in files.items():
                shutil.copyfile(path, temporary / file)
    except RunError as error:
        if not directory.is_dir():  # else another process was faster
            raise RunError(error.message, "free space, or set HF_HOME to another place") from None
    return directory


def _names() -> tuple[str, ...]:
    from unipelt_cli.runs.names import RECORDED, RESULT

    return (*RECORDED, RESULT)


def _check(name: str, sizes: Mapping[str, int]) -> None:
    """Raise RunError for files that cannot be those of a run, by their names and sizes."""
    from unipelt_cli.runs.names import MODEL, PREDICTIONS

    for file in _names():
        if file not in sizes and file != PREDICTIONS:
            raise RunError(
                f"{name}: not a whole run, there is no {file}",
                "give a repository that `unipelt push` wrote",
            )
        most = LARGEST_MODEL if file == MODEL else LARGEST
        if sizes.get(file, 0) > most:
            raise RunError(
                f"{name}: {file} has {sizes[file]:,} bytes, a run's has {most:,} at most",
                "do not use this run: nothing of it was fetched",
            )


@dataclass(frozen=True)
class Pushed:
    """Where a run was pushed to."""

    repository: str
    url: str
    commit: str
    private: bool
    files: Sequence[str]


@dataclass(frozen=True)
class Upload:
    """A run that may be pushed to a repository, which is new or may be replaced."""

    run: "Run"
    repository: str
    private: bool
    parent: str | None
    """The commit that it follows, where there is one."""
    replaced: frozenset[str]

    @property
    def files(self) -> dict[str, Path]:
        """The run's own files, to be pushed as they are: their hashes are in the result."""
        from unipelt_cli.runs.checks import recorded_files
        from unipelt_cli.runs.names import RESULT

        names = (*recorded_files(self.run.result), RESULT)
        return {name: self.run.directory / name for name in names}

    def local_paths(self) -> list[str]:
        """Return the paths of this machine that the files name."""
        recorded = [self.run.experiment.settings(), self.run.environment, self.run.header]
        return sorted({text for text in _texts(recorded) if Path(text).is_absolute()})

    def send(self, card: str) -> Pushed:
        """Push the files and a README.md in one commit; return where they are. Raises RunError."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        files = self.files
        result = self.run.result
        operations: list[Any] = [
            *(CommitOperationAdd(name, path) for name, path in files.items()),
            CommitOperationAdd(CARD, card.encode()),
            *(CommitOperationDelete(name) for name in sorted(self.replaced - files.keys())),
        ]
        with _naming_errors(self.repository):
            api = HfApi()
            if self.parent is None:
                api.create_repo(self.repository, private=self.private or None, exist_ok=True)
            commit = api.create_commit(
                self.repository,
                operations,
                commit_message=f"{result['method']} on {result['task']}",
                parent_commit=self.parent,
            )
        return Pushed(
            repository=self.repository,
            url=f"{api.endpoint}/{self.repository}",
            commit=commit.oid,
            private=self.private,
            files=[*files, CARD],
        )


def prepare(run: "Run", repository: str, *, private: bool, overwrite: bool) -> Upload:
    """Look whether a run can be pushed to a repository; nothing is written yet.

    After `network.configure_network`. Raises RunError for a repository that holds anything but a
    run, for one that holds a run without `overwrite`, and where nobody is logged in.
    """
    repository = repository.removeprefix(PREFIX)
    if _REPOSITORY.fullmatch(repository) is None:
        raise RunError(f"{repository}: names no repository on the hub", "write OWNER/NAME")
    if network.is_offline():
        raise RunError(
            f"{repository}: the hub cannot be reached",
            "connect to the network, and leave HF_HUB_OFFLINE unset",
        )
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if get_token() is None:
        raise RunError(f"{repository}: not logged in to the hub", LOGIN)
    with _naming_errors(repository):
        try:
            info = HfApi().model_info(repository, timeout=SECONDS)
        except RepositoryNotFoundError:
            return Upload(run, repository, private, None, frozenset())
    present = {file.rfilename for file in info.siblings or ()} - {ATTRIBUTES, CARD}
    if foreign := sorted(present - {*_names()}):
        raise RunError(
            f"{repository}: holds files that no run wrote, such as {foreign[0]}",
            "give another name",
        )
    if present and not overwrite:
        raise RunError(
            f"{repository}: holds a run already",
            "replace it with --overwrite, or give another name",
        )
    if private and not info.private:
        raise RunError(
            f"{repository}: exists already, and is public",
            "make it private on its page first, or drop --private",
        )
    return Upload(run, repository, bool(info.private), info.sha, frozenset(present))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


@contextmanager
def _naming_errors(name: str) -> Iterator[None]:
    """Turn what the hub's library raises into a RunError about `name`."""
    try:
        yield
    except UnipeltError:
        raise
    except Exception as error:  # as many kinds as there are ways for a server to answer
        cause = error.__cause__ if type(error) is RuntimeError else None
        raise RunError(*_explained(name, cause or error)) from None


def _explained(name: str, error: BaseException) -> tuple[str, str]:
    """Say what is wrong and what to do, for an error of the hub's library."""
    from huggingface_hub import errors
    from requests import RequestException

    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0][:200] if lines else type(error).__name__
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"{name}: not in the local cache, and the hub cannot be reached", (
            "fetch it once with the network, or give a run directory"
        )
    if isinstance(error, errors.HFValidationError):
        return f"{name}: names no repository on the hub ({reason})", "write OWNER/NAME"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name}: no such revision", "give a branch, a tag or a commit that is there"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{name}: no such repository, or one that you may not see", (
            f"check its name; for a private one {LOGIN}"
        )
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        return _answered(name, error.response.status_code, reason)
    if isinstance(error, RequestException | ConnectionError):
        return f"{name}: the connection to the hub broke ({reason})", AGAIN
    return f"{name}: failed ({getattr(error, 'strerror', None) or reason})", AGAIN


def _answered(name: str, status: int, reason: str) -> tuple[str, str]:
    match status:
        case 401:
            return f"{name}: the hub does not accept your token", LOGIN
        case 403:
            return f"{name}: the hub refuses you this", (
                "use a token that may, from https://huggingface.co/settings/tokens"
            )
        case 409 | 412:
            return f"{name}: the repository has changed meanwhile", AGAIN
    return f"{name}: the hub answers with an error ({reason})", "try again later"
