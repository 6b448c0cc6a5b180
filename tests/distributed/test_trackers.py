"""An experiment tracker in a job of two ranks."""

import pytest

from tests.toy import metrics, tensorboard_scalars

pytestmark = pytest.mark.slow


def test_a_job_with_a_tracker_ends_well_and_the_tracker_has_the_numbers(undisturbed):
    folder, _ = undisturbed  # whose launcher has ended with 0
    run = folder / "straight-replicate"
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, 13)) and (run / "adapter").is_dir()
    for name in ("loss", "learning_rate", "grad_norm"):
        expected = {line["step"]: pytest.approx(line[name]) for line in lines}
        assert tensorboard_scalars(run, name) == expected, name
