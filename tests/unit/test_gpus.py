"""Which GPU each child process is shown: from the environment, from what the driver lists, round by round."""

import os
import subprocess
import sys

import pytest

from metatt_scale import gpus
from metatt_scale.benchmark.turns import LoopInTurns
from metatt_scale.gpus import find_gpus, least_used, parse_list, showing, visible_gpus

WHOLE = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-3b3a7e1c-0a3c-4b52-8f6d-0d0f2a1f9a01)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-77d1c2aa-5f4e-4a0b-9a55-2f1d6b0c7e02)
"""
MIXED = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-11111111-0a3c-4b52-8f6d-0d0f2a1f9a01)
  MIG 3g.20gb     Device  0: (UUID: MIG-aaaaaaaa-0a3c-4b52-8f6d-0d0f2a1f9a01)
  MIG 3g.20gb     Device  1: (UUID: MIG-bbbbbbbb-0a3c-4b52-8f6d-0d0f2a1f9a01)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-22222222-5f4e-4a0b-9a55-2f1d6b0c7e02)
"""


@pytest.mark.parametrize(
    "variable, expected",
    [
        (None, ("found",)),
        ("", ()),
        ("2", ("2",)),
        ("3, 1", ("3", "1")),
        ("GPU-77d1c2aa,0", ("GPU-77d1c2aa", "0")),
        ("MIG-aaaaaaaa-0a3c", ("MIG-aaaaaaaa-0a3c",)),
        ("MIG-GPU-11111111/3/0", ("MIG-GPU-11111111/3/0",)),
        ("0,-1,1", ("0",)),
        ("NoDevFiles", ()),
    ],
)
def test_the_environment_decides_what_is_visible(variable, expected):
    environment = {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}
    assert visible_gpus(environment, lambda: ("found",)) == expected
    assert visible_gpus({**environment, "ACCELERATE_USE_CPU": "true"}, lambda: ("found",)) == ()


PARTS = ("MIG-aaaaaaaa-0a3c-4b52-8f6d-0d0f2a1f9a01", "MIG-bbbbbbbb-0a3c-4b52-8f6d-0d0f2a1f9a01")


@pytest.mark.parametrize(
    "text, expected",
    [
        (WHOLE, ("0", "1")),
        (MIXED, (*PARTS, "GPU-22222222-5f4e-4a0b-9a55-2f1d6b0c7e02")),
        ("No devices found.\n", ()),
    ],
    ids=["whole", "mig", "none"],
)
def test_what_nvidia_smi_lists(text, expected):
    assert parse_list(text) == expected


@pytest.mark.parametrize("smi", ["listed", "fails", "absent"])
def test_without_nvidia_smi_the_drivers_files_tell_how_many(smi, tmp_path, monkeypatch):
    for name in ("0000:19:00.0", "0000:3b:00.0", "0000:4c:00.0"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(gpus, "_DRIVER", tmp_path)

    def run(command, **options):
        if smi == "absent":
            raise FileNotFoundError(command[0])
        return subprocess.CompletedProcess(command, int(smi == "fails"), WHOLE, "")

    monkeypatch.setattr(subprocess, "run", run)
    assert find_gpus() == (("0", "1") if smi == "listed" else ("0", "1", "2"))
    monkeypatch.setattr(gpus, "_DRIVER", tmp_path / "nothing")
    assert find_gpus() == (("0", "1") if smi == "listed" else ())


def test_children_share_gpus_evenly():
    """Also after one has ended: by its number the next child would get the GPU of one that still works."""
    in_use: list[str | None] = []
    for _ in range(5):
        in_use.append(least_used(("0", "1"), in_use))
    assert in_use == ["0", "1", "0", "1", "0"]
    assert least_used(("0", "1", "2"), ["0", "2"]) == "1"
    assert least_used((), []) is None


def test_a_child_is_shown_its_gpu_alone():
    environment = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert showing(environment, "1") == {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "1"}
    assert showing(environment, None) == environment


# ---- the loops of `benchmark --table end_to_end`


def shown(ready, pause):
    ready(("torch" in sys.modules, os.environ.get("CUDA_VISIBLE_DEVICES")))


@pytest.mark.parametrize(
    "variable, expected", [("GPU-77d1c2aa,GPU-11111111", "GPU-77d1c2aa"), ("5,6", "5"), ("", ""), (None, "0")]
)
def test_a_benchmarked_loop_sees_one_gpu(variable, expected, monkeypatch):
    """transformers' Trainer takes all that it sees, by DataParallel, and would be measured against our one."""
    if variable is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(gpus, "find_gpus", lambda: ("0", "1"))
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    before = visible_gpus({} if variable is None else {"CUDA_VISIBLE_DEVICES": variable})
    loop = LoopInTurns(shown)
    assert loop.facts == (False, expected)
    loop.close()
    assert visible_gpus(os.environ) == before
