"""PEFT's methods behind our loop: what PEFT itself would compute, exact resumes and exports, sizes of the paper."""

import json
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from metatt_scale.backbone import load_backbone
from metatt_scale.cli import main
from metatt_scale.export import export
from metatt_scale.methods import build_adapter
from metatt_scale.parallel import World
from metatt_scale.recipe import RecipeError
from metatt_scale.reopen import reopen
from metatt_scale.report.runs import of_last_ranks
from metatt_scale.training import TrainingStopped, loop, train
from metatt_scale.training.optimizer import learning_rate
from tests.tiny import FLOAT32
from tests.toy import (
    BERT,
    CPU,
    GPT2,
    LLAMA,
    bits_of,
    make_trainer,
    metrics,
    one_step,
    quiet,
    toy_classifier,
    toy_recipe,
    write_toy,
)

# PEFT asks transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

ADALORA = {"init_r": 6, "tinit": 1, "tfinal": 2}
METHODS = {
    "lora": {"kind": "lora"},
    "gaussian": {"kind": "lora", "init": "gaussian"},
    "pissa": {"kind": "lora", "init": "pissa"},
    "olora": {"kind": "lora", "init": "olora"},
    "vera": {"kind": "vera", "rank": 32, "alpha": 2.0},
    "adalora": {"kind": "adalora", "adalora": ADALORA},
}
IDS = torch.arange(2, 40)[None]


def recipe_of(folder, method, **sections):
    return toy_recipe(folder, adapter=METHODS[method], **sections)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def close(got, wanted, bound=FLOAT32):
    assert ((got - wanted).norm() / wanted.norm()).item() <= bound


# ---- sizes


