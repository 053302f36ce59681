"""A planner's child that does what its question says: answers, dies, says nothing, says nonsense."""

import json
import os
import sys
import time


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


for line in sys.stdin:
    question = json.loads(line)
    what = question["request"]["model"]
    if what == "die":
        os._exit(9)
    if what == "sleep":
        time.sleep(60)
    if what == "nonsense":
        say("nonsense")
        continue
    if what == "another":
        say(json.dumps({"id": 0, "result": {}}))
        continue
    error = {"kind": what, "message": "as asked"}
    found = {"result": {"pid": os.getpid(), "cwd": os.listdir()}} if what == "tiny" else {"error": error}
    say(json.dumps({"id": question["id"], **found}))
