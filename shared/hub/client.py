"""Bounded questions to the Hugging Face hub, and its failures in words.

The token comes from huggingface_hub's own places (HF_TOKEN, `hf auth login`) and goes to HF_ENDPOINT alone: an answer
that leads elsewhere is not followed. A length that the hub says is a limit. No message repeats a header, a token or a
signed URL.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final, NoReturn
from urllib.parse import quote, urlencode, urljoin, urlsplit

from shared.errors import BusyError, DamagedError, Interrupted, LostError, UserError
from shared.gate import MIB, BadData, choice, integer, members, parse_json, printable, quoted, safe_path, text
from shared.hub.place import COMMIT, HubRepo

ANSWER_BYTES: Final = 16 * MIB
"""Largest answer that is read: a page of a listing has about 1,000 files."""
ANSWER_SECONDS: Final = 30.0
"""Timeout of one question."""
READ_SECONDS: Final = 15.0
"""Timeout of the connection, and between two parts of an answer."""
PAGES: Final = 2_000
"""Pages of a listing that are read at most."""
PATHS_AT_ONCE: Final = 200
REDIRECTS: Final = 3
TRIES: Final = 4
PAUSE_SECONDS: Final = 0.5
"""Pause before the second try, doubled before every further one."""
LARGEST: Final = 1 << 50
DIGEST: Final = re.compile(r"[0-9a-f]{64}")
OFFLINE: Final = "{}: the hub is not asked, because HF_HUB_OFFLINE is set. Unset it"
LOG_IN: Final = "Log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class RepoState:
    """A repository at one commit."""

    commit: str
    private: bool


@dataclass(frozen=True)
class HubFile:
    """One file of a repository as the hub lists it."""

    path: str
    size: int
    blob: str
    """SHA-1 of the file as a git blob; of the pointer to it, where `sha256` is known."""
    sha256: str | None
    """SHA-256 of the content of a file in large-file storage."""


@dataclass(frozen=True)
class HubAnswer:
    """One answer of the hub."""

    body: bytes
    headers: Mapping[str, str]


class HubRefusal(UserError):
    """The hub answers that it will not do what was asked."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class MissingRepo(HubRefusal):
    """The hub has no such repository, or hides it from this token."""


def endpoint() -> str:
    """The hub's address: HF_ENDPOINT, else https://huggingface.co. Raises UserError when it is no address."""
    from huggingface_hub import constants

    found = str(constants.ENDPOINT).rstrip("/")
    parts = urlsplit(found)
    if parts.scheme not in ("http", "https") or not parts.netloc or "@" in parts.netloc or parts.query:
        raise UserError("HF_ENDPOINT: is no address. Expected https://HOST")
    return found


def token() -> str | None:
    """The user's token from huggingface_hub's own places."""
    from huggingface_hub import get_token

    return get_token()


def library() -> Any:
    """huggingface_hub.utils, whose functions are documented but not exported for type checkers."""
    return import_module("huggingface_hub.utils")


def headers() -> dict[str, str]:
    """The headers of every request to the hub."""
    from shared.record import version

    return dict(
        library().build_hf_headers(token=token() or False, library_name="sagsae", library_version=version("sagsae"))
    )


# Questions


def repo_state(repo: HubRepo, revision: str | None = None) -> RepoState:
    """Returns the commit that a revision means now (default: `main`). Raises MissingRepo, HubRefusal for a revision
    that is not there, BusyError when the hub cannot be reached."""
    at = "" if revision is None else f"/revision/{quote(revision, safe='')}"
    with checked(repo):
        about = members(ask(repo, f"{repo.api}{at}"), ("sha", "private"), None)
        commit = text(about["sha"], "sha", 40)
        if not COMMIT.fullmatch(commit):
            raise BadData(f"sha is {quoted(commit)} instead of a commit")
        return RepoState(commit, choice(about["private"], "private", (False, True)))


