"""Sweeps in the course of a run: when, what they leave, and that a stopped run goes on with the same bits."""

import pytest
import torch

from metatt_scale.adapter import norm_in_use
from metatt_scale.adapter.modes import factors
from metatt_scale.recipe import RecipeError, validate
from metatt_scale.tensor import canonicalise, norm, ranks, singular_values, subtract
from metatt_scale.training import checkpoint, local, run, sweeping, train
from metatt_scale.training.optimizer import moments_of
from metatt_scale.training.sweep_plan import plan_sweeps
from tests.tiny import randomise
from tests.toy import bits_of, make_trainer, metrics, one_step, quiet, toy, toy_recipe, write_toy

STEPS = {"max_steps": 12, "save_every": 2, "eval_every": 3}
SCHEDULE = {"unit": "step", "schedule": [{"after": 4, "rank": 3}, {"after": 8, "rank": [2, 3, 1]}]}
WAYS = {
    "schedule": SCHEDULE,
    "as printed": {**SCHEDULE, "form": "as_printed"},
    "balanced, transported": {**SCHEDULE, "gauge": "balanced", "moments": "transport", "warmup_steps": 2},
    "sensitivity": {**SCHEDULE, "importance": "sensitivity", "probe_batches": 2, "moments": "transport"},
    "weight": {"unit": "step", "max_discarded_weight": 0.2, "every": 5, "min_rank": 2},
    "growth": {
        "unit": "step",
        "schedule": [{"after": 4, "rank": 6}, {"after": 8, "rank": 8}],
        "moments": "transport",
    },
    "local": {**SCHEDULE, "local_steps": 2, "local_learning_rate": 1e-3},
}


def ways():
    return pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)


# ---- when and how far


def plan_of(tmp_path, per_epoch=10, total=100, rank=40, **sweep):
    recipe = toy_recipe(tmp_path, adapter={"rank": rank}, training={"max_steps": total}, sweep=sweep)
    return plan_sweeps(recipe, per_epoch, total)


def test_ranks_of_appendix_i(tmp_path):
    plan = plan_of(tmp_path, formula={"final_rank": 20, "sweeps": 5, "gamma": 2.0}, unit="step", every=16)
    assert plan.targets == {16: 39, 32: 37, 48: 33, 64: 27, 80: 20}  # the integers of the paper
    assert plan_of(tmp_path, formula={"final_rank": 20, "sweeps": 2}, every=3).targets == {30: 35, 60: 20}


def test_schedules_and_bounds(tmp_path):
    assert plan_of(tmp_path, schedule=[{"after": 3, "rank": 8}, {"after": 10, "rank": 4}]).targets == {30: 8, 100: 4}
    assert list(plan_of(tmp_path, max_discarded_weight=0.1, every=4).targets) == [40, 80]
    assert list(plan_of(tmp_path, max_discarded_weight=0.1, every=30, unit="step", last=70).targets) == [30, 60]
    none = plan_sweeps(toy_recipe(tmp_path), 10, 100)
    assert not none.targets and none.warmup(3) == 1.0
    with pytest.raises(
        ValueError, match=r"last sweep is due after epoch 11, but .* after 10 \(100 steps, 10 per epoch\)"
    ):
        plan_of(tmp_path, schedule=[{"after": 11, "rank": 8}])
    with pytest.raises(ValueError, match="last sweep is due after epoch 10, but the run ends after 9"):
        plan_of(tmp_path, total=99, schedule=[{"after": 10, "rank": 8}])  # a part of an epoch is none
    with pytest.raises(ValueError, match=r"first sweep is due after step 200, but the run ends after 100"):
        plan_of(tmp_path, max_discarded_weight=0.1, unit="step", every=200)


