"""The optimizer step, and the life of a run in one process."""

import dataclasses
import itertools
import math

import pytest
import torch

from metatt_scale.recipe import TrainingRecipe
from metatt_scale.training import train
from metatt_scale.training.optimizer import clip, learning_rate
from metatt_scale.training.seeds import derived_seed
from metatt_scale.training.slices import SliceNorms
from tests.tiny import FLOAT32, FLOAT64, randomise
from tests.toy import (
    GPT2,
    LLAMA,
    make_trainer,
    metrics,
    one_step,
    quiet,
    said,
    tensorboard_scalars,
    toy_recipe,
    write_toy,
)

# ---- one optimizer step


def test_loss_and_gradients_do_not_depend_on_the_micro_batch_size(tmp_path):
    found = []
    for size in (1, 3, 16):
        trainer = make_trainer(toy_recipe(tmp_path, training={"micro_batch_size": size}), torch.float64)
        randomise(trainer.adapter)
        _, indices = trainer.order.global_batch(0)
        tokens = int(trainer.data.table.targets[indices].sum())
        loss, length = trainer._accumulate(indices, tokens, step=0)
        assert length == trainer.data.table.lengths[indices].sum()
        found.append((loss / tokens, [core.grad for core in trainer.adapter.cores]))
    (loss, gradients), *others = found
    assert loss > 1 and all(gradient.norm() > 1e-6 for gradient in gradients)
    for other_loss, other_gradients in others:
        assert abs(other_loss - loss) < FLOAT64 * loss
        for one, other in zip(gradients, other_gradients, strict=True):
            assert (one - other).norm() < FLOAT64 * one.norm()


def test_a_step_is_plain_adamw_on_the_clipped_gradient(tmp_path):
    recipe = toy_recipe(tmp_path, training={"max_grad_norm": 0.01, "warmup_ratio": 0.0, "weight_decay": 0.1})
    trainer = make_trainer(recipe, torch.float64)
    randomise(trainer.adapter)
    _, indices = trainer.order.global_batch(0)
    tokens = int(trainer.data.table.targets[indices].sum())
    trainer._accumulate(indices, tokens, 0)
    before = [core.detach().clone() for core in trainer.adapter.cores]
    gradients = [core.grad.clone() for core in trainer.adapter.cores]
    trainer.optimizer.zero_grad()
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    report = one_step(trainer)
    assert report["grad_norm"] == pytest.approx(norm, rel=FLOAT64) and norm > 0.01
    for core, old, gradient in zip(trainer.adapter.cores, before, gradients, strict=True):
        g = gradient * 0.01 / norm
        # The first step of AdamW: both moments corrected for their bias are g and g^2.
        expected = old * (1 - 1e-2 * 0.1) - 1e-2 * g / (g.abs() + 1e-8)
        assert (core - expected).norm() < 1e-9 * expected.norm()


def test_clipping():
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    clip(gradients, torch.tensor(5.0), 10.0)
    clip(gradients, torch.tensor(5.0), 0.0)
    assert [g.norm() for g in gradients] == [3, 4], "neither below the bound nor with 0 is anything clipped"
    clip(gradients, torch.tensor(5.0), 2.0)
    assert gradients[0][0] == pytest.approx(1.2) and gradients[1][0, 0] == pytest.approx(1.6)


def rates(schedule, total=100, warmup_ratio=0.1):
    recipe = TrainingRecipe(schedule=schedule, learning_rate=2.0, warmup_ratio=warmup_ratio)
    return [learning_rate(recipe, step, total) for step in range(total + 1)]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_learning_rate_is_that_of_transformers(schedule):
    import transformers

    names = {"constant": "constant_with_warmup"}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    steps: dict = {} if schedule == "constant" else {"num_training_steps": 100}
    theirs = transformers.get_scheduler(names.get(schedule, schedule), optimizer, num_warmup_steps=10, **steps)
    for step, ours in enumerate(rates(schedule)):
        # Theirs begins with a step of rate 0.
        wanted = 2.0 * (step + 1) / 11 if step < 10 else theirs.get_last_lr()[0]
        assert ours == pytest.approx(wanted, rel=1e-12, abs=1e-15)
        optimizer.step()
        theirs.step()


def test_learning_rate_endpoints():
    assert rates("linear")[0] == 2.0 / 11 and rates("linear")[10] == 2.0
    assert rates("linear")[55] == pytest.approx(1.0) and rates("linear")[100] == 0
    assert rates("cosine")[55] == pytest.approx(1.0) and rates("cosine")[100] == pytest.approx(0, abs=1e-15)
    assert rates("constant")[10] == rates("constant")[100] == 2.0
    assert rates("linear", warmup_ratio=0.0)[0] == 2.0
    assert rates("linear", total=7, warmup_ratio=0.1)[1] == 2.0, "ceil(0.7) = 1 step of warm-up"


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("total", [1, 2, 3, 17])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.06, 0.5, 0.99])
def test_no_step_has_the_rate_0(schedule, total, warmup_ratio):
    assert min(rates(schedule, total, warmup_ratio)[:total]) > 0


