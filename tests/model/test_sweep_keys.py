"""Every key of the section `sweep` does what it says, and nothing else would have done it: one sweep each."""

import os
import signal

import pytest
import torch

from metatt_scale.tensor import balance, norm, ranks, subtract, sweep
from metatt_scale.training import TrainingStopped, checkpoint, sweeping, train
from tests.tiny import FLOAT32, randomise
from tests.toy import make_trainer, metrics, one_step, quiet, toy_recipe

AT_FOUR = {"unit": "step", "schedule": [{"after": 4, "rank": 3}]}
BY_WEIGHT = {"unit": "step", "every": 4, "max_discarded_weight": 0.5}


def trainer_after_four_steps(folder, how, rank=5):
    """A trainer whose sweep is due, its chain far from any special gauge."""
    trainer = make_trainer(toy_recipe(folder, adapter={"rank": rank}, sweep=how))
    for _ in range(4):
        one_step(trainer)
    randomise(trainer.adapter)
    return trainer


def swept(folder, how, rank=5):
    """The cores before and after a sweep, and its account."""
    trainer = trainer_after_four_steps(folder, how, rank)
    old, report = doubles(trainer), {}
    trainer._sweep_if_due(report)
    return old, doubles(trainer), report["sweep"]


def doubles(trainer):
    return [core.detach().double() for core in trainer.adapter.cores]


