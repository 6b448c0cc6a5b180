"""Nothing that an engine gathers outlives its module's forward; under ZeRO-3 a step needs what the plan says."""

import json

import pytest

from tests.distributed.jobs import finish, torchrun
from tests.distributed.workers.gathered import LIVE, PLANNED
from tests.model.test_plan_memory import TOLERANCE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gathered")
    finish(torchrun("-m", "tests.distributed.workers.gathered", folder), folder / "log")
    return folder


@pytest.mark.parametrize("rank", [0, 1])
def test_live_bytes_between_forward_and_backward(counted, rank):
    found = dict(zip(LIVE, json.loads((counted / f"live-{rank}.json").read_text()), strict=True))
    for (model, engine, quantization, recompute), bytes_of in found.items():
        cell = (model, engine, quantization, recompute, bytes_of)
        # What stays: replicas; and of ds_configs/zero3.json the small tensors that the plan names.
        assert (bytes_of["expected"] > 0) == (engine in ("replicate", "zero3.json")), cell
        assert bytes_of["between"] == bytes_of["after"] == bytes_of["expected"], cell
        if engine in ("fsdp2", "zero3") and model == "llama":
            assert bytes_of["seen"] >= found[model, "replicate", quantization, recompute]["between"], cell


def test_peak_under_zero3(counted):
    peaks = json.loads((counted / "peaks.json").read_text())
    for (_, *cell), (measured, estimate) in zip(PLANNED, peaks, strict=True):
        print(*cell, f"measured {measured:,} planned {estimate:,} {estimate / measured - 1:+.1%}")
        assert estimate == pytest.approx(measured, rel=TOLERANCE), cell
