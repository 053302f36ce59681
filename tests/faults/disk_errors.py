"""Run with disk_errors.so loaded before the C library: a command once for each of so many points at which the disk
fails it, and the same command again. Prints one JSON object a point.

    LD_PRELOAD=disk_errors.so python disk_errors.py FOLDER COMMAND POINTS
"""

import ctypes
import errno
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
FAULTS = ctypes.CDLL(os.environ["LD_PRELOAD"])

import cli  # noqa: E402
import harvest.run  # noqa: E402, F401
import train.run  # noqa: E402, F401

ERRORS = ["", "EIO", "ENOSPC", "EDQUOT", "EROFS", "EACCES", "EINTR", "EMFILE", "ENFILE", "ENOENT", "ENAMETOOLONG",
          "ESTALE", "ENOLCK", "ENOSYS", "EOPNOTSUPP", "ETIMEDOUT", "ENXIO"]  # fmt: skip
"""The empty one kills."""
SYNTH = ["synth", "--d-in", "8", "--features", "12", "--tokens", "1500", "--set", "shard_rows=512", "--set",
         "chunk_rows=256"]  # fmt: skip
HARVEST = ["harvest", "--model", "tiny", "--tokens", "1536", "--context", "64", "--hook", "mlp_out", "--set",
           "shard_rows=512", "--set", "chunk_rows=256", "--device", "cpu"]  # fmt: skip
TRAIN = ["--arch", "gated:8", "--sparsity", "0.1", "--batch", "64", "--set", "streams=2", "--set", "heldout_tokens=128",
         "--set", "checkpoint_every=8", "--device", "cpu"]  # fmt: skip


def run(arguments: list[str], folder: Path, at: int, error: int) -> tuple[int, str, int]:
    """A command in a process of its own: its exit code (of a signal, negative), its stderr, the calls that it made."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as calls:
        pid = os.fork()
        if not pid:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            end = os._exit

            def ended(code: int) -> None:
                FAULTS.fail_at(b"", 0, 0)
                end(code)

            os._exit = ended  # type: ignore[assignment]
            code: Any = 0
            try:
                sys.argv = ["sagsae", *arguments]
                FAULTS.fail_at(os.fsencode(folder), at, error)
                cli.main()
            except SystemExit as ending:
                code = ending.code or 0
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 1
            os.pwrite(calls.fileno(), str(FAULTS.calls_made()).encode(), 0)
            sys.stdout.flush()
            sys.stderr.flush()
            ended(code)
        status = os.waitpid(pid, 0)[1]
        out.seek(0)
        made = os.pread(calls.fileno(), 20, 0)
        return os.waitstatus_to_exitcode(status), out.read().decode(errors="replace"), int(made or 0)


def digests(folder: Path) -> dict[str, str]:
    """Of what has to be the same, however often it was broken off."""
    wanted = (path for path in sorted(folder.rglob("*")) if path.is_file() and "checkpoints" not in path.parts)
    left_out = {"record.json", ".lock", "metrics.jsonl", "run.toml", "evaluation.json", "config.json"}
    left_out |= {".sagsae-rates.jsonl"}  # speeds that were measured: no part of a store
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in wanted
        if path.name not in left_out
    }


def main() -> None:
    folder, command, points = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    source, place = folder / "source", folder / "case"
    code, said, _ = run([*SYNTH, "--out", str(folder), "--name", "source"], folder, 0, 0)
    assert not code, said
    arguments = {
        "synth": [*SYNTH, "--codec", "int8", "--out", str(place), "--name", "x"],
        "harvest": [*HARVEST, "--out", str(place), "--name", "x"],
        "recode": ["store", "recode", str(source), str(place / "x"), "--codec", "lz4"],
        "rm": ["store", "rm", str(place / "x"), "--yes"],
        "train": ["train", "--store", str(source), *TRAIN, "--out", str(place / "x")],
    }[command]

    def begin() -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if command == "rm":
            shutil.copytree(source, place / "x")

    begin()
    code, said, calls = run(arguments, place, 0, 0)
    assert not code, said
    truth = digests(place)
    chosen = random.Random(0)
    for number in range(points):
        name = ERRORS[number % len(ERRORS)]
        at = chosen.randint(1, calls)
        begin()
        first, said, _ = run(arguments, place, at, getattr(errno, name) if name else 0)
        again, said_again, _ = run(arguments, place, 0, 0)
        gone = command == "rm" and first == 0
        sys.stdout.write(json.dumps({
            "error": name or "kill", "call": at, "of": calls, "first": first, "said": said[-2000:],
            "again": 0 if gone else again, "said_again": said_again[-2000:], "same": digests(place) == truth,
        }) + "\n")  # fmt: skip
        sys.stdout.flush()


main()