def same(one, other):
    """Core by core, up to the signs that singular vectors may have, and the rounding to float32."""
    return all(
        a.shape == b.shape and (a.abs() - b.abs()).norm() < FLOAT32 * b.norm()
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("form", ["canonical", "as_printed"])
def test_form(tmp_path, form):
    old, new, _ = swept(tmp_path, {**AT_FOUR, "form": form})
    expected = {
        form: sweep(old, max_ranks=3, canonical=form == "canonical").cores for form in ("canonical", "as_printed")
    }
    assert same(new, expected[form])
    assert norm(subtract(expected["canonical"], expected["as_printed"])) > 0.01 * norm(old)


@pytest.mark.parametrize("gauge", ["right_canonical", "balanced"])
def test_gauge(tmp_path, gauge):
    old, new, _ = swept(tmp_path, {**AT_FOUR, "gauge": gauge})
    right = sweep(old, max_ranks=3).cores
    assert same(new, right if gauge == "right_canonical" else balance(right))
    assert not same(right, balance(right))


@pytest.mark.parametrize("probes", [1, 3])
def test_importance_and_probe_batches(tmp_path, probes):
    """What is kept is what the loss feels on so many batches, and that is not what is largest."""
    how = {
        **AT_FOUR,
        "importance": "sensitivity",
        **({"probe_batches": probes} if probes > 1 else {"probe_batches": 1}),
    }
    old, new, report = swept(tmp_path, how)
    other = trainer_after_four_steps(tmp_path, how)
    asked = []

    def gradients(i):
        asked.append(i)
        return other._gradient(4 + i)[-1]

    canonical, scores = sweeping._probe(probes, other.adapter, doubles(other), other.world, gradients)
    expected = sweep(canonical, max_ranks=3, scores=scores)
    assert report["by"] == "sensitivity" and asked == list(range(probes))
    assert norm(subtract(new, expected.cores)) < FLOAT32 * norm(old)
    assert any(cut.kept.tolist() != [0, 1, 2] for cut in expected.cuts)
    assert norm(subtract(new, sweep(old, max_ranks=3).cores)) > 0.01 * norm(old)


@pytest.mark.parametrize("rank, after", [(7, (7, 7, 7)), ([6, 3, 8], (6, 3, 6)), ([8, 8, 3], (8, 6, 3))])
def test_ranks_that_grow(tmp_path, rank, after):
    """One number or one per bond: wider bonds leave the tensor as it is, the others are cut."""
    old, new, report = swept(tmp_path, {**AT_FOUR, "schedule": [{"after": 4, "rank": rank}]})
    assert ranks(new) == after == tuple(report["ranks_after"])
    if min(after) > 5:
        assert norm(subtract(new, old)) < FLOAT32 * norm(old)


def test_bounds_of_the_discarded_weight(tmp_path):
    free = swept(tmp_path, BY_WEIGHT)[2]["ranks_after"]
    assert max(free) < 5
    assert swept(tmp_path, {**BY_WEIGHT, "min_rank": 4})[2]["ranks_after"] == [4, 4, 4]
    assert swept(tmp_path, {**BY_WEIGHT, "max_discarded_weight": 1e-9})[2]["ranks_after"] == [5, 5, 5]
    assert swept(tmp_path, {**BY_WEIGHT, "max_discarded_weight": 1e-9, "max_rank": 2})[2]["ranks_after"] == [2, 2, 2]


def test_warmup_steps_lower_the_rates_behind_a_sweep(tmp_path):
    rates = []
    for name, more in (("plain", {}), ("warm", {"warmup_steps": 1})):
        recipe = toy_recipe(
            tmp_path, output_dir=str(tmp_path / name), training={"schedule": "constant"}, sweep={**AT_FOUR, **more}
        )
        train(recipe, quiet())
        rates.append([line["learning_rate"] for line in metrics(tmp_path / name)])
    assert [warm / plain for plain, warm in zip(*rates, strict=True)] == [1, 1, 1, 1, 0.5, 1]


# ---- local steps


def test_the_rate_of_local_steps(tmp_path):
    """At a rate of nearly nothing they only merge and cut; by default they learn at the run's."""
    how = {**AT_FOUR, "schedule": [{"after": 4, "rank": 5}], "local_steps": 2}
    old, still, report = swept(tmp_path, {**how, "local_learning_rate": 1e-9})
    assert norm(subtract(still, old)) < 1e-4 * norm(old) and report["predicted_rel_error"] is None
    moved = [norm(subtract(swept(tmp_path, {**how, **own})[1], old)) for own in ({}, {"local_learning_rate": 1e-2})]
    assert moved[0] == moved[1] > 0.01 * norm(old), "training.learning_rate is 1e-2"


def test_local_steps_by_discarded_weight_widen_no_bond_unasked(tmp_path):
    """A trained pair of cores has a full spectrum; its cut would keep far more than there was."""
    how = {**BY_WEIGHT, "local_steps": 2}
    assert swept(tmp_path, {**how, "max_discarded_weight": 1e-9})[2]["ranks_after"] == [5, 5, 5]
    assert swept(tmp_path, {**how, "max_discarded_weight": 1e-9, "max_rank": 7})[2]["ranks_after"] == [7, 7, 7]
    assert max(swept(tmp_path, {**how, "max_discarded_weight": 0.5})[2]["ranks_after"]) < 5
    assert swept(tmp_path, {**how, "max_discarded_weight": 0.9, "min_rank": 4})[2]["ranks_after"] == [4, 4, 4]


# ---- a stop meanwhile


@pytest.mark.parametrize("more", [{"local_steps": 2}, {"importance": "sensitivity"}])
def test_a_signal_during_a_sweep_stops_behind_it(tmp_path, monkeypatch, more):
    """Gradients of a sweep carry signals like any other; no further step is done."""
    recipe = toy_recipe(tmp_path, sweep={**AT_FOUR, **more})
    before = sweeping._before_the_cut

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return before(*args)

    monkeypatch.setattr(sweeping, "_before_the_cut", signalled)
    with pytest.raises(TrainingStopped):
        train(recipe, quiet())
    newest = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert newest.name.endswith("4") and metrics(tmp_path / "run")[-1]["sweep"]["ranks_after"] == [3, 3, 3]


def test_the_sweep_alone_is_what_the_keys_are_tried_on(tmp_path):
    """The chain of these tests is in no canonical form and has no small singular value."""
    old = doubles(trainer_after_four_steps(tmp_path, AT_FOUR))
    assert all(float(cut.singular_values[-1] / cut.singular_values[0]) > 0.05 for cut in sweep(old).cuts)
    assert not torch.allclose(old[1].flatten(1) @ old[1].flatten(1).mT, torch.eye(5, dtype=torch.float64))