@pytest.mark.parametrize("method", METHODS)
def test_the_count_is_that_of_the_parameters(tmp_path, method, capsys):
    recipe = recipe_of(tmp_path, method)
    adapter = build_adapter(load_backbone(recipe.backbone, CPU), recipe, World(device=CPU))
    path = tmp_path / "recipe.json"
    path.write_text(recipe.model_dump_json())
    assert main(["plan", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trainable_parameters"] == adapter.n_trained
    assert main(["plan", str(path)]) == 0


# ---- a run


@pytest.mark.parametrize("method", METHODS)
def test_training_resumes_to_the_same_bits_and_reloads_to_the_same_logits(tmp_path, monkeypatch, method):
    training = {"max_steps": 8, "keep": "best"}
    straight = recipe_of(tmp_path, method, training=training)
    run = train(straight, quiet())
    losses = [line["loss"] for line in metrics(run.folder)]
    assert losses[-1] < losses[0]
    assert all(value.dtype == torch.float32 for value in run.adapter.trained().values())
    assert torch.equal(logits(reopen(run.folder, quiet(), CPU).model), logits(run.model))

    recipe = recipe_of(tmp_path, method, training=training, output_dir=str(tmp_path / "again"))
    real = loop.Trainer._launch
    for stop_at in (3, 6):  # before and within AdaLoRA's last phase

        def step(self, stop_at=stop_at):
            self.signals.received = 15 if self.progress.step == stop_at - 1 else None
            return real(self)

        with monkeypatch.context() as patch:
            patch.setattr(loop.Trainer, "_launch", step)
            with pytest.raises(TrainingStopped):
                train(recipe, quiet())
    again = train(recipe, quiet())
    assert bits_of(again.folder) == bits_of(run.folder)
    names = [folder / "adapter" / "metatt.safetensors" for folder in (again.folder, run.folder)]
    assert names[0].read_bytes() == names[1].read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_training_starts_at_the_frozen_model_and_can_be_switched_off(tmp_path, method):
    recipe = recipe_of(tmp_path, method)
    frozen = logits(load_backbone(recipe.backbone, CPU, recipe.seed))
    trainer = make_trainer(recipe)
    close(logits(trainer.model), frozen)
    for _ in range(3):
        one_step(trainer)
    tuned = logits(trainer.model)
    assert not torch.allclose(tuned, frozen, rtol=1e-3)
    with trainer.adapter.disabled():
        assert torch.equal(logits(trainer.model), frozen)
    assert torch.equal(logits(trainer.model), tuned)
    assert all(value.requires_grad for value in trainer.adapter.trained().values())
    assert not any(value.requires_grad for value in trainer.adapter.kept().values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_four_bits(tmp_path, method, architecture):
    """Qwen2 has biases, with which packed linears return views."""
    write_toy(tmp_path, config={**LLAMA, "model_type": architecture, "hidden_size": 64, "intermediate_size": 128})
    recipe = recipe_of(tmp_path, method, backbone={"dtype": "bfloat16", "quantization": "nf4"})
    model = load_backbone(recipe.backbone, CPU, recipe.seed)
    frozen = logits(model)
    build_adapter(model, recipe, World(device=CPU))
    start = logits(model)
    assert start.dtype == torch.bfloat16
    close(start.float(), frozen.float(), 2**-8)  # each sum is rounded to 8 bits, once
    run = train(recipe, quiet())
    losses = [line["loss"] for line in metrics(run.folder)]
    assert sum(losses[3:]) < sum(losses[:3]) and metrics(run.folder)[-1]["skipped"] == 0
    assert {value.dtype for value in run.adapter.trained().values()} == {torch.float32}
    assert torch.equal(logits(reopen(run.folder, quiet(), CPU).model), logits(run.model))


# ---- against PEFT itself


def plain_peft(recipe, trainer):
    """PEFT's own model at our start, with its own arithmetic everywhere."""
    model, adapter = load_backbone(recipe.backbone, CPU, recipe.seed), recipe.adapter
    paths = [target.path for target in trainer.adapter.targets]
    match adapter.kind:
        case "lora":
            config = peft.LoraConfig(
                r=adapter.rank,
                lora_alpha=adapter.alpha * adapter.rank,
                init_lora_weights=adapter.init or True,
                target_modules=paths,
            )
        case "vera":
            config = peft.VeraConfig(r=adapter.rank, target_modules=paths, projection_prng_key=recipe.seed)
        case _:
            config = peft.AdaLoraConfig(
                **ADALORA,
                target_r=adapter.rank,
                lora_alpha=adapter.alpha * ADALORA["init_r"],
                target_modules=paths,
                total_step=trainer.total_steps,
                task_type="CAUSAL_LM",  # without one PEFT leaves the regulariser out
            )
    torch.manual_seed(recipe.seed)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("method", METHODS)
def test_our_loop_does_what_peft_and_torch_do(tmp_path, method):
    """Six steps in fp32 from PEFT's own random start; PiSSA and OLoRA rewrite the weights there and not here."""
    training = {"max_steps": 6, "micro_batch_size": 16, "packing": False, "max_grad_norm": 1.0, "learning_rate": 5e-3}
    recipe = recipe_of(tmp_path, method, training=training)
    trainer = make_trainer(recipe)
    model = plain_peft(recipe, trainer).train()
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    for step in range(6):
        _, indices = trainer.order.global_batch(step)
        (batch,) = trainer._own_batches(trainer.data.table, indices)
        ours = one_step(trainer)["loss"]
        loss = model(
            input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS, labels=batch.labels_BS
        ).loss
        loss.backward()
        penalty = penalty_of(model) if method == "adalora" else 0
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe.training, step, 6)
        optimizer.step()
        if method == "adalora":
            model.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
        assert ours == pytest.approx(loss.item() - float(penalty), rel=FLOAT32), step
    theirs = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for name, value in trainer.adapter.trained().items():
        places = (f"base_model.model.{name}.default", f"base_model.model.{name}.default.weight")
        (other,) = (theirs[place] for place in places if place in theirs)
        close(value, other, 1e-4)
        if name.endswith("lora_E"):
            assert torch.equal(value == 0, other == 0)
    if method == "adalora":
        kept = sum(int((value != 0).sum()) for name, value in theirs.items() if "lora_E" in name)
        assert kept == 4 * len(trainer.adapter.targets)


@torch.no_grad()
def penalty_of(model):
    """The regulariser as PEFT writes it."""
    norms = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            norms.append(torch.norm(gram - torch.eye(len(gram)), p="fro"))
    return 0.5 * sum(norms) / len(norms)


# ---- AdaLoRA's allocation


def test_no_evaluation_above_the_final_rank_is_the_best(tmp_path, monkeypatch):
    trainer = make_trainer(recipe_of(tmp_path, "adalora", training={"max_steps": 6}))
    trainer.adapter.begin(6)
    monkeypatch.setattr(trainer, "_due", lambda every: True)
    reports: list[dict] = [{}, {}]
    monkeypatch.setattr(trainer, "evaluate", lambda: {"eval_loss": 0.1})
    trainer._evaluate_if_due(reports[0])
    assert trainer.progress.best_step is None and not trainer.best
    trainer.adapter.stepped(6, torch.tensor(True))
    monkeypatch.setattr(trainer, "evaluate", lambda: {"eval_loss": 0.2})
    trainer._evaluate_if_due(reports[1])
    assert trainer.progress.best_loss == 0.2 and trainer.best
    assert reports == [{"eval_loss": 0.1, "settled": False}, {"eval_loss": 0.2}]
    assert of_last_ranks(reports) == reports[1:], "nor in tables and reports"


def test_deterministic_kernels_leave_the_threshold_alone(tmp_path, monkeypatch):
    """On CUDA `kthvalue` refuses to run under them, for the sake of indices that nobody reads here."""
    kthvalue, asked = torch.kthvalue, []

    def refusing(*given, **named):
        asked.append(torch.are_deterministic_algorithms_enabled())
        return kthvalue(*given, **named)

    monkeypatch.setattr(torch, "kthvalue", refusing)
    trainer = make_trainer(recipe_of(tmp_path, "adalora", training={"max_steps": 6}))
    torch.use_deterministic_algorithms(True)
    try:
        trainer.train()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked and not any(asked)


def test_a_step_that_is_not_finite_allocates_nothing(tmp_path):
    """Also the final allocation waits for a step that is."""
    trainer = make_trainer(recipe_of(tmp_path, "adalora", training={"max_steps": 6}))
    adapter = trainer.adapter
    adapter.begin(6)
    yes, no = torch.tensor(True), torch.tensor(False)

    def gradients():
        for value in adapter.trained().values():
            value.data += 0.1
            value.grad = torch.randn_like(value)

    for step in (1, 2, 3):
        gradients()
        adapter.stepped(step, yes)
    before = {name: value.clone() for name, value in adapter.tensors().items()}
    adapter.stepped(4, no)
    assert all(torch.equal(value, before[name]) for name, value in adapter.tensors().items())
    assert not adapter.history()["allocated"] and not adapter.settled
    adapter.stepped(5, yes)
    masks = [value for name, value in adapter.history().items() if name.endswith(".mask")]
    assert adapter.history()["allocated"] and sum(int(mask.sum()) for mask in masks) == 4 * len(adapter.targets)
    gradients()
    adapter.stepped(6, yes)
    assert sum(int((layer.lora_E["default"] != 0).sum()) for layer, _ in adapter.layer_and_path()) == 4 * len(masks)


# ---- exports


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A trained run of every method, on a saved model that PEFT can load."""
    folder = tmp_path_factory.mktemp("exports")
    write_toy(folder)
    base = load_backbone(toy_recipe(folder).backbone, CPU, 42)
    base.save_pretrained(folder / "saved")
    found = {}
    for method in METHODS:
        wanted = {"backbone": {"path": f"random:{folder / 'model'}"}, "output_dir": str(folder / method)}
        found[method] = train(recipe_of(folder, method, **wanted), quiet())
    return folder / "saved", found


@pytest.mark.parametrize("method", METHODS)
def test_peft_computes_from_our_export_what_we_do(runs, method):
    saved, found = runs
    target = export(found[method].folder, "lora", quiet())
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved), str(target))
    close(logits(loaded), logits(found[method].model))
    config = json.loads((target / "adapter_config.json").read_text())
    rank = {"vera": 32, "adalora": 6, "pissa": 8, "olora": 8}.get(method, 4)
    assert (config["r"], config["peft_type"]) == (rank, "VERA" if method == "vera" else "LORA")


@pytest.mark.parametrize("method", METHODS)
def test_the_merged_model_computes_what_we_do(runs, method):
    _, found = runs
    target = export(found[method].folder, "merged", quiet())
    close(logits(AutoModelForCausalLM.from_pretrained(target)), logits(found[method].model))
    assert "lora_" not in (target / "model.safetensors").read_bytes()[:20000].decode("utf-8", "ignore")


@pytest.mark.parametrize("method", ["lora", "pissa", "vera", "adalora"])
def test_gpt2_whose_weights_lie_the_other_way(tmp_path, method):
    write_toy(tmp_path, config=GPT2)
    recipe = toy_recipe(tmp_path, adapter={**METHODS[method], "target_modules": ["c_attn", "mlp.c_proj"]})
    run = train(recipe, quiet())
    merged = AutoModelForCausalLM.from_pretrained(export(run.folder, "merged", quiet()))
    close(logits(merged), logits(run.model))


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("method", ["pissa", "vera", "adalora"])
def test_a_classifier(tmp_path, method, head):
    adapter = {**METHODS[method], "init": METHODS[method].get("init")}
    wanted = toy_classifier(tmp_path, config=BERT, adapter=adapter, classifier={"labels": 2, "head": head})
    run = train(wanted, quiet())
    assert (run.adapter.n_head > 0) == (head == "trained")
    opened = reopen(run.folder, quiet(), CPU)
    assert torch.equal(logits(opened.model), logits(run.model))
    exported = load_file(export(run.folder, "lora", quiet()) / "adapter_model.safetensors")
    assert "base_model.model.classifier.weight" in exported


# ---- what is refused

REFUSED = [
    ({"kind": "lora", "rank": [4, 4, 4]}, "one rank; give one number"),
    ({"kind": "lora", "init": "ze-no-no-id"}, "gaussian, pissa, olora"),
    ({"kind": "vera", "init": "pissa"}, "`init` is 'pissa', which vera does not read"),
    ({"kind": "vera", "alpha": 4.0}, "`alpha` is 4.0"),
    ({"kind": "adalora", "rank": 8, "adalora": {"init_r": 8}}, "larger init_r"),
    ({"kind": "lora", "adalora": {"init_r": 6}}, "`adalora` is given, which lora does not read"),
    ({"kind": "lora", "operator": "reference"}, "`operator` is 'reference'"),
    ({"kind": "lora", "mode_order": ["input", "layer", "projection", "output"]}, "`mode_order`"),
]


@pytest.mark.parametrize(("adapter", "message"), REFUSED)
def test_a_contradiction_is_one_message(tmp_path, adapter, message):
    with pytest.raises(RecipeError, match=message):
        toy_recipe(tmp_path, adapter={"alpha": 2.0, **adapter})


def test_a_sweep_is_for_chains(tmp_path):
    with pytest.raises(RecipeError, match=r"and cannot be applied to adapter.kind lora; leave `sweep` out"):
        recipe_of(tmp_path, "lora", sweep={"schedule": [{"after": 1, "rank": 2}]})


def test_what_does_not_fit_the_model_or_the_run(tmp_path, monkeypatch):
    wide = {**METHODS["pissa"], "rank": 20, "target_modules": ["v_proj"]}
    with pytest.raises(
        ValueError, match=r"v_proj is 32 -> 16, so adapter.init pissa finds no more than 16 directions"
    ):
        make_trainer(toy_recipe(tmp_path, adapter=wide))
    short = {**METHODS["adalora"], "adalora": {"init_r": 6, "tinit": 200, "tfinal": 1000}}
    with pytest.raises(ValueError, match="the run has 6 steps"):
        train(toy_recipe(tmp_path, adapter=short), quiet())
    recipe = recipe_of(tmp_path, "lora")
    model = load_backbone(recipe.backbone, CPU)
    build_adapter(model, recipe, World(device=CPU))
    with pytest.raises(ValueError, match="q_proj, a BesidePeft, which is not a linear module"):
        build_adapter(model, recipe, World(device=CPU))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install metatt-scale\[peft\]"):
        make_trainer(recipe)