def test_warmup_after_a_sweep(tmp_path):
    plan = plan_of(tmp_path, schedule=[{"after": 4, "rank": 3}, {"after": 8, "rank": 2}], unit="step", warmup_steps=3)
    assert [plan.warmup(step) for step in range(12)] == [1, 1, 1, 1, 0.25, 0.5, 0.75, 1, 0.25, 0.5, 0.75, 1]
    points = [{"after": 4, "rank": 3}, {"after": 8, "rank": 2}]
    with pytest.raises(ValueError, match=r"warmup_steps` is 5, but the next sweep follows 4 steps after .* step 4"):
        plan_of(tmp_path, schedule=points, unit="step", warmup_steps=5)
    with pytest.raises(ValueError, match="is 4, but the run ends 2 steps after the sweep at step 8"):
        plan_of(tmp_path, total=10, schedule=points, unit="step", warmup_steps=4)


@pytest.mark.parametrize(
    "sweep, message",
    [
        ({}, "no rule for the ranks"),
        ({"schedule": [{"after": 1, "rank": 2}], "formula": {"final_rank": 2}}, "`schedule` and `formula`"),
        ({"schedule": [{"after": 3, "rank": 2}, {"after": 3, "rank": 1}]}, "must ascend"),
        (
            {"schedule": [{"after": 3, "rank": [2, 2]}]},
            r"`sweep.schedule.0.rank` has 2 entries",
        ),
        ({"schedule": [{"after": 0, "rank": 2}]}, "after"),
        ({"schedule": [{"after": 1, "rank": 0}]}, r"sweep.schedule.0`: `rank` is 0; ranks must be at least 1"),
        ({"unit": "step", "schedule": [{"after": 7, "rank": 2}]}, r"run ends after 6 \(`training.max_steps`\)"),
        ({"max_discarded_weight": 0.1, "every": 4, "last": 3}, "`last` is 3, before the first sweep"),
        ({"schedule": [{"after": 1, "rank": 2}], "probe_batches": 3}, "`probe_batches` is for `importance: sens"),
        ({"schedule": [{"after": 1, "rank": 2}], "max_rank": 4}, "`max_rank` is for `max_discarded_weight`"),
        ({"max_discarded_weight": 0.1, "min_rank": 5, "max_rank": 4}, "below `min_rank`"),
        ({"schedule": [{"after": 1, "rank": 2}], "every": 2}, "says when by `after`"),
        ({"max_discarded_weight": 0.1, "importance": "sensitivity", "form": "as_printed"}, "form: canonical"),
        ({"max_discarded_weight": 0.1, "local_learning_rate": 0.1}, "`local_steps` is 0"),
        ({"max_discarded_weight": 1.0}, "less than 1"),
    ],
)
def test_bad_sections(tmp_path, sweep, message):
    with pytest.raises(RecipeError, match=message):
        validate(toy(tmp_path) | {"sweep": sweep}, "toy")


def test_sweeps_behind_the_last_epoch_are_refused_with_the_recipe(tmp_path):
    training = {"max_steps": None, "epochs": 5}
    with pytest.raises(RecipeError, match=r"due after epoch 6, but the run ends after 5 \(`training.epochs`\)"):
        toy_recipe(tmp_path, training=training, sweep={"formula": {"final_rank": 2, "sweeps": 6}})


def test_what_only_the_data_tell_is_refused_before_the_backbone_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_backbone", lambda *_: pytest.fail("too late"))
    for sweep in ({"schedule": [{"after": 2, "rank": 2}]}, {**SCHEDULE, "warmup_steps": 5}):
        with pytest.raises(ValueError, match=r"run ends after 1 \(6 steps, 4 per epoch\)|next sweep follows 4 steps"):
            train(
                toy_recipe(tmp_path, training={"max_steps": 6 if "unit" not in sweep else 12}, sweep=sweep), quiet()
            )


def test_the_formula_starts_from_one_rank(tmp_path):
    with pytest.raises(RecipeError, match="one rank for all bonds"):
        validate(toy(tmp_path, adapter={"rank": [4, 4, 4]}) | {"sweep": {"formula": {"final_rank": 2}}}, "toy")


