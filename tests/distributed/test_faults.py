"""A rank that dies, fails, hangs or is told to stop: what becomes of the others, and of the run.

`python -m tests.distributed.kill_matrix` prints all kills with their times; here are three that differ in kind.
"""

import re

import pytest

from tests.distributed.jobs import (
    FAULTS,
    TRAIN,
    adapter_of,
    checkpoints_of,
    fault,
    finish,
    job,
    torchrun,
    write_recipe,
)
from tests.distributed.kill_matrix import gone_after, kill
from tests.toy import metrics

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "moment, rank, resumed", [("all-reduce", 0, 4), ("broadcast", 1, 8), ("checkpoint", 0, 4)], ids=str
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
        kind = f"stop:{last if rank else last - 6}"
        with job(torchrun(FAULTS, recipe), log, **fault(kind, rank, notes)) as running:
            assert running.wait() != 0
        output = running.output()
        assert [(notes / f"code-{r}").read_text() for r in (0, 1)] == ["143\n", "143\n"], output
        assert set(re.findall(r"stopped by SIGTERM after step (\d+)", output)) == {str(last)}, output
        assert checkpoints_of(run)[-1] == f"step-{last:06d}" and metrics(run)[-1]["step"] == last
        assert not (run / "adapter").exists()
    output = finish(torchrun(TRAIN, recipe), folder / "stopped.log")
    assert "resuming after step 9" in output and adapter_of(run) == expected


@pytest.mark.parametrize("kind", ["error", "refusal"])
def test_an_error_of_one_rank_ends_the_job_and_is_told_first(undisturbed, kind):
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
    assert re.search(r"Root Cause.*?rank +: 1 ", output, re.DOTALL), output


def test_a_frozen_rank_is_noticed_within_the_time_out(undisturbed):
    folder, _ = undisturbed
    notes = folder / "freeze-notes"
    command = torchrun(FAULTS, write_recipe(folder, "freeze", parallel={"timeout_minutes": 0.1}))
    with job(command, folder / "freeze.log", **fault("freeze", 1, notes)) as running:
        noticed = running.wait_until(lambda: "waited too long" in running.output(), "word of the rank that waits")
    seconds = noticed - float((notes / "moment").read_text())
    print(f"noticed {seconds:.1f} s after rank 1 froze; parallel.timeout_minutes is 6 s")
    assert 5 < seconds < 60 and "Timed out" in running.output()
