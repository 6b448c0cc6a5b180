"""Experiment trackers: refused where not installed, independent of the job, and never a reason to stop training."""

import os
import re

import pytest
from accelerate import tracking
from accelerate.state import PartialState
from torch import distributed

from metatt_scale.recipe import validate
from metatt_scale.training.metrics import Trackers, check_trackers
from tests.toy import quiet, said

NAMES = ("tensorboard", "wandb", "mlflow", "trackio")
CALLS: list[tuple] = []


class Fake(tracking.GeneralTracker):
    """Records what is asked of it; `fails` names the calls that raise."""

    name, requires_logging_directory, fails = "fake", False, ()

    def __init__(self, project, **options):
        super().__init__()
        self.project = project

    @property
    def tracker(self):
        return None

    @tracking.on_main_process
    def start(self):
        self.note("start")

    @tracking.on_main_process
    def store_init_configuration(self, values):
        self.note("config", values["adapter.rank"])

    @tracking.on_main_process
    def log(self, values, step=None, **options):
        tracking.logger.debug("as the real ones do")
        self.note("log", step, values)

    @tracking.on_main_process
    def finish(self):
        self.note("finish")

    def note(self, call, *values):
        CALLS.append((self.name, call, *values))
        if call in self.fails:
            raise OSError(f"no connection for {call}")


@pytest.fixture
def trackers(monkeypatch, tmp_path):
    """Make `Trackers` of stand-ins, on rank 0 of two: {name: calls that fail}."""
    CALLS.clear()
    PartialState._reset_state()
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)

    def make(**fails):
        for name, calls in fails.items():
            kind = type(name, (Fake,), {"name": name, "fails": calls})
            monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, kind)
        console = quiet()
        return Trackers(recipe(tmp_path, *fails), tmp_path, console), console

    return make


def recipe(folder, *names):
    data = {"train": [{"path": "unused"}]}
    logging = {"trackers": list(names)}
    return validate(
        {"output_dir": str(folder), "backbone": {"path": "unused"}, "data": data, "logging": logging}, "t"
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_that_is_not_installed_is_named_with_its_key(name, tmp_path, monkeypatch):
    PartialState._reset_state()
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(ValueError, match=rf"logging\.trackers .*{name}.*pip install .*{name}"):
        check_trackers(recipe(tmp_path, name))


def test_what_is_installed_passes(tmp_path):
    PartialState._reset_state()
    check_trackers(recipe(tmp_path, "tensorboard"))
    check_trackers(recipe(tmp_path))


def test_trackers_leave_the_job_alone(trackers):
    """No process group, no device, no number of threads is chosen for them: `join` has done all that."""
    before = dict(os.environ)
    running, _ = trackers(wandb=(), mlflow=())
    running.log(3, {"loss": 1.5, "ranks": [4], "skipped": True})
    running.close()
    assert dict(os.environ) == before and not distributed.is_initialized() and not PartialState._shared_state
    of_one = [("start",), ("config", 16), ("log", 3, {"loss": 1.5}), ("finish",)]
    for name in ("wandb", "mlflow"):
        assert [call for own, *call in map(list, CALLS) if own == name] == [list(call) for call in of_one]


@pytest.mark.parametrize("call", ["start", "config", "log", "finish"])
def test_a_tracker_that_fails_is_told_once_and_the_others_go_on(trackers, call):
    running, console = trackers(wandb=(call,), mlflow=())
    for step in (1, 2, 3):
        running.log(step, {"loss": 1.0})
    running.close()
    (line,) = said(console).splitlines()
    assert re.search(rf"wandb .*no connection for {call}", line)
    assert [own for own, *rest in CALLS if rest[0] == call].count("wandb") == 1
    assert [rest for own, *rest in CALLS if own == "mlflow"][2:] == [
        *(["log", step, {"loss": 1.0}] for step in (1, 2, 3)),
        ["finish"],
    ]
