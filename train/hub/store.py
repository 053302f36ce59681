"""Publishes a finished store as a dataset of the Hugging Face hub, which `--store hf://OWNER/NAME` reads by ranges.

Only files that the store's own manifest names are sent, and the manifest and zarr.json come last: a push that is cut
leaves no store that looks whole. A repository holds one store, and never another one's files between them.
"""

import re
from collections.abc import Iterator
from typing import Final

from shared.errors import DamagedError, UserError
from shared.files.base import is_remote
from shared.files.handles import VERIFY
from shared.files.hub_files import HubFiles
from shared.hub.client import RepoState
from shared.hub.place import HubPlace, HubRepo, repo_named
from shared.progress import say
from shared.schemas.exchange import PushConfig
from shared.store.create import RECORD
from shared.store.manifest import INDEX, METADATA, read_metadata
from shared.store.opened import STATE_FILE, Store, check_metadata_paths
from shared.store.shard import crc32
from shared.store.spec import shard_file
from train.hub.card import BEGIN, END, is_id, is_ours, plain
from train.hub.layout import README, found
from train.hub.upload import Confirm, OutFile, Pushed, find_repo, push_files

MANY_FILES: Final = 100_000
"""Files that the hub recommends a repository to have at most."""
LOCAL_PATH: Final = re.compile(r"""(?<=["'\s=])/[\w.-]+(?:/[\w.-]+)+""")
TAGS: Final = ("activations", "mechanistic-interpretability", "sagsae")


def push_store(config: PushConfig, confirm: Confirm | None) -> Pushed:
    """Sends what the dataset lacks of a store. Raises UserError for a store that is unfinished or not in a folder here,
    and when the repository holds another store; DamagedError when a file is not what was committed."""
    store = pushable(config.source)
    repo = repo_named(config.repo, "dataset", f"--repo {config.repo}")
    with store.files.reading():
        state = find_repo(repo)
        readme = check_repository(repo, state, store)
        sizes = dict(committed_files(store))
        shards = [OutFile(path, store.root / path) for path in sizes]
        last = [OutFile(path, store.root / path) for path in (METADATA, INDEX, STATE_FILE)]
        if len(shards) > MANY_FILES:
            say(f"{repo}: the store has {len(shards):,} files; the hub recommends at most {MANY_FILES:,} a repository")
        page = [] if readme is not None and not is_ours(readme) else [card_file(config, store, readme)]
        if state is None or not state.private:
            say_names(store)

        def check(file: OutFile) -> None:
            if file.path in sizes:
                check_committed(store, file, *sizes[file.path])

        return push_files(
            repo, state, [shards, [*page, *last]], f"store {store.root.name}", config.private, confirm, check
        )


def pushable(place: str) -> Store:
    """Opens a store that can be pushed."""
    if is_remote(place):
        raise UserError(f"{place}: only a store in a folder on this machine can be pushed. Copy it into one first")
    store = Store.open(place)
    if store.state != "final" or not store.complete:
        raise UserError(
            f"{place}: is not finished ({len(store.commits):,} of {store.spec.n_shards:,} shards). Run the same sagsae "
            "harvest command again, then push it"
        )
    return store


def check_repository(repo: HubRepo, state: RepoState | None, store: Store) -> str | None:
    """Returns the repository's README. Raises UserError when the repository holds another store."""
    if state is None:
        return None
    files = HubFiles.pinned(HubPlace(repo, state.commit, ""))
    there = found(files, STATE_FILE, 16 << 20)
    if there is not None and there != store.files.read(STATE_FILE):
        raise UserError(f"{repo}: holds another store already. Choose another --repo")
    readme = found(files, README, 16 << 20)
    return None if readme is None else readme.decode("utf-8", "replace")


def committed_files(store: Store) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yields every file that the manifest vouches for, with its length and crc32; then record.json, which carries its
    own checksum."""
    metadata = read_metadata(store.files)
    check_metadata_paths(store, metadata)
    yield from metadata.items()
    matrices = {array for array, layout in store.spec.layouts().items() if layout.row_shape} | store.row_kinds.keys()
    for shard, commit in store.commits.items():
        for array, entry in commit.files.items():
            yield shard_file(array, shard, array in matrices), entry
    record = store.files.read(RECORD)
    yield RECORD, (len(record), crc32(record))


def check_committed(store: Store, file: OutFile, size: int, crc: int) -> None:
    """Raises DamagedError when a file is not what was committed."""
    opened = store.files.open(file.path, size)
    found_crc, at = 0, 0
    while at < size:
        length = min(8 << 20, size - at)
        found_crc = crc32(opened.read(at, length), found_crc)
        at += length
    if found_crc != crc:
        raise DamagedError(
            f"{store.name}/{file.path}: its checksum is not the committed one; nothing was sent. {VERIFY}"
        )


def say_names(store: Store) -> None:
    """Says which folders of this machine a store's descriptions name: readers of the dataset will see them."""
    for name in (STATE_FILE, RECORD):
        paths = dict.fromkeys(LOCAL_PATH.findall(store.files.read(name).decode("utf-8", "replace")))
        if paths:
            say(f"{store.name}/{name}: names folders of this machine, which readers will see: {', '.join(paths)}")


def card_file(config: PushConfig, store: Store, before: str | None) -> OutFile:
    """The dataset's card; what its owner wrote outside the marks is kept."""
    text = f"{BEGIN}\n{body(config.repo, store)}{END}"
    if before is not None:
        above, _, rest = before.partition(BEGIN)
        return OutFile(README, f"{above}{text}{rest.partition(END)[2]}".encode())
    lines = ["---", "viewer: false", "tags:", *(f"- {tag}" for tag in TAGS)]
    lines += [f"license: {config.license}"] if config.license else []
    return OutFile(README, "\n".join([*lines, "---", "", f"{text}\n"]).encode())


def body(repo: str, store: Store) -> str:
    spec = store.spec
    model = str(spec.model["name"])
    name = model.rstrip("/").rpartition("/")[2] if spec.model.get("local") else model
    rows = [("hookpoint", "TransformerLens name", "d_in"), ("---",) * 3]
    rows += [(f"`{path}`", f"`{hook.name}`", f"{hook.d_in:,}") for path, hook in spec.hookpoints.items()]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    linked = f"[{name}](https://huggingface.co/{name})" if not spec.model.get("local") and is_id(name) else plain(name)
    hook = next(iter(spec.hookpoints))
    return (
        "\n\n".join(
            [
                f"# Activations of {plain(name)}",
                f"A store of sagsae: the activations of {linked} at {len(spec.hookpoints)} hookpoints, for "
                f"{spec.n_tokens:,} tokens in contexts of {spec.context:,}. The values are {spec.dtype}, compressed "
                f"with {spec.codec}, in Zarr v3 arrays of {spec.n_shards:,} shards. The rows are shuffled; `tokens` "
                "holds the texts' token ids.",
                table,
                "Train on it without downloading it first; a revision pins what is read:",
                f"```bash\nsagsae train --store hf://{repo} --hook {hook} --arch sa-gsae:4096\nsagsae store info hf://{repo}\n```",
                "Or download the repository and give its folder. `manifest/` has the length and the checksum of every "
                "file; `sagsae store verify` compares them.",
            ]
        )
        + "\n"
    )