# ---- in a run


@ways()
def test_a_run_sweeps_and_goes_on_where_it_was_stopped(tmp_path, how):
    """Killed after its eighth step, between the two sweeps or right behind the second one, and resumed."""
    write_toy(tmp_path)
    sections = {"training": {**STEPS, "keep": "best"}, "adapter": {"rank": 5}, "sweep": how}
    straight = toy_recipe(tmp_path, output_dir=str(tmp_path / "straight"), **sections)
    train(straight, quiet())
    lines = metrics(tmp_path / "straight")
    swept = {line["step"]: line["sweep"] for line in lines if "sweep" in line}
    plan = plan_sweeps(straight, 4, 12)
    assert list(swept) == list(plan.targets)
    assert all(line["ranks"] == swept[line["step"]]["ranks_after"] for line in lines if line["step"] in swept)
    # The last bond of 1 and two projections have no use for a bond of 3.
    wanted = {3: [3, 3, 3], (2, 3, 1): [2, 2, 1], 6: [6, 6, 6], 8: [8, 8, 8]}
    assert all(swept[step]["ranks_after"] == wanted[target] for step, target in plan.targets.items() if target)
    assert all(len(line["spectra"]) == 3 for line in lines if "eval_loss" in line)

    for stop in (6, 8):
        recipe = toy_recipe(tmp_path, output_dir=str(tmp_path / f"stopped-{stop}"), **sections)
        trainer = stopped_at(recipe, stop)
        assert [done["step"] for done in trainer.progress.sweeps] == [s for s in plan.targets if s <= stop]
        train(recipe, quiet())
        assert bits_of(tmp_path / f"stopped-{stop}") == bits_of(tmp_path / "straight")
        one, other = (tmp_path / name / "adapter/metatt.safetensors" for name in (f"stopped-{stop}", "straight"))
        assert one.read_bytes() == other.read_bytes()


def stopped_at(recipe, stop):
    """Train as `train` does, but be killed behind the checkpoint of step `stop`."""
    seen = []
    before = checkpoint.save

    def save(root, snapshot, *more):
        before(root, snapshot, *more)
        seen.append(snapshot)
        if snapshot.progress.step == stop:
            raise SystemExit

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(checkpoint, "save", save)
        train(recipe, quiet())
    return seen[-1]


def test_moments_are_reset_or_transported(tmp_path):
    for moments, count in (("reset", {1.0}), ("transport", {5.0})):
        sweep = {**SCHEDULE, "schedule": [{"after": 4, "rank": 3}], "moments": moments}
        trainer = make_trainer(toy_recipe(tmp_path, adapter={"rank": 4}, sweep=sweep))
        for _ in range(4):
            one_step(trainer)
        report = {"ranks": []}
        trainer._sweep_if_due(report)
        assert trainer.adapter.spec.ranks == (3, 3, 3) == tuple(report["ranks"])
        states = moments_of(trainer.optimizer, trainer.adapter.trained()).values()
        for state, core in zip(states, trainer.adapter.cores, strict=True):
            assert bool(state) == (moments == "transport")
            if state:
                assert state["exp_avg"].shape == core.shape and state["exp_avg"].norm() > 0
                assert (state["exp_avg_sq"] > 0).all() and state["exp_avg"].dtype == torch.float32
        one_step(trainer)
        states = moments_of(trainer.optimizer, trainer.adapter.trained()).values()
        assert {float(state["step"]) for state in states} == count


