"""What is left of a study: a function of its file and its results, worked out again whenever a run is finished."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass

from metatt_scale.study.results import Line, Results
from metatt_scale.study.runs import OpenStudy, Run
from metatt_scale.study.schema import Choose
from metatt_scale.study.statistics import DIGITS


@dataclass(frozen=True, kw_only=True)
class Agenda:
    """The runs that are left, and what was chosen so far."""

    left: tuple[Run, ...]
    """Runs that can start now: trials first, then seed by seed, so that all arms grow alike."""
    later: int
    """Reported runs that wait for a choice."""
    chosen: dict[str, Line]
    """Per arm with all its trials: the line of results that records the choice."""
    undecided: dict[str, str]
    """Per arm that has nothing to choose from: why; its reported runs are never done."""
    finished: dict[str, tuple[Line, ...]]
    """Reported results of every arm, in the order of its seeds."""


def agenda_of(opened: OpenStudy, results: Results) -> Agenda:
    """Compare what a study wants with what its results hold.

    Raises:
        ValueError: a result was made by another definition of its run.
    """
    study, left, later = opened.study, [], 0
    chosen: dict[str, Line] = {}
    finished: dict[str, tuple[Line, ...]] = {}
    undecided: dict[str, str] = {}
    for arm in opened.arms:
        if study.choose:
            trials = [
                opened.trial(arm, tried, seed)
                for tried, seed in itertools.product(opened.candidates, study.choose.seeds)
            ]
            if missing := [run for run in trials if not results.has(run, opened.numbers(run))]:
                left += missing
                later += len(study.seeds)
                finished[arm] = ()
                continue
            choice = _choose(opened, arm, [line for run in trials if (line := results.of(run))])
            if choice is None:
                undecided[arm], finished[arm] = _nothing_finite(arm, study.choose), ()
                continue
            chosen[arm] = choice
        runs = [opened.reported(arm, chosen[arm]["chosen"] if study.choose else None, seed) for seed in study.seeds]
        done = [run for run in runs if results.has(run, opened.numbers(run))]
        left += [run for run in runs if run not in done]
        finished[arm] = tuple(line for run in done if (line := results.of(run)))
    left.sort(key=lambda run: (run.tried is None, study.seeds.index(run.seed) if run.tried is None else 0))
    return Agenda(left=tuple(left), later=later, chosen=chosen, undecided=undecided, finished=finished)


def unused(opened: OpenStudy, results: Results) -> int:
    """Return how many results belong to arms, seeds or values that the study file no longer has."""
    choose = opened.study.choose
    known = [(arm, seed, None) for arm in opened.arms for seed in opened.study.seeds]
    trials = itertools.product(opened.arms, choose.seeds if choose else (), opened.candidates)
    return results.unused([*known, *trials])


def _nothing_finite(arm: str, choose: Choose) -> str:
    return (
        f"arm {arm}: {choose.by} was finite with no value of {choose.key} in all of its trials; try others in "
        "`choose.values`"
    )


def _choose(opened: OpenStudy, arm: str, trials: list[Line]) -> Line | None:
    """Return the choice that an arm's trials lead to; None where no value has a mean.

    Scores that count right answers are often equal, on few records, where the loss is not: it decides then.
    """
    choose = opened.study.choose
    assert choose is not None

    def mean_of(name: str, tried: str) -> float | None:
        scores = [line["scores"].get(name, {}).get("last") for line in trials if line["tried"] == tried]
        return None if None in scores else statistics.fmean(scores)

    means = {tried: mean_of(choose.by, tried) for tried in opened.candidates}
    sign = -1 if opened.prefers_more(arm, choose.by) else 1
    ranked: dict[str, tuple[float, float]] = {}
    for tried, mean in means.items():
        if mean is not None:
            loss = mean_of("eval_loss", tried)
            ranked[tried] = (round(sign * mean, DIGITS), math.inf if loss is None else loss)
    if not ranked:
        return None
    best = min(ranked, key=lambda tried: ranked[tried])
    return {"arm": arm, "chosen": best, "by": choose.by, "means": means}
