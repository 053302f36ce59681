"""A server of short leases in a process of its own, whose planner says what stands in a file:
python -m support.serving.short ROOT PORT PLANS LEASE_S
"""

import json
import sys
from pathlib import Path
from typing import Any

import uvicorn

from harvest.serve.app import make_app, make_service
from harvest.serve.records import Limits
from harvest.serve.state import State
from shared.command.parent import end_with_parent
from shared.config import ServeConfig
from shared.request import StoreRequest
from support.serving.rest import ScriptedPlanner


def main(root: str, port: str, plans: str, lease_s: str) -> None:
    end_with_parent()
    documents: dict[str, Any] = json.loads(Path(plans).read_text())

    def planned(request: StoreRequest) -> dict[str, Any]:
        found: dict[str, Any] = documents[str(request.tokens)]
        return found

    limits = Limits(lease_s=float(lease_s), beat_s=0.2, backoff_s=0.5, attempts=8)
    state = State.open(Path(root), limits=limits)
    service = make_service(state, ScriptedPlanner(planned), ServeConfig(root=Path(root), launch="none"))
    uvicorn.run(make_app(service, None), host="127.0.0.1", port=int(port), log_level="warning", ws="none")


if __name__ == "__main__":
    main(*sys.argv[1:5])
