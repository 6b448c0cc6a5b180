"""Three real ranks: sums, messages of rank 0, failures told to all, replicas compared."""

import json

import pytest
import torch

from metatt_scale.parallel import World, check_same
from tests.distributed.jobs import finish, torchrun
from tests.toy import CPU

RANKS = 3


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collectives")
    finish(torchrun("-m", "tests.distributed.workers.collectives", folder, ranks=RANKS), folder / "log")
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.slow
def test_every_rank_knows_its_place(seen):
    assert [(s["rank"], s["size"], s["first"]) for s in seen] == [(0, 3, True), (1, 3, False), (2, 3, False)]


@pytest.mark.slow
def test_sums_and_rows_are_the_same_everywhere(seen):
    for s in seen:
        assert s["sum"] == [3.0, 3.0]
        assert s["gathered"] == [[0, 0], [1, 10], [2, 20]]
        assert s["joined"] == [[1, 1], [2, 2], [2, 2]], "rank r has r rows of r"


@pytest.mark.slow
def test_rank_0_alone_computes_and_all_receive(seen):
    """The others' `compute` divides by zero: it never runs."""
    tensors = {
        "a": ["torch.float32", [2, 3], [[0, 1, 2], [3, 4, 5]]],
        "empty": ["torch.float32", [0, 4], []],
        "half": ["torch.bfloat16", [2], [1, 1]],
    }
    assert all(s["message"] == [{"x": [1, None, "ä"]}, tensors] for s in seen)


@pytest.mark.slow
def test_an_error_on_rank_0_is_raised_on_all_with_its_text(seen):
    assert seen[0]["failure"] == ["ValueError", "no room on the disk"]
    assert (
        seen[1]["failure"]
        == seen[2]["failure"]
        == ["OtherRankError", "rank 0 failed: ValueError: no room on the disk"]
    )
    assert all(s["after failure"] == [3.0] for s in seen), "the ranks are still in step"


@pytest.mark.slow
def test_one_all_reduce_carries_gradients_and_decisions(seen):
    for s in seen:
        assert s["gradients"] == [[[6, 6], [6, 6]], [3]]
        assert s["step"] == [1.5, 3003, 0, 15, pytest.approx((4 * 36 + 9) ** 0.5)], "rank 1's SIGTERM is known to all"
        assert s["nonfinite"] == [2, True]


@pytest.mark.slow
def test_replicas_that_differ_by_one_bit_are_named(seen):
    for s in seen:
        assert s["same"] is None
        assert s["differ"] == ["ReplicasDifferError", "the ranks differ: core 1 on rank 1; look there"]
        kind, text = s["texts"]
        assert kind == "ReplicasDifferError" and "the recipe on rank 2; all on ranks 1, 2" in text


def test_a_world_of_one_needs_no_group():
    world = World(device=CPU)
    assert world.sum(torch.ones(2)).tolist() == [1, 1] and world.gather(torch.ones(2)).tolist() == [[1, 1]]
    assert world.concatenate(torch.ones(3, 2)).tolist() == [[1, 1]] * 3
    value, tensors = world.from_first(lambda: (1, {"a": torch.ones(1)}))
    assert value == 1 and tensors["a"].tolist() == [1]
    check_same(world, {"a": "b"}, "")
    with pytest.raises(ZeroDivisionError):
        world.on_first(lambda: 1 / 0)
