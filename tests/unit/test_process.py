"""What a command sets for its own process; tests/model/test_cli.py checks that it does so before torch is loaded."""

import sys

import pytest

from metatt_scale import process
from metatt_scale.process import SPIN_COUNT, set_process_defaults


def defaults(cuda, monkeypatch, **given):
    monkeypatch.setattr(process, "_is_torch_for_cuda", lambda: cuda)
    environment = dict(given)
    set_process_defaults(environment)
    assert given.items() <= environment.items(), "what the user has set stays"
    return {name: value for name, value in environment.items() if name not in given}


SPIN, ALLOCATOR = {"GOMP_SPINCOUNT": SPIN_COUNT}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def test_what_is_set(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    assert defaults(False, monkeypatch) == SPIN
    assert defaults(True, monkeypatch) == SPIN | ALLOCATOR
    monkeypatch.setattr(sys, "platform", "win32")  # where torch warns of it
    assert defaults(True, monkeypatch) == SPIN


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_the_user_decides_how_threads_wait(monkeypatch, name):
    assert defaults(False, monkeypatch, **{name: "ACTIVE"}) == {}


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_the_user_decides_how_memory_is_allocated(monkeypatch, name):
    assert defaults(True, monkeypatch, **{name: ""}) == SPIN


@pytest.mark.parametrize("cuda", ["None", "'12.8'"])
def test_what_torch_is_built_for_is_read_without_importing_it(monkeypatch, tmp_path, cuda):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "torch" / "version.py").write_text(f"from typing import Optional\ncuda: Optional[str] = {cuda}\n")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert process._is_torch_for_cuda() == (cuda != "None")
