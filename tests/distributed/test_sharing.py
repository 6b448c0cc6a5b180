"""Ranks that share the work get what one process gets: a step's gradients, twenty losses, the answers of a task."""

import json
import math

import pytest

from tests.distributed import equivalence, steps
from tests.distributed.jobs import finish, torchrun
from tests.distributed.workers.evaluation import STRATEGIES, write_questions
from tests.toy import write_toy

pytestmark = pytest.mark.slow


def test_every_engine_and_precision_on_two_ranks_against_one_process(tmp_path):
    cells, allowed = equivalence.measure(tmp_path, 2)
    assert len(cells) == 3 * 3 * 2 * 2
    for strategy, precision, _, accumulation, checkpointing, loss, gradient in cells:
        cell = (strategy, precision, accumulation, checkpointing)
        assert loss <= allowed[precision][0], cell
        assert gradient <= allowed[precision][1], cell


def test_twenty_steps_on_four_ranks_and_a_hybrid_mesh(tmp_path):
    alone = steps.measure(tmp_path, 1, ["replicate", *steps.ONE_PROCESS])
    reference = alone.pop("replicate")
    spread = max(steps.largest_difference(curve, reference) for curve in alone.values())
    assert 0 < spread < 1e-3 and reference[-1] < reference[0]
    four = steps.measure(tmp_path, 4, ["replicate", "fsdp2, 2 x 2 hybrid mesh", "zero3"])
    for name, curve in four.items():
        assert all(map(math.isfinite, curve))
        assert steps.largest_difference(curve, reference) <= 10 * spread, name


def test_two_ranks_score_what_one_scores(tmp_path):
    """Under sharding too, where a rank without a batch must keep step."""
    write_toy(tmp_path)
    write_questions(tmp_path)
    finish(torchrun("-m", "tests.distributed.workers.evaluation", tmp_path), tmp_path / "log")
    for rank in range(2):
        seen = json.loads((tmp_path / f"answers-{rank}.json").read_text())
        assert {len(answer) for task in seen["alone"].values() for answer in task.values()} == {7}
        for strategy in STRATEGIES:
            assert seen[strategy] == seen["alone"], (rank, strategy)