def test_a_sweep_without_a_cut_changes_neither_loss_nor_transported_descent(tmp_path):
    """Where nothing is cut, <m, core>, the mean slope of the loss along a core, is a number without a gauge."""
    sweep = {"unit": "step", "schedule": [{"after": 4, "rank": 4}], "moments": "transport"}
    trainer = make_trainer(toy_recipe(tmp_path, adapter={"rank": 4}, sweep=sweep))
    for _ in range(4):
        one_step(trainer)
    before, losses, descents = [core.detach().double() for core in trainer.adapter.cores], [], []
    for _ in range(2):
        losses.append(trainer._gradient(7)[-1].read().loss)
        trainer.adapter.zero_grad()
        moments = moments_of(trainer.optimizer, trainer.adapter.trained())
        cores = [core.detach() for core in trainer.adapter.cores]
        descents.append([float((moments[f"core_{k}"]["exp_avg"] * core).sum()) for k, core in enumerate(cores)])
        if len(losses) == 1:
            trainer._sweep_if_due({})
    assert norm(subtract(before, [core.detach().double() for core in trainer.adapter.cores])) < 1e-6 * norm(before)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert descents[0] == pytest.approx(descents[1], rel=1e-3) and min(map(abs, descents[0])) > 1e-8


def test_the_account_of_a_sweep(tmp_path):
    trainer = make_trainer(toy_recipe(tmp_path, adapter={"rank": 4, "target_modules": ["q_proj", "down_proj"]}))
    randomise(trainer.adapter)
    old = [core.detach().double() for core in trainer.adapter.cores]
    swept = sweeping.sweep(old, max_ranks=2)
    new = [core.detach().double() for core in swept.cores]
    report = sweeping._report(
        swept.cuts, swept.predicted_error, old, new, trainer.adapter.spec, trainer.adapter.targets
    )
    assert report["ranks_before"] == [4, 4, 4] and report["ranks_after"] == [2, 2, 2]
    assert report["predicted_rel_error"] == report["measured_rel_error"] > 0.01
    assert report["measured_rel_error"] == pytest.approx(float(norm(subtract(old, new)) / norm(old)), rel=1e-5)
    a, c, b = factors(trainer.adapter.spec, old)  # module by module, dense
    deltas = [a[0, 0, : t.d_in] @ c[t.layer, t.projection] @ b[0, 0][:, : t.d_out] for t in trainer.adapter.targets]
    whole = torch.stack([delta.square().sum() for delta in deltas]).sum().sqrt()
    assert norm_in_use(trainer.adapter.spec, old, trainer.adapter.targets) == pytest.approx(float(whole), rel=1e-12)
    assert report["used_rel_error"] != report["measured_rel_error"], "down_proj reads 48, q_proj 32"


# ---- sensitivity


def test_sensitivity_is_the_slope_of_the_loss(tmp_path):
    """Against differences of the loss when one singular value is scaled, in float64."""
    sweep = {**SCHEDULE, "importance": "sensitivity", "probe_batches": 1}
    trainer = make_trainer(toy_recipe(tmp_path, adapter={"rank": 3}, training=STEPS, sweep=sweep), torch.float64)
    randomise(trainer.adapter)
    old = [core.detach().clone() for core in trainer.adapter.cores]
    gradients = lambda i: trainer._gradient(i)[-1]  # noqa: E731
    cores, scores = sweeping._probe(1, trainer.adapter, old, trainer.world, gradients)
    assert scores is not None
    for bond in range(3):
        left = canonicalise(cores, bond)[bond].flatten(0, 1)
        _, s, vh = torch.linalg.svd(left, full_matrices=False)
        worth = scores(bond, s, vh)
        for i in range(len(s)):
            slope = []
            for t in (1e-2, -1e-2):  # norms of the model are computed in fp32: no finer
                scaled = list(cores)
                x = torch.eye(len(vh), dtype=torch.float64) + t * torch.outer(vh[i], vh[i])
                scaled[bond + 1] = torch.tensordot(x, cores[bond + 1], 1)
                trainer.adapter.set_cores(scaled)
                slope.append(trainer._gradient(0)[-1].read().loss)
                trainer.adapter.zero_grad()
            tokens = trainer._gradient(0)[1]
            trainer.adapter.zero_grad()
            assert worth[i] == pytest.approx(abs(slope[0] - slope[1]) / 2e-2 / tokens, rel=5e-3, abs=1e-5)