def files_at(repo: HubRepo, commit: str, paths: Sequence[str]) -> dict[str, HubFile]:
    """Returns those of these files that the repository has, by path."""
    found: dict[str, HubFile] = {}
    with checked(repo):
        for begin in range(0, len(paths), PATHS_AT_ONCE):
            some = paths[begin : begin + PATHS_AT_ONCE]
            answer = ask(repo, f"{repo.api}/paths-info/{commit}", form=[("paths", path) for path in some])
            one_by_one = answer == {}  # a server that knows no such question
            files = asked_one_by_one(repo, commit, some) if one_by_one else files_in(answer)
            found |= {file.path: file for file in files if file.path in set(some)}
    return found


def asked_one_by_one(repo: HubRepo, commit: str, paths: Sequence[str]) -> Iterator[HubFile]:
    yield from (file for path in paths if (file := describe_file(repo, commit, path)))


def describe_file(repo: HubRepo, commit: str, path: str) -> HubFile | None:
    """Returns a file as its own address describes it; None when there is none. Its ETag is the SHA-256 in large-file
    storage, else the SHA-1 as a git blob. Some servers give every file's SHA-256."""
    with checked(repo), explained(repo):
        try:
            answer = tried(lambda: request_bounded(repo, f"{endpoint()}/{repo.files}/{commit}/{quote(path)}", "HEAD"))
        except HubRefusal as error:
            if error.status == 404 and not isinstance(error, MissingRepo):
                return None
            raise
        size = answer.headers.get("x-linked-size") or answer.headers.get("content-length", "")
        tag = (answer.headers.get("x-linked-etag") or answer.headers.get("etag", "")).removeprefix("W/").strip('"')
        if not size.isdecimal():
            raise BadData(f"gives no length of {path}")
        return HubFile(path, integer(int(size), "length", 0, LARGEST), tag, tag if DIGEST.fullmatch(tag) else None)


def list_files(repo: HubRepo, commit: str, folder: str = "") -> list[HubFile]:
    """Returns all files below a folder, sorted by path. Raises FileNotFoundError when there is no such folder."""
    inside = f"/{quote(folder)}" if folder else ""
    place = f"{repo.api}/tree/{commit}{inside}?recursive=true"
    found: list[HubFile] = []
    with checked(repo):
        for _ in range(PAGES):
            try:
                page, links = ask_page(repo, place)
            except HubRefusal as error:
                if error.status == 404 and not isinstance(error, MissingRepo):
                    raise FileNotFoundError(f"{repo}: has no folder {folder}") from error
                raise
            found += [file for file in files_in(page) if not folder or file.path.startswith(f"{folder}/")]
            following = re.search(r'<([^<>]{1,4000})>;\s*rel="next"', links)
            if following is None:
                return sorted(found, key=lambda file: file.path)
            place = following[1]
    raise BadData(f"lists more than {PAGES:,} pages of files")


def files_in(answer: Any) -> Iterator[HubFile]:
    """Yields the files of a listing, without its folders. Raises BadData for a listing that is none."""
    if not isinstance(answer, list):
        raise BadData(f"lists {quoted(answer)} instead of files")
    for item in answer:
        about = members(item, ("type", "path"), None)
        if about["type"] == "file":
            yield listed_file(about)


def listed_file(about: Mapping[str, Any]) -> HubFile:
    path, size = safe_path(about["path"]), integer(about.get("size"), "size", 0, LARGEST)
    digest = None
    if about.get("lfs") is not None:
        digest = text(members(about["lfs"], ("oid",), None)["oid"], "lfs.oid", 64)
        if not DIGEST.fullmatch(digest):
            raise BadData(f"lfs.oid is {quoted(digest)} instead of a SHA-256")
    return HubFile(path, size, text(about.get("oid"), "oid", 64), digest)


@contextmanager
def checked(repo: HubRepo) -> Iterator[None]:
    """Turns an answer that is none of the hub's into a DamagedError."""
    try:
        yield
    except BadData as error:
        raise DamagedError(
            f"{repo}: the hub's answer cannot be used: it {error}. Check HF_ENDPOINT, or try again"
        ) from error


def ask(repo: HubRepo, place: str, form: Sequence[tuple[str, str]] | None = None) -> Any:
    return ask_page(repo, place, form)[0]


