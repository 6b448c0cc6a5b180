"""Means, intervals and paired tests against numbers worked out by hand."""

import math

import pytest

from metatt_scale.study.cells import chosen, comparison, marks_of
from metatt_scale.study.statistics import difference, mean_of


def test_the_mean_of_five_seeds():
    """1..5: variance 2.5, standard error sqrt(2.5 / 5), t(0.975, 4) = 2.776445 from a printed table."""
    mean = mean_of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean.n, mean.mean) == (5, 3.0)
    assert mean.stderr == pytest.approx(math.sqrt(0.5), rel=1e-12)
    assert mean.half_width == pytest.approx(2.776445 * math.sqrt(0.5), rel=1e-6)


def test_one_seed_has_a_mean_only():
    mean = mean_of([0.5])
    assert mean.mean == 0.5 and math.isnan(mean.stderr) and math.isnan(mean.half_width)


def test_what_is_not_finite_stays_so():
    assert math.isnan(mean_of([0.5, math.nan]).mean)


def test_a_paired_test_over_three_seeds():
    """Gains 1, 2, 3: t = 2 / (1 / sqrt(3)) = 2 sqrt(3); for 2 degrees of freedom p = 1 - t / sqrt(t^2 + 2)."""
    gain = difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    t = 2 * math.sqrt(3)
    assert gain.over_seeds.mean == 2.0 and gain.over_seeds.stderr == pytest.approx(1 / math.sqrt(3), rel=1e-12)
    assert gain.over_seeds.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert gain.p == pytest.approx(1 - t / math.sqrt(t * t + 2), rel=1e-9)


@pytest.mark.parametrize("values", [[1.0], [1.0, 2.0], [0.021, 0.022, 0.023], [1.0, math.nan, 3.0]])
def test_there_is_no_p_value_without_a_spread(values):
    """Also where the gains differ by rounding only."""
    assert math.isnan(difference([value + 0.02 for value in values], values).p)


@pytest.mark.parametrize(
    ("first", "said"),
    [
        ([0.5], "- a - b: +0.2500 over 1 common seed"),
        ([0.5, math.nan], "- a - b: not finite over 2 common seeds"),
        ([0.5, 0.5], "- a - b: +0.2500 ± 0.0000 at 95 % over 2 common seeds"),
    ],
)
def test_a_comparison_has_an_interval_only_where_there_is_one(first, said):
    assert comparison("a - b", first, [0.25] * len(first)) == said


def test_equal_means_are_marked_alike():
    """Also those whose sums were rounded otherwise."""
    means = {"a": 0.1 + 0.2, "b": 0.3, "c": 0.2, "d": math.nan, "e": 0.2, "f": 0.1}
    assert marks_of(means, True) == {"a": "**", "b": "**", "c": "_", "e": "_"}
    assert marks_of(means, False) == {"f": "**", "c": "_", "e": "_"}


@pytest.mark.parametrize(
    ("tried", "said"),
    [
        (["0.002", "0.001", "0.01"], "0.002"),
        (["0.002", "0.003", "0.01"], "0.002 (lowest tried)"),
        (["0.002", "0.001", "1e-05"], "0.002 (highest tried)"),
        (["0.002"], "0.002"),
        (["0.002", "0.003", "null"], "0.002"),
    ],
)
def test_a_choice_at_the_end_of_what_was_tried_says_so(tried, said):
    """Whatever the values' order in the study file, and whether or not all trials came to an end."""
    means = {f"training.learning_rate={value}": None for value in tried}
    assert chosen({"arm": "a", "chosen": "training.learning_rate=0.002", "means": means}) == said
