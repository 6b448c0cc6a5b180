"""Where adapters start: what the seed decides, how wide values spread, and what may not start alike."""

import itertools

import pytest
import torch

from metatt_scale.adapter.leaves import like_linear
from metatt_scale.adapter.targets import Target, TargetMap
from metatt_scale.methods import build_adapter, make_alone, starts
from metatt_scale.parallel import World
from tests.methods import TASKS, recipe_of
from tests.model.test_tasks import NAMES, toy_tasks
from tests.tiny import tiny_model
from tests.toy import CPU, make_trainer, one_step

CHAINS = {
    "metatt_4d": "ze-no-no-id",
    "metatt_5d": "ze-no-no-no-id",
    "lotr": "ze-no-id",
    "lorta": "no-id-id-id-ze",
}
OTHERS = ["mtl_lora", "moe_lora", "loretta_rep", "loretta_adp"]


def built(kind, seed=1, **adapter):
    """A new adapter behind a tiny model."""
    names = {} if kind == "loretta_adp" else {"rank": 4, "target_modules": ["q_proj", "down_proj"]}
    recipe = recipe_of(kind, tasks=TASKS, **names, **adapter).model_copy(update={"seed": seed})
    return build_adapter(tiny_model("llama"), recipe, World(device=CPU))


@pytest.mark.parametrize("kind", [*CHAINS, *OTHERS])
def test_every_seed_has_a_start_of_its_own(kind):
    first, again, other = (built(kind, seed).trained() for seed in (1, 1, 2))
    drawn = {name for name, value in first.items() if not bool(((value == 0) | (value == 1)).all())}
    assert drawn
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, other[name]) == (name not in drawn), name


@pytest.mark.parametrize(("kind", "init"), CHAINS.items())
def test_a_chain_starts_as_its_kind_does(kind, init):
    usual, asked = built(kind).trained(), built(kind, init=init).trained()
    assert all(torch.equal(value, asked[name]) for name, value in usual.items())


@pytest.mark.parametrize("shape", [(48, 2000), (2000, 48)])
def test_like_linear_spreads_by_its_input_alone(shape):
    values, bound = like_linear(shape, 1, "A"), shape[0] ** -0.5
    assert 0.999 * bound < values.max() <= bound and -bound <= values.min() < -0.999 * bound
    assert values.var().item() == pytest.approx(bound**2 / 3, rel=0.02)


def test_entries_of_folded_matrices_have_the_variance_of_loras():
    """On average over many matrices: the entries of one share their cores."""
    targets = tuple(Target(path=f"{i}", layer=i, projection=0, d_in=30, d_out=20) for i in range(500))
    target_map = TargetMap(targets=targets, layers=tuple(range(500)), projections=("",))
    adapter = make_alone(target_map, recipe_of("loretta_rep", rank=6, loretta={"tensor_rank": 4}), torch.float32)
    squares = [adapter.matrices(index)[0].square().mean().item() for index in range(500)]
    assert sum(squares) / 500 == pytest.approx(1 / (3 * 30), rel=0.05)


def test_the_up_projections_of_mtl_lora_part(tmp_path):
    trainer = make_trainer(toy_tasks(tmp_path, kind="mtl_lora", adapter={"rank": 4}))
    for _ in range(3):
        one_step(trainer)
    for target in trainer.adapter.targets:
        for one, other in itertools.combinations(trainer.adapter.trained()[f"{target.path}.B"], 2):
            assert (one - other).norm() > 1e-3 * one.norm() > 0


def test_every_task_of_moe_lora_starts_with_a_gate_of_its_own():
    adapter, factors = built("moe_lora"), []
    for adapter.task in range(len(NAMES)):
        factors.append([pair.lora_A for pair in adapter.lora_pairs()])
    for one, other in itertools.combinations(factors, 2):
        assert all((a - b).norm() > 0.05 * a.norm() for a, b in zip(one, other, strict=True))


def pissa(**how):
    recipe = recipe_of("lora", rank=2, init="pissa", target_modules=["q_proj"])
    return build_adapter(tiny_model("llama"), recipe, World(device=CPU), **how)


def test_a_weight_that_cannot_be_factorised_is_told_by_its_name(monkeypatch):
    """Behind the last gather, where all ranks listen."""
    tried = []

    def fail(plain, recipe):
        tried.append(plain)
        raise RuntimeError("no singular values")

    monkeypatch.setattr(starts, "_factors", fail)
    with pytest.raises(
        ValueError, match=r"adapter.init pissa: .*0\.self_attn\.q_proj cannot be factorised \(no singular"
    ):
        pissa()
    assert len(tried) > 1


def test_a_resumed_run_factorises_nothing_again(monkeypatch):
    assert any(name.endswith("start_A") and bool(value.any()) for name, value in pissa().tensors().items())
    monkeypatch.setattr(starts, "_factors", lambda *_: pytest.fail("computed again"))
    pissa(resumes=True)
