"""`python -m metatt_scale.study.machine DEVICE`: versions, commit and device of this machine as JSON."""

from __future__ import annotations

import json
import sys

from metatt_scale.benchmark.report import describe_machine
from metatt_scale.hardware import pick_device
from metatt_scale.versions import git_commit

if __name__ == "__main__":
    machine = describe_machine(pick_device(sys.argv[1]), ("torch", "transformers"))
    print(json.dumps({**machine, "git_commit": git_commit()}))