# ---- local steps


def test_a_merged_pair_is_the_same_chain(tmp_path):
    trainer = make_trainer(toy_recipe(tmp_path, adapter={"rank": 4}))
    randomise(trainer.adapter)
    old = [core.detach().double() for core in trainer.adapter.cores]
    for k in range(3):
        merged = local.merge_pair(old, k)
        p, n, bond = merged[k].shape
        assert bond == min(p * n, merged[k + 1].shape[1] * merged[k + 1].shape[2])
        assert norm(subtract(merged, old)) < 1e-12 * norm(old)
        theta = merged[k + 1] if bond == p * n else merged[k]
        assert theta.norm() == pytest.approx(float(norm(old)), rel=1e-12), "the centre is theta"


def test_local_steps_lower_the_loss_and_keep_the_ranks(tmp_path):
    sweep = {**SCHEDULE, "local_steps": 8, "local_learning_rate": 3e-3}
    trainer = make_trainer(toy_recipe(tmp_path, adapter={"rank": 4}, training=STEPS, sweep=sweep))
    randomise(trainer.adapter)
    old = [core.detach().double() for core in trainer.adapter.cores]

    def loss():
        value = trainer._gradient(0)[-1].read().loss
        trainer.adapter.zero_grad()
        return value

    before = loss()
    cores, cuts = local.optimise_bonds(
        trainer.recipe, (4, 4, 4), trainer.adapter, old, trainer.world, lambda i: trainer._gradient(0)[-1]
    )
    assert ranks(cores) == (4, 4, 4) and len(cuts) == 3
    assert all(len(cut.singular_values) > 4 for cut in cuts), "theta is wider than what it came from"
    trainer.adapter.set_cores([core.float() for core in cores])
    assert loss() < 0.95 * before
    assert all(s.isfinite().all() for s in singular_values(cores))


# ---- what fresh eyes found


def test_a_sweep_before_the_chain_has_moved_keeps_its_start(tmp_path):
    """Step 1 has a learning rate of zero: the chain is zero, and SVDs of it would leave one slice of each core."""
    sweep = {"unit": "step", "schedule": [{"after": 1, "rank": 3}]}
    trainer = make_trainer(toy_recipe(tmp_path, adapter={"rank": 4}, sweep=sweep))
    one_step(trainer)
    report = {}
    trainer._sweep_if_due(report)
    _, *others = (core.detach().norm(dim=(0, 2)) for core in trainer.adapter.cores)
    assert report["ranks"] == [3, 3, 3] and all((slices[:2] > 0.1).all() for slices in others)
    assert trainer._gradient(1)[-1].read().gradient_norm > 0.1


def test_the_best_cores_have_the_ranks_that_were_asked_for(tmp_path):
    sections = {"training": {**STEPS, "keep": "best", "eval_every": 1}, "adapter": {"rank": 4}}
    recipe = toy_recipe(tmp_path, sweep={"unit": "step", "schedule": [{"after": 12, "rank": 1}]}, **sections)
    assert train(recipe, quiet()).adapter.spec.ranks == (1, 1, 1)


def test_no_finite_gradient_means_size_decides(tmp_path, monkeypatch):
    sweep = {**SCHEDULE, "importance": "sensitivity", "probe_batches": 2}
    trainer = make_trainer(toy_recipe(tmp_path, adapter={"rank": 4}, training=STEPS, sweep=sweep))
    for _ in range(4):
        one_step(trainer)
    finite = trainer.objective.loss_sum
    monkeypatch.setattr(type(trainer.objective), "loss_sum", lambda self, batch, _: finite(batch) * float("nan"))
    report = {}
    trainer._sweep_if_due(report)
    assert report["ranks"] == [3, 3, 3] and report["sweep"]["by"] == "magnitude: no gradient was finite"
