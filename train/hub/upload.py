"""Sends files to a repository on the Hugging Face hub: what is not there yet, in one commit.

A file is there when the hub lists one of the same length and digest (SHA-256 in large-file storage, else the SHA-1 of a
git blob). Contents are uploaded first and become visible with the commit. So a push that is cut leaves nothing that
looks whole, and the same command sends only what the hub has not received. The commit names the commit that it was
compared with: the hub refuses it when somebody else was faster.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from shared.errors import BusyError, UserError
from shared.files.handles import open_regular
from shared.hub.client import (
    LOG_IN,
    HubFile,
    MissingRepo,
    RepoState,
    endpoint,
    explained,
    files_at,
    library,
    repo_state,
    token,
)
from shared.hub.place import HubRepo
from shared.progress import gigabytes, progress

COMMIT_FILES: Final = 5_000
"""Files in one commit at most: the hub gives up on larger ones."""
BATCH_FILES: Final = 32
BATCH_BYTES: Final = 256 << 20
"""Files and bytes that are uploaded between two steps of the progress bar."""
REQUEST_SECONDS: Final = 600.0
"""Seconds after which a request of an upload that makes no progress fails."""
READ_BYTES: Final = 8 << 20
Confirm = Callable[[str], bool]
"""Asks a person a question; returns whether the answer is yes."""


@dataclass(frozen=True)
class OutFile:
    """One file as it shall be in the repository."""

    path: str
    """Its path there."""
    content: bytes | Path | None
    """Its bytes, or the file that holds them; None where the repository shall have no such file."""

    @cached_property
    def size(self) -> int:
        if self.content is None:
            return 0
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @cached_property
    def sha256(self) -> str:
        return self.digest(hashlib.sha256())

    @cached_property
    def blob(self) -> str:
        """SHA-1 as a git blob."""
        return self.digest(hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False))

    def digest(self, into: Any) -> str:
        if isinstance(self.content, bytes):
            into.update(self.content)
        elif self.content is not None:
            with open(open_regular(self.content), "rb") as file:
                while part := file.read(READ_BYTES):
                    into.update(part)
        return str(into.hexdigest())

    def is_at(self, there: HubFile | None) -> bool:
        """Whether the hub has exactly this file."""
        if self.content is None:
            return there is None
        if there is None or there.size != self.size:
            return False
        return there.sha256 == self.sha256 if there.sha256 else there.blob == self.blob


@dataclass(frozen=True)
class Pushed:
    """What a push did."""

    repo: str
    kind: str
    url: str
    commit: str
    """The commit of the repository that has everything."""
    private: bool
    files_sent: int
    bytes_sent: int
    files_there: int
    """Files that the hub had already."""
    commits: int


def find_repo(repo: HubRepo) -> RepoState | None:
    """Returns the repository's state, None when it is still to be made. Raises UserError without a token."""
    if token() is None:
        raise UserError(f"{repo}: pushing needs a token of the hub. {LOG_IN}")
    try:
        return repo_state(repo)
    except MissingRepo:
        return None


def agree(repo: HubRepo, state: RepoState | None, private: bool, what: str, confirm: Confirm | None) -> None:
    """Asks before anything becomes public. Raises UserError when the answer is no or cannot be asked for, and when a
    public repository shall be private."""
    if private and state is not None and not state.private:
        raise UserError(
            f"{repo}: is public on the hub, and --private does not change that. Make it private on its settings page, "
            "or leave --private out"
        )
    if private or (state is not None and state.private):
        return
    doing = "make the PUBLIC" if state is None else "add to the PUBLIC"
    if confirm is None:
        raise UserError(
            f"{repo}: would be {'made' if state is None else 'kept'} public, and there is no terminal to ask on. "
            "Repeat the command with --yes, or with --private for a repository that only you can read"
        )
    if not confirm(
        f"{what[:1].upper()}{what[1:]}: {doing} {repo.kind} {repo} on {endpoint()}, which anybody can read?"
    ):
        raise UserError(f"{repo}: nothing was sent. Repeat the command with --private for a private repository")


def make_repo(repo: HubRepo, private: bool) -> RepoState:
    """Makes the repository. Raises BusyError when somebody else has made it meanwhile."""
    with explained(repo, "making the repository"), quiet_library():
        try:
            hub_api().create_repo(repo.name, repo_type=repo.kind, private=private, exist_ok=False)
        except Exception as error:
            if getattr(getattr(error, "response", None), "status_code", None) == 409:
                raise BusyError(f"{repo}: was made by somebody else meanwhile. Run the same command again") from error
            raise
    return repo_state(repo)


def changed(repo: HubRepo, state: RepoState | None, files: Sequence[OutFile]) -> list[OutFile]:
    """Returns the files that the repository lacks, or has with other content."""
    if state is None:
        return list(files)
    there = files_at(repo, state.commit, [file.path for file in files])
    return [file for file in files if not file.is_at(there.get(file.path))]


