"""What a worker's machine can do, found in a process of its own: looking needs torch, waiting for jobs does not.

python -m harvest.serve.work.machine DEVICE
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, Final

from harvest.serve.planner import child_environment
from shared.errors import UserError

LOOK_S: Final = 300.0


def look(device: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """The members of WorkerInfo that describe this machine. Raises UserError when the device is not here."""
    command = [sys.executable, "-P", "-m", "harvest.serve.work.machine", device]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=LOOK_S,
            env={**child_environment(), **environment},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"--device {device}: no answer in {LOOK_S:.0f} s. Check its driver") from error
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["no reason was given"]
        raise UserError(words[-1].removeprefix("error: "))
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def describe(device: str) -> dict[str, Any]:
    """Looks at this machine. Imports torch."""
    import torch

    from harvest.reuse.key import environment_of
    from shared.device import device_name, native_dtype, pick_device
    from shared.record import provenance

    picked = "cuda" if device == "map" else pick_device(device)
    gpus = torch.cuda.device_count() if picked.startswith("cuda") else 0
    sizes = [torch.cuda.get_device_properties(number).total_memory for number in range(gpus)]
    record = provenance()
    return {
        "device": picked,
        "gpus": gpus,
        "memory": sum(sizes) if sizes else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "bf16": native_dtype(torch.device(picked)) == "bfloat16",
        "environment": environment_of({**record, "device": device_name(picked)}),
        "versions": {name: str(version) for name, version in record["versions"].items() if version},
    }


def main() -> None:
    try:
        print(json.dumps(describe(sys.argv[1])))  # noqa: T201 (its answer)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