def ask_page(repo: HubRepo, place: str, form: Sequence[tuple[str, str]] | None = None) -> tuple[Any, str]:
    """Returns the JSON of an answer, and its Link header. Raises BadData when it is too large or no JSON."""

    url = place if "://" in place else f"{endpoint()}{place}"
    with explained(repo):
        answer = tried(lambda: request_bounded(repo, url, "GET" if form is None else "POST", form))
    return parse_json(answer.body, ANSWER_BYTES), answer.headers.get("link", "")


def tried(request: Callable[[], HubAnswer]) -> HubAnswer:
    """Tries a question again when the network or the hub fails for a moment."""
    pause = PAUSE_SECONDS
    for attempt in range(1, TRIES + 1):
        try:
            return request()
        except Exception as error:
            again = isinstance(error, BusyError) or is_temporary(error)
            if attempt == TRIES or not again:
                raise
        time.sleep(pause)
        pause *= 2
    raise AssertionError("counting ended")


def request_bounded(repo: HubRepo, url: str, method: str, form: Sequence[tuple[str, str]] | None = None) -> HubAnswer:
    """Returns one answer, read whole. Redirects are followed on the hub's own address alone; one to the storage, which
    describes a file, is an answer of its own."""
    here = origin(endpoint())
    for _ in range(REDIRECTS):
        if origin(url) != here:
            raise UserError(
                f"{repo}: the hub leads to another address ({quoted(origin(url), 80)}), which is not asked: the token "
                "is for HF_ENDPOINT alone. Check HF_ENDPOINT"
            )
        sent: dict[str, Any] = {"headers": headers(), "timeout": READ_SECONDS, "follow_redirects": False}
        if form is not None:
            sent |= {"content": urlencode(form).encode()}
            sent["headers"]["Content-Type"] = "application/x-www-form-urlencoded"
        with library().get_session().stream(method, url, **sent) as answer:
            if answer.is_redirect and not (method == "HEAD" and "x-linked-etag" in answer.headers):
                url = urljoin(url, answer.headers.get("location", ""))
                continue
            body = read_bounded(answer)
            if answer.status_code >= 400:
                refuse(repo, answer)
            return HubAnswer(body, answer.headers)
    raise UserError(f"{repo}: the hub redirects in a circle. Check HF_ENDPOINT")


def read_bounded(answer: Any) -> bytes:
    """The body of an answer. Raises BadData when it is too large, TimeoutError when it takes too long."""
    body, end = bytearray(), time.monotonic() + ANSWER_SECONDS
    for part in answer.iter_raw() if "content-encoding" not in answer.headers else answer.iter_bytes(1 << 16):
        body += part
        if len(body) > ANSWER_BYTES:
            raise BadData(f"has more than {ANSWER_BYTES:,} bytes")
        if time.monotonic() > end:
            raise TimeoutError("the answer took too long")
    return bytes(body)


def refuse(repo: HubRepo, answer: Any) -> NoReturn:
    """Raises the error that an answer means."""
    code = answer.headers.get("x-error-code", "")
    if answer.status_code == 401 and not code and token() is None:  # how the hub hides what a stranger may not know
        raise MissingRepo(words_of(repo, 404, "RepoNotFound", ""), 404)
    raise_status(repo, answer.status_code, code, answer.headers.get("x-error-message", ""))


