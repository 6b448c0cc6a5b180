"""`python -m metatt_scale.study.machine`: versions, commit and device of this machine as JSON."""

from __future__ import annotations

import json

from metatt_scale.backbone import pick_device
from metatt_scale.benchmark.report import describe_machine
from metatt_scale.versions import git_commit

if __name__ == "__main__":
    print(json.dumps({**describe_machine(pick_device(), ("torch", "transformers")), "git_commit": git_commit()}))