def test_only_the_cores_train_and_their_count_is_printed(tmp_path):
    console = quiet()
    run = train(toy_recipe(tmp_path), console)
    cores = list(run.adapter.parameters())
    assert all(core.requires_grad and core.dtype == torch.float32 for core in cores)
    assert [p for p in run.model.parameters() if p.requires_grad or p.grad is not None] == []
    count = 32 * 4 + 3 * 4 * 4 + 2 * 4 * 4 + 4 * 32
    assert sum(core.numel() for core in cores) == run.adapter.spec.n_parameters == count
    lora = 3 * 8 * (32 + 32 + 32 + 16)
    assert run.adapter.target_map.lora_parameters(8) == lora
    assert f"training {count} parameters" in said(console)
    assert f"LoRA r=8 on the same would train {lora:,}" in said(console)


def test_half_precision_keeps_small_gradients(tmp_path):
    """Without a scale, the gradients of a mean over many tokens fall below the smallest half-precision number."""
    write_toy(tmp_path, n=600)
    gradients = []
    for dtype in (torch.float32, torch.float16):
        trainer = make_trainer(toy_recipe(tmp_path, training={"batch_size": 512, "micro_batch_size": 64}), dtype)
        randomise(trainer.adapter.float(), scale=0.1)
        _, indices = trainer.order.global_batch(0)
        trainer._accumulate(indices, 100_000, 0)  # a denominator as of a large batch
        gradients.append(torch.cat([core.grad.flatten() for core in trainer.adapter.cores]))
    assert trainer.adapter.compute_dtype == torch.float16
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert error < 2e-2, error  # half precision rounds to 5e-4; three layers and their softmaxes amplify it


# ---- dropout and learning