def origin(url: str) -> str:
    """The scheme, the host and the port of an address."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}".lower()


# Failures


@contextmanager
def explained(repo: HubRepo, doing: str = "") -> Iterator[None]:
    """Turns every failure of a request to the hub into one sentence: BusyError where the same command can succeed
    later."""
    try:
        yield
    except (UserError, DamagedError, BadData, FileNotFoundError, Interrupted, LostError, MemoryError):
        raise
    except Exception as error:  # of httpx, of huggingface_hub, of hf_xet, of sockets
        raise_failure(repo, error, doing)


def raise_failure(repo: HubRepo, error: Exception, doing: str) -> NoReturn:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    for each in chain_of(error):
        if isinstance(each, OfflineModeIsEnabled):
            raise UserError(OFFLINE.format(repo)) from error
        if isinstance(each, HfHubHTTPError):
            answer = each.response
            said = str(each.server_message or "")
            raise_status(repo, answer.status_code, answer.headers.get("x-error-code", ""), said, doing, error)
        if isinstance(each, OSError) and each.filename is not None:
            raise UserError(f"{each.filename}: cannot be read ({each.strerror}), and nothing was sent") from error
    while_doing = doing and f" while {doing}"
    if any(map(is_temporary, chain_of(error))):
        raise BusyError(
            f"{repo}: the hub cannot be reached{while_doing}, or broke off ({kind_of(error)}). Check the network, then "
            "run the same command again"
        ) from error
    first = list(chain_of(error))[-1]
    if type(first) is RuntimeError:  # how the hub's own upload library says that it broke off
        raise BusyError(
            f"{repo}: broke off{while_doing} ({harmless(str(first))}). Run the same command again"
        ) from error
    raise UserError(
        f"{repo}: the hub's answer{while_doing} cannot be used ({type(first).__name__}: {harmless(str(first))}). "
        "Check HF_ENDPOINT"
    ) from error


def raise_status(
    repo: HubRepo, status: int, code: str, said: str, doing: str = "", error: Exception | None = None
) -> NoReturn:
    """Raises the error that an HTTP status means."""
    if status in (408, 429) or status >= 500:
        raise BusyError(
            f"{repo}: the hub is busy or broken (status {status}){doing and f' while {doing}'}. Run the same command "
            "again later"
        ) from error
    if status == 412:
        raise BusyError(
            f"{repo}: somebody else changed it meanwhile, and nothing of this commit was kept. Run the same command "
            "again"
        ) from error
    if status == 404 and code == "RepoNotFound":
        raise MissingRepo(words_of(repo, status, code, said), status) from error
    raise HubRefusal(words_of(repo, status, code, said), status) from error


def words_of(repo: HubRepo, status: int, code: str, said: str) -> str:
    """What a refusal means, and what to do."""
    if code == "GatedRepo":
        return f"{repo}: needs permission. Accept its terms on its page, and log in with `hf auth login`"
    if code == "RevisionNotFound":
        return f"{repo}: has no such branch, tag or commit. Look at its page for those that it has"
    if code == "RepoNotFound":
        return (
            f"{repo}: the hub has no {repo.kind} of that name, or it is private and this token may not read it. Check "
            f"the name. {LOG_IN}"
        )
    if status == 401:
        return f"{repo}: the hub refuses the token, or there is none. {LOG_IN}"
    if status == 403:
        return (
            f"{repo}: this token may not do that (status 403). Make one that may write to {repo.name.split('/')[0]} on "
            "the hub's settings page, and log in with `hf auth login`"
        )
    if status == 404:
        return f"{repo}: the hub has no such file or folder"
    shown = harmless(said)
    return f"{repo}: the hub refuses the request (status {status}{shown and f': {shown}'})"


def harmless(message: str) -> str:
    """Others' words on one line, without anything that looks like a token or a signed URL, and not long."""
    secret = token()
    message = message.replace(secret, "***") if secret else message
    message = re.sub(r"hf_\w{4,}|Bearer\s+\S+|[?&]\S*(?i:sign|token|credential)\S*", "***", message)
    return " ".join(printable(message).split())[:200]


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it."""
    found: BaseException | None = error
    for _ in range(16):
        if found is None:
            return
        yield found
        found = found.__cause__ or found.__context__


def is_temporary(error: BaseException) -> bool:
    """Whether the network failed: another try may help."""
    kinds = {kind.__name__ for kind in type(error).__mro__}  # of httpx or httpx2, whichever huggingface_hub uses
    if "OfflineModeIsEnabled" in kinds:
        return False
    return isinstance(error, ConnectionError | TimeoutError) or "TransportError" in kinds or "XetError" in kinds


def kind_of(error: Exception) -> str:
    return type(next((each for each in chain_of(error) if is_temporary(each)), error)).__name__


def check_online(repo: HubRepo) -> None:
    """Raises UserError when the hub may not be asked (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise UserError(OFFLINE.format(repo))
