"""A rank that dies, fails, hangs or is told to stop: what becomes of the others, and of the run.

`python -m tests.distributed.kill_matrix` prints all kills with their times; here are four that differ in kind.
"""

import json
import re
import sys

import pytest

from tests.distributed.jobs import (
    FAULTS,
    TRAIN,
    adapter_of,
    checkpoints_of,
    fault,
    finish,
    job,
    stop,
    torchrun,
    write_recipe,
)
from tests.distributed.kill_matrix import gone_after, kill
from tests.toy import metrics

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "moment, rank, resumed", [("all-reduce", 0, 4), ("broadcast", 1, 8), ("checkpoint", 0, 4), ("sweep", 0, 4)]
)
def test_a_killed_rank_takes_the_job_down_and_the_restart_changes_no_bit(undisturbed, moment, rank, resumed):
    folder, expected = undisturbed
    outcome = kill(folder, moment, rank, expected)
    print(outcome)
    assert outcome.same_bits and outcome.resumed == resumed
    left = checkpoints_of(folder / f"replicate-{moment}-{rank}")
    assert left == ["step-000008", "step-000012"], "nothing half-written"


def test_sigterm_on_any_rank_saves_once_ends_all_alike_and_costs_no_bit(undisturbed):
    folder, expected = undisturbed
    run, recipe = folder / "stopped", write_recipe(folder, "stopped")
    for rank, last in ((1, 6), (0, 9)):  # in the sixth step, and in the third step after that
        notes, log = folder / f"stopped-{rank}-notes", folder / f"stopped-{rank}.log"
        output = stop(torchrun(FAULTS, recipe), log, f"stop:{last if rank else last - 6}", rank, notes)
        assert set(re.findall(r"stopped by SIGTERM after step (\d+)", output)) == {str(last)}, output
        assert checkpoints_of(run)[-1] == f"step-{last:06d}" and metrics(run)[-1]["step"] == last
        assert not (run / "adapter").exists()
    output = finish(torchrun(TRAIN, recipe), folder / "stopped.log")
    assert "resuming after step 9" in output and adapter_of(run) == expected


@pytest.mark.parametrize("kind, code", [("error", 1), ("refusal", 2)])
def test_an_error_of_one_rank_ends_the_job_and_is_told_first(undisturbed, kind, code):
    """Of either sort: with a traceback, or one that the user can mend."""
    folder, _ = undisturbed
    notes = folder / f"{kind}-notes"
    command = torchrun(FAULTS, write_recipe(folder, kind))
    with job(command, folder / f"{kind}.log", **fault(kind, 1, notes)) as running:
        running.wait_until((notes / "moment").exists, kind)
        seconds = gone_after(notes)
        assert running.wait() != 0
    output = running.output()
    print(f"all ranks gone {seconds:.1f} s after the {kind}")
    own, consequence = output.find("this rank's own trouble"), output.find("a collective failed")
    assert own >= 0 and (consequence < 0 or own < consequence), output
    assert re.search(rf"Root Cause.*?rank +: 1 .*?exitcode +: {code} ", output, re.DOTALL), output
    assert (notes / "code-1").read_text() == f"{code}\n", "the process ended by itself"


def test_a_frozen_rank_is_noticed_within_the_time_out(undisturbed):
    folder, _ = undisturbed
    notes = folder / "freeze-notes"
    command = torchrun(FAULTS, write_recipe(folder, "freeze", parallel={"timeout_minutes": 0.1}))
    with job(command, folder / "freeze.log", **fault("freeze", 1, notes)) as running:
        noticed = running.wait_until(lambda: "error on rank 0" in running.output(), "word of the rank that waits")
    seconds = noticed - float((notes / "moment").read_text())
    print(f"noticed {seconds:.1f} s after rank 1 froze; parallel.timeout_minutes is 6 s")
    told = [line for line in running.output().splitlines() if line.startswith("error on rank 0")]
    assert 5 < seconds < 60 and "Timed out" in told[0] and "within parallel.timeout_minutes" in told[0]


def test_a_rank_that_never_comes_is_one_line(tmp_path):
    """Also for the rank that waits for the first one's address: PyTorch writes its C++ stack unless told not to."""
    command = [sys.executable, str(TRAIN), str(write_recipe(tmp_path, "run", parallel={"timeout_minutes": 0.05}))]
    place = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    with job(command, tmp_path / "log", **place) as running:
        assert running.wait() == 2
    (line,) = running.output().splitlines()
    assert line.startswith("error on rank 1: a collective failed") and "parallel.timeout_minutes" in line


@pytest.mark.parametrize(
    "sections, message",
    [
        (
            {"parallel": {"backbone": "fsdp2", "shard_size": 3}},
            "shard_size is 3 (3 ranks), which does not divide the",
        ),
        ({"backbone": {"quantization": "int8"}, "parallel": {"backbone": "zero3"}}, "int8, whose layers keep"),
    ],
    ids=["shard size", "int8"],
)
def test_what_no_engine_can_hold_is_told_once_before_tokenising(tmp_path, sections, message):
    with job(torchrun(TRAIN, write_recipe(tmp_path, "run", **sections)), tmp_path / "log") as running:
        assert running.wait() != 0
    output = running.output()
    (line,) = [line for line in output.splitlines() if line.startswith("error")]
    assert line.startswith("error on rank 0") and message in line
    assert "data:" not in output and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "section, message",
    [
        ({"zero_optimization": {"stage": 3, "stage3_bogus": 1}}, "stage3_bogus: Extra inputs are not permitted"),
        ({"zero_optimization": {"stage": 3, "stage3_max_live_parameters": -1}}, "stage3_max_live_parameters: Input"),
        ({"zero_optimization": {"stage": 3}, "flops_profiler": 3}, "refuses it ("),
    ],
    ids=["key", "value", "section"],
)
def test_what_deepspeed_refuses_is_one_line_with_file_and_key(tmp_path, section, message):
    (tmp_path / "ds.json").write_text(json.dumps(section))
    recipe = write_recipe(tmp_path, "run", parallel={"deepspeed_config": str(tmp_path / "ds.json")})
    with job([sys.executable, str(TRAIN), str(recipe)], tmp_path / "log") as running:
        assert running.wait() == 2
    told = running.output().splitlines()[-1]
    assert told.startswith(f"error: {tmp_path}/ds.json: DeepSpeed refuses it (") and message in told, running.output()
    assert "correct or remove that key" in told and "Traceback" not in running.output()