def dropout_losses(tmp_path, seed, name):
    config = {**GPT2, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
    write_toy(tmp_path, config=config)
    recipe = toy_recipe(tmp_path, output_dir=str(tmp_path / name), seed=seed, adapter={"target_modules": ["c_attn"]})
    train(recipe, quiet())
    return [line["loss"] for line in metrics(tmp_path / name)]


def test_dropout_is_reproducible(tmp_path):
    losses = dropout_losses(tmp_path, 1, "a")
    torch.rand(7)  # the state of the global generator does not matter
    assert dropout_losses(tmp_path, 1, "b") == losses
    assert dropout_losses(tmp_path, 2, "c") != losses


def test_dropout_depends_on_seed_step_and_rank():
    """On its own: torch's CPU generator reads 32 of 64 bits, and an other seed gives other batches anyway."""
    draws = set()
    for seed in (0, 1, 2, 2**32, 2**62):
        for step, rank in ((0, 0), (1, 0), (0, 1)):
            torch.manual_seed(derived_seed("dropout", seed, step, rank))
            draws.add(tuple(torch.rand(4).tolist()))
    assert len(draws) == 15


def test_the_loop_draws_dropout_by_seed_step_and_rank(tmp_path):
    seeds, drawn = [], set()
    for seed in (1, 2):
        trainer = make_trainer(toy_recipe(tmp_path, seed=seed))
        _, indices = trainer.order.global_batch(0)
        trainer.model.register_forward_pre_hook(lambda *_: seeds.append(torch.initial_seed()))
        for step, rank in itertools.product((0, 1), (0, 1)):
            trainer.world = dataclasses.replace(trainer.world, rank=rank, size=2)
            seeds.clear()
            trainer._accumulate(indices, 100, step)
            assert set(seeds) == {derived_seed("dropout", seed, step, rank)}
            drawn.update(seeds)
    assert len(drawn) == 8


def test_a_run_holds_out_and_draws_by_the_seed_of_its_recipe(tmp_path):
    recipe = toy_recipe(tmp_path, seed=3, training={"max_steps": 2, "eval_every": 2})
    train(recipe, quiet())
    trainer, lines = make_trainer(recipe), metrics(tmp_path / "run")
    losses = [one_step(trainer)["loss"] for _ in lines]
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=FLOAT32)
    assert lines[-1]["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=FLOAT32)


def test_the_largest_seed_of_a_recipe_trains(tmp_path):
    train(toy_recipe(tmp_path, seed=2**63 - 1, training={"max_steps": 2}), quiet())
    assert len(metrics(tmp_path / "run")) == 2


@pytest.mark.parametrize("kind", ["metatt_4d", "metatt_5d"])
def test_the_loss_goes_down(tmp_path, kind):
    settings = {"max_steps": 60, "eval_every": 20, "warmup_ratio": 0.0, "save_every": "never"}
    adapter = {
        "kind": kind,
        "rank": 8,
        "target_modules": "all-linear" if kind == "metatt_4d" else ["q_proj", "v_proj"],
    }
    recipe = toy_recipe(tmp_path, training=settings, adapter=adapter)
    before = make_trainer(recipe).evaluate()["eval_loss"]
    train(recipe, quiet())
    lines = metrics(tmp_path / "run")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert lines[-1]["eval_loss"] < before - 0.5


# ---- numbers that leave the run


def test_metrics_have_their_keys(tmp_path):
    train(toy_recipe(tmp_path, logging={"every": 2}), quiet())
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [2, 3, 4, 6], "every second step, and those with an evaluation"
    keys = {"step", "epoch", "loss", "grad_norm", "learning_rate", "tokens_per_second", "seconds", "ranks"}
    sometimes = {"eval_loss", "spectra", "gradient_norms"}
    assert all(line.keys() - sometimes == keys | {"memory_gib", "skipped"} for line in lines)
    assert [("eval_loss" in line, "spectra" in line) for line in lines] == [(False, False), (True, True)] * 2
    assert [("gradient_norms" in line) for line in lines] == [True, False, True, True]
    sizes = {mode: len(norms) for mode, norms in lines[-1]["gradient_norms"].items()}
    assert sizes == {"input": 1, "layer": 3, "projection": 2, "output": 1} and len(lines[-1]["spectra"]) == 3
    assert all(line["ranks"] == [4, 4, 4] and line["memory_gib"] > 0 for line in lines)
    assert [line["epoch"] for line in lines] == [0, 0, 0, 1]


@pytest.mark.parametrize("kind", ["metatt_4d", "lorta"])
def test_gradient_norms_are_those_of_slices_by_the_root_of_their_entries(tmp_path, kind):
    """Of wide modes one for the core; a diagonal slice of LoRTA has as many entries as rows."""
    trainer = make_trainer(toy_recipe(tmp_path, adapter={"kind": kind}), torch.float64)
    randomise(trainer.adapter)
    _, indices = trainer.order.global_batch(0)
    trainer._accumulate(indices, 100, 0)
    found = SliceNorms(trainer.adapter).read()
    assert list(found) == list(trainer.adapter.spec.modes)
    for mode, core in zip(found, trainer.adapter.cores, strict=True):
        slices = [core.grad] if mode in ("input", "output") else core.grad.unbind(1)
        expected = [float(part.norm()) / math.sqrt(part.numel()) for part in slices]
        assert min(expected) > 0 and found[mode] == pytest.approx(expected, rel=FLOAT32), mode


def test_the_last_step_is_always_in_the_metrics(tmp_path):
    write_toy(tmp_path)
    train(toy_recipe(tmp_path, training={"max_steps": 3, "eval_every": "never"}, logging={"every": 10}), quiet())
    assert [line["step"] for line in metrics(tmp_path / "run")] == [3]


def test_tensorboard_gets_event_files(tmp_path):
    train(toy_recipe(tmp_path, logging={"every": 1, "trackers": ["tensorboard"]}), quiet())
    losses = {line["step"]: pytest.approx(line["loss"]) for line in metrics(tmp_path / "run")}
    assert tensorboard_scalars(tmp_path / "run", "loss") == losses


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(tmp_path, monkeypatch):
    from accelerate import tracking

    monkeypatch.setattr(tracking, "_available_trackers", ["tensorboard"])
    recipe = toy_recipe(tmp_path, logging={"trackers": ["tensorboard", "wandb"]})
    with pytest.raises(ValueError, match=r"logging\.trackers names wandb,"):
        train(recipe, quiet())
    assert not (tmp_path / "run").exists()


# ---- what cannot be trained is refused with a reason


def test_a_model_that_is_not_causal_is_refused(tmp_path):
    config = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    write_toy(tmp_path, config={**config, "intermediate_size": 48, "vocab_size": 300})
    with pytest.raises(ValueError, match="BertForMaskedLM is not a causal language model"):
        train(toy_recipe(tmp_path, adapter={"target_modules": ["query"]}), quiet())


def test_a_tokenizer_larger_than_the_embeddings_is_refused(tmp_path):
    write_toy(tmp_path, config={**LLAMA, "vocab_size": 20})
    with pytest.raises(ValueError, match=r"gives token \d+, but LlamaForCausalLM has embeddings for 20 tokens only"):
        train(toy_recipe(tmp_path), quiet())


def test_records_longer_than_the_learned_positions_are_refused(tmp_path):
    write_toy(tmp_path, config={**GPT2, "n_positions": 5})
    recipe = toy_recipe(tmp_path, adapter={"target_modules": ["c_attn"]})
    with pytest.raises(ValueError, match=r"has learned 5 positions; set data.cutoff_length to 5 or less"):
        train(recipe, quiet())