def send(repo: HubRepo, state: RepoState, parts: Sequence[Sequence[OutFile]], message: str) -> tuple[str, int]:
    """Commits the files of each part, in the order of the parts: the last one is what makes the whole complete. All of
    it is one commit unless there are more than COMMIT_FILES. Returns the last commit and how many there were."""
    commit, commits, total = state.commit, 0, sum(file.size for part in parts for file in part)
    with progress(f"push {repo}", max(1, total), "bytes") as advance, quiet_library():
        groups = grouped(parts)
        for number, group in enumerate(groups, 1):
            title = message if len(groups) == 1 else f"{message} ({number} of {len(groups)})"
            commit = send_commit(repo, commit, group, title, advance)
            commits += 1
    return commit, commits


def grouped(parts: Sequence[Sequence[OutFile]]) -> list[list[OutFile]]:
    """The files of each commit: one, or as many as COMMIT_FILES demands, with the last part in the last one."""
    files = [file for part in parts for file in part]
    if len(files) <= COMMIT_FILES:
        return [files] if files else []
    last = list(parts[-1])
    before = files[: len(files) - len(last)]
    return [before[begin : begin + COMMIT_FILES] for begin in range(0, len(before), COMMIT_FILES)] + [last] * bool(last)


def send_commit(
    repo: HubRepo, parent: str, files: Sequence[OutFile], message: str, advance: Callable[[int, str], None]
) -> str:
    """Uploads the contents, then makes one commit of all files. Returns the commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api = hub_api()
    operations: list[Any] = []
    with explained(repo, "uploading"):
        for batch in batches(files):
            made = [CommitOperationAdd(file.path, as_content(file)) for file in batch if file.content is not None]
            api.preupload_lfs_files(repo.name, made, repo_type=repo.kind, free_memory=False)
            operations += made
            operations += [CommitOperationDelete(file.path) for file in batch if file.content is None]
            advance(sum(file.size for file in batch), batch[-1].path)
    with explained(repo, "committing"):
        done = api.create_commit(
            repo.name, operations, commit_message=message, repo_type=repo.kind, parent_commit=parent
        )
        return str(done.oid)


def as_content(file: OutFile) -> bytes | str:
    return file.content if isinstance(file.content, bytes) else str(file.content)


def batches(files: Iterable[OutFile]) -> Iterator[list[OutFile]]:
    batch: list[OutFile] = []
    for file in files:
        batch.append(file)
        if len(batch) == BATCH_FILES or sum(each.size for each in batch) >= BATCH_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


def pushed(
    repo: HubRepo, state: RepoState, commit: str, files: Sequence[OutFile], sent: Sequence[OutFile], commits: int
) -> Pushed:
    return Pushed(
        repo=repo.name,
        kind=repo.kind,
        url=f"{endpoint()}/{'datasets/' if repo.kind == 'dataset' else ''}{repo}",
        commit=commit,
        private=state.private,
        files_sent=len(sent),
        bytes_sent=sum(file.size for file in sent),
        files_there=sum(file.content is not None for file in files) - len(sent),
        commits=commits,
    )


def push_files(
    repo: HubRepo,
    state: RepoState | None,
    parts: Sequence[Sequence[OutFile]],
    what: str,
    private: bool,
    confirm: Confirm | None,
    check: Callable[[OutFile], None] = lambda _: None,
) -> Pushed:
    """Sends what the repository lacks, and makes the repository where there is none. `parts` are in the order in which
    they become visible; `check` is called with each file that is to be sent, before any is. Asks before anything
    becomes public; sends and asks nothing when everything is there."""
    files = [file for part in parts for file in part]
    lacking = set(map(id, changed(repo, state, files)))
    missing = [[file for file in part if id(file) in lacking] for part in parts]
    sent = [file for part in missing for file in part]
    if state is not None and not sent:
        return pushed(repo, state, state.commit, files, [], 0)  # no commit, and no question
    size = gigabytes(sum(file.size for file in sent))
    agree(repo, state, private, f"{what} ({len(sent):,} files, {size})", confirm)
    for file in sent:
        check(file)
    state = make_repo(repo, private) if state is None else state
    commit, commits = send(repo, state, missing, f"Add {what}")
    return pushed(repo, state, commit, files, sent, commits)


# huggingface_hub


def hub_api() -> Any:
    from huggingface_hub import HfApi

    from shared.record import version

    return HfApi(endpoint=endpoint(), library_name="sagsae", library_version=version("sagsae"))


@contextmanager
def quiet_library() -> Iterator[None]:
    """Keeps huggingface_hub from printing bars of its own, and warnings that quote signed URLs; a request that stalls
    ends after REQUEST_SECONDS."""
    utils = library()
    session, logging = utils.get_session(), utils.logging
    before, bars, timeout = logging.get_verbosity(), not utils.are_progress_bars_disabled(), session.timeout
    logging.set_verbosity_error()
    utils.disable_progress_bars()
    session.timeout = REQUEST_SECONDS
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            utils.enable_progress_bars()
        utils.get_session().timeout = timeout
