"""Decides how a bucket or a web server is reached: from the URL, and otherwise only from the standard places.

For s3:// these are AWS_* variables and, with boto3, ~/.aws and everything else that boto3 knows (SSO, a machine's
role). For gs:// they are GOOGLE_* variables, the files of gcloud and the machine's role. No request is sent to the
server here.
"""

import importlib
import importlib.util
import os
import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Any, Final, NamedTuple
from urllib.parse import SplitResult, urlsplit

from obstore.store import GCSStore, HTTPStore, S3Store

from shared.errors import UserError

TRIES: Final = 5
BACKOFF_SECONDS: Final = 0.2
"""Pause before the second try, plus or minus one half; doubled before every further one."""
CONNECT_SECONDS: Final = 1.5
"""Timeout of a connection. A server that cannot be reached fails after TRIES of these and the pauses: about ten
seconds."""
STALL_SECONDS: Final = 12.0
"""A read fails when nothing arrives for this long, or less than SLOWEST_RATE."""
SLOWEST_RATE: Final = 4096
"""Bytes per second below which a read fails. A faster read may take up to READ_SECONDS per request."""
READ_SECONDS: Final = 3600.0
ANSWER_SECONDS: Final = 20.0
"""Timeout of a small request (a page of a listing, a head, a line of a log)."""
TOTAL_SECONDS: Final = 25.0
"""Seconds after which no further try of a read or a small request begins: a command ends within a minute."""
LISTING_SECONDS: Final = 55.0
"""Timeout of a whole listing, which a server could continue forever."""
PART_SECONDS: Final = 120.0
UPLOAD_SECONDS: Final = 300.0
"""Timeout of one part of an upload, and the time after which no part is tried again."""

NO_HEADERS: Final[Mapping[str, str]] = MappingProxyType({})

Server = S3Store | GCSStore | HTTPStore


def parse_url(url: str) -> SplitResult:
    """The parts of a URL that can be a place of files. Raises UserError for any other."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise UserError(f"{url}: is not a URL ({error})") from error
    if parts.scheme not in ("s3", "gs", "http", "https"):
        raise UserError(
            f"{url}: {parts.scheme}:// is not known. Expected a folder, s3://, gs://, hf://, http:// or https://"
        )
    if not parts.netloc:
        what = "server" if parts.scheme.startswith("http") else "bucket"
        raise UserError(f"{url}: names no {what}. Expected {parts.scheme}://{what.upper()}/PATH")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}: a URL here has no user, no ? and no #. Credentials "
            "come from the environment"
        )
    return parts


class Connection(NamedTuple):
    """The clients of one place."""

    reads: Server
    """Reads objects, which may be slow; shared/files/client.py retries."""
    asks: Server
    """Sends small requests; shared/files/client.py retries."""
    uploads: Server
    """Uploads; obstore retries their parts."""


def open_connection(parts: SplitResult) -> tuple[str, Connection]:
    """Returns a text that identifies the place, and the clients for it."""
    return {"s3": s3, "gs": gcs, "http": web_server, "https": web_server}[parts.scheme](parts)


def connection(
    make: Callable[..., Server], place: str, allow_http: bool, headers: Mapping[str, str] = NO_HEADERS, **config: Any
) -> Connection:
    backoff = {"init_backoff": timedelta(seconds=BACKOFF_SECONDS), "max_backoff": timedelta(seconds=3), "base": 2}
    retry = {"max_retries": TRIES - 1, "retry_timeout": timedelta(seconds=UPLOAD_SECONDS), "backoff": backoff}

    def server(seconds: float, retry: dict[str, Any], **options: Any) -> Server:
        client: dict[str, Any] = {"allow_http": True} if allow_http else {}
        client |= {"default_headers": dict(headers)} if headers else {}
        client |= {"connect_timeout": timedelta(seconds=CONNECT_SECONDS), "timeout": timedelta(seconds=seconds)}
        return make(place, client_options=client | options, retry_config=retry, **config)

    once, stall = retry | {"max_retries": 0}, timedelta(seconds=STALL_SECONDS)
    return Connection(
        reads=server(READ_SECONDS, once, read_timeout=stall),
        asks=server(ANSWER_SECONDS, once, read_timeout=stall),
        uploads=server(PART_SECONDS, retry),
    )


def s3(parts: SplitResult) -> tuple[str, Connection]:
    config = s3_profile()
    names = "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"
    endpoint: str = next((os.environ[name] for name in names if os.environ.get(name)), config.get("endpoint", ""))
    if endpoint:
        if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", endpoint):
            raise UserError(f"AWS_ENDPOINT_URL={endpoint}: expected http://HOST:PORT or https://HOST")
        config["endpoint"] = endpoint
    config["disable_bulk_delete"] = True  # some servers lack S3's bulk deletion
    return f"{endpoint} {parts.netloc}", connection(S3Store, parts.netloc, endpoint.startswith("http://"), **config)


def s3_profile() -> dict[str, Any]:
    """Settings from ~/.aws and, where the environment holds no keys, from boto3's other places. Returns {} without
    boto3."""
    if not importlib.util.find_spec("boto3"):
        return {}
    session = importlib.import_module("botocore.session").get_session()
    try:
        scoped = session.get_scoped_config()
    except importlib.import_module("botocore.exceptions").BotoCoreError as error:
        raise UserError(f"AWS_PROFILE, ~/.aws: {error}. Correct the profile's name, or the file") from error
    config = {"endpoint": scoped["endpoint_url"]} if "endpoint_url" in scoped else {}
    if "region" in scoped and not (os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")):
        config["region"] = scoped["region"]
    unsigned = os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true", "on", "yes", "y")
    if not unsigned and not os.environ.get("AWS_ACCESS_KEY_ID"):
        provider = importlib.import_module("obstore.auth.boto3").Boto3CredentialProvider
        config["credential_provider"] = provider(session)  # raises ValueError where there are no credentials
    return config


def gcs(parts: SplitResult) -> tuple[str, Connection]:
    base = os.environ.get("GOOGLE_BASE_URL", "")
    return f"{base} gs {parts.netloc}", connection(GCSStore, parts.netloc, base.startswith("http://"))


def web_server(parts: SplitResult) -> tuple[str, Connection]:
    server = f"{parts.scheme}://{parts.netloc}"
    return server, connection(HTTPStore, server, parts.scheme == "http")


def hub_server(endpoint: str, headers: Mapping[str, str]) -> tuple[str, Connection]:
    """A text that identifies the Hugging Face hub at an address, and the clients for it. `headers` go with every
    request; one that authorises is dropped where the hub redirects to another server (its storage)."""
    return endpoint, connection(HTTPStore, endpoint, endpoint.startswith("http://"), headers)
