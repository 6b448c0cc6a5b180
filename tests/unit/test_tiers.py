"""Which tests may see a GPU: those below tests/gpu, where they are asked for, and no others."""

import os
import subprocess
import sys

import pytest
import torch

from tests.distributed.jobs import ROOT, environment

HIDING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def child(code, **variables):
    """What a child process prints."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_neither_this_process_nor_a_child_sees_a_gpu():
    assert [os.environ.get(name) for name in HIDING] == ["", ""] and not torch.cuda.is_available()
    shown = f"import os, torch; print(*(repr(os.environ.get(n)) for n in {HIDING}), torch.cuda.is_available())"
    assert child(shown) == ["''", "''", "False"]


def test_gpus_are_hidden_before_torch_is_imported_whatever_the_user_has_chosen():
    code = f"import os, sys, tests.conftest; print('torch' in sys.modules, *(repr(os.environ[n]) for n in {HIDING}))"
    assert child(code, CUDA_VISIBLE_DEVICES="0,1", HIP_VISIBLE_DEVICES="3") == ["False", "''", "''"]


def test_jobs_of_several_ranks_hide_gpus_without_pytest(monkeypatch):
    """`python -m tests.distributed.equivalence` and its like start the same jobs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert [environment().get(name) for name in HIDING] == ["", ""]


class Collected:
    """Remembers the files whose tests would run."""

    def pytest_collection_finish(self, session):
        self.files = {item.path.relative_to(ROOT).as_posix() for item in session.items}


def collected(*arguments):
    seen = Collected()
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    pytest.main([*options, *arguments], plugins=[seen])
    return seen.files


def test_the_two_tiers_share_no_test(capsys):
    gpu, default = (str(ROOT / "tests" / path) for path in ("gpu/test_waits.py", "unit/test_defaults.py"))
    assert collected(gpu, default) == collected(gpu, default, "-m", "not slow") == {"tests/unit/test_defaults.py"}
    assert collected(gpu, default, "--device", "cpu") == {"tests/gpu/test_waits.py"}
