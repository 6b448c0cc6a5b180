"""Adapters that are no chain: outputs, gradients and counts against their definitions, files, merging, refusals."""

import copy
import json

import pytest
import torch

from metatt_scale.adapter import merge, unmerge
from metatt_scale.backbone import head_tensors, load_backbone
from metatt_scale.backbone.loading import enable_checkpointing
from metatt_scale.cli import main
from metatt_scale.data import collate
from metatt_scale.methods import build_adapter
from metatt_scale.methods.loretta import fold
from metatt_scale.parallel import World
from metatt_scale.training.classifier import Classifier
from tests.methods import TASKS, dense_delta, randomise_values, recipe_of, run_bottlenecks, run_dense
from tests.tiny import FLOAT64, MODELS, tiny_model, tokens
from tests.toy import (
    BERT,
    CPU,
    LLAMA,
    ROBERTA,
    UNDROPPED,
    make_trainer,
    one_step,
    toy_classifier,
    toy_recipe,
    write_toy,
)

SETTINGS = {
    "mtl_lora": {"rank": 3, "alpha": 1.7, "mtl_lora": {"up_projections": 2, "temperature": 0.7}},
    "moe_lora": {"rank": 6, "alpha": 1.7, "moe_lora": {"experts": 3, "task_width": 5}},
    "loretta_rep": {"rank": 6, "alpha": 1.7, "loretta": {"tensor_rank": 3}},
}
LINEAR = pytest.mark.parametrize("kind", SETTINGS)
"""Kinds that add a matrix to each weight."""


def adapted(kind, name="llama", which=2, *, tasks=TASKS, random=True, **changes):
    """(plain model, adapted model, adapter, recipe), in float64."""
    recipe = recipe_of(kind, tasks=tasks, **{"target_modules": MODELS[name][which], **SETTINGS[kind], **changes})
    plain = tiny_model(name, dtype=torch.float64)
    model = copy.deepcopy(plain)
    adapter = build_adapter(model, recipe, World(device=CPU)).double()
    if random:
        randomise_values(adapter)
    return plain, model, adapter, recipe


def errors(model, adapter, expected_of, ids):
    """Relative errors of logits and of every parameter's gradient against `expected_of(parameters by name)`."""
    direction = torch.randn((*ids.shape, 97), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    logits = model(ids).logits
    (logits * direction).sum().backward()
    values = {name: value.detach().clone().requires_grad_() for name, value in adapter.trained().items()}
    expected = expected_of(values)
    gradients = torch.autograd.grad((expected * direction).sum(), list(values.values()))
    found = [((logits - expected).norm() / expected.norm()).item()]
    for (name, value), gradient in zip(adapter.trained().items(), gradients, strict=True):
        assert value.grad is not None and gradient.norm() > 0, name
        found.append(((value.grad - gradient).norm() / gradient.norm()).item())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "roberta", "phi3"])
@pytest.mark.parametrize("which", [2, 3], ids=["paper_targets", "other_targets"])
@LINEAR
def test_rows_of_several_tasks_have_the_outputs_and_gradients_of_their_dense_deltas(kind, name, which):
    plain, model, adapter, recipe = adapted(kind, name, which)
    ids, tasks = tokens(batch=4), [2, 0, 2, 1]
    adapter.row_tasks = torch.tensor(tasks)[:, None]
    dense = lambda values: run_dense(plain, recipe, adapter.targets, values, ids, tasks)  # noqa: E731
    assert (dense(adapter.trained()) - plain(ids).logits).norm() > 1e-2 * plain(ids).logits.norm()
    assert max(errors(model, adapter, dense, ids)) < FLOAT64


@LINEAR
def test_a_chosen_task_is_that_of_all_rows(kind):
    plain, model, adapter, recipe = adapted(kind)
    ids = tokens()
    adapter.task = 1
    assert (
        max(errors(model, adapter, lambda v: run_dense(plain, recipe, adapter.targets, v, ids, [1, 1]), ids))
        < FLOAT64
    )
    adapter.task, adapter.row_tasks = None, torch.tensor([[1], [1]])
    by_rows = model(ids).logits
    adapter.task = 1
    assert (by_rows - model(ids).logits).norm() < FLOAT64 * by_rows.norm()


@pytest.mark.parametrize("kind", ["mtl_lora", "moe_lora"])
def test_tasks_of_packed_rows(kind):
    _, model, adapter, _ = adapted(kind)
    ids = tokens(batch=1, length=12)
    adapter.task = 0
    first = model(ids).logits
    adapter.task, adapter.row_tasks = None, torch.tensor([[0] * 7 + [2] * 5])
    packed = model(ids).logits
    assert (packed[:, :7] - first[:, :7]).norm() < FLOAT64 * first.norm(), "attention is causal"
    assert (packed[:, 7:] - first[:, 7:]).norm() > 1e-3 * first.norm()


@LINEAR
def test_the_start_is_the_frozen_model_and_disabling_restores_it(kind):
    plain, model, adapter, _ = adapted(kind, random=False)
    adapter.task = 1
    ids = tokens()
    before = plain(ids).logits
    assert torch.equal(model(ids).logits, before)
    randomise_values(adapter)
    assert not torch.allclose(model(ids).logits, before)
    with adapter.disabled():
        assert torch.equal(model(ids).logits, before)
    own = {id(value) for value in adapter.trained().values()}
    assert own.isdisjoint(id(value) for value in model.parameters()), "the backbone never sees them"


@LINEAR
def test_the_lora_form_and_the_merged_model_are_exact(kind):
    _, model, adapter, recipe = adapted(kind)
    ids = tokens()
    if kind != "loretta_rep":
        with pytest.raises(ValueError, match="choose one by name"):
            adapter.lora_pairs()
    adapter.task = 2
    for target, pair in zip(adapter.targets, adapter.lora_pairs(), strict=True):
        expected = dense_delta(recipe, target, adapter.trained(), 2).mT
        got = adapter.alpha * pair.lora_B @ pair.lora_A
        assert pair.path == target.path and (got - expected).norm() < FLOAT64 * expected.norm()
    alone = model(ids).logits.detach()
    merge(adapter)
    assert all(module.merged_layer is not None for module in adapter.linears)
    assert (model(ids).logits - alone).norm() < FLOAT64 * alone.norm()
    unmerge(adapter)
    assert torch.equal(model(ids).logits, alone)


@LINEAR
def test_starts_follow_from_the_seed_alone(kind):
    first, again = (adapted(kind, random=False)[2] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.trained().values(), again.trained().values(), strict=True))
    less = adapted(kind, random=False, layers=(1, 3))[2]
    assert all(torch.equal(value, first.trained()[name]) for name, value in less.trained().items())


# ---- bottlenecks

OUTPUTS = {
    "llama": ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
    "phi": ("model.layers.{}.self_attn.dense", "model.layers.{}.mlp.fc2"),
    "phi3": ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
    "gpt_neox": ("gpt_neox.layers.{}.attention.dense", "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
    "opt": ("model.decoder.layers.{}.self_attn.out_proj", "model.decoder.layers.{}.fc2"),
    "gpt2": ("transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj"),
    "bert": ("bert.encoder.layer.{}.attention.output.dense", "bert.encoder.layer.{}.output.dense"),
    "roberta": ("roberta.encoder.layer.{}.attention.output.dense", "roberta.encoder.layer.{}.output.dense"),
}
OUTPUTS |= {name: OUTPUTS["llama"] for name in ("mistral", "qwen2", "qwen3", "gemma")}


def bottlenecks(name, **changes):
    """(plain model, model with bottlenecks, adapter, recipe, the modules they have to stand behind), in float64."""
    settings = {"alpha": 1.7, "loretta": {"bottleneck": 10, "tensor_rank": 3}}
    recipe = recipe_of("loretta_adp", **settings, **changes)
    plain = tiny_model(name, dtype=torch.float64)
    model = copy.deepcopy(plain)
    adapter = build_adapter(model, recipe, World(device=CPU)).double()
    layers = range(*recipe.adapter.layers) if recipe.adapter.layers else range(3)
    return plain, model, adapter, recipe, [path.format(layer) for layer in layers for path in OUTPUTS[name]]


@pytest.mark.parametrize("name", MODELS)
def test_bottlenecks_stand_behind_attention_and_mlp(name):
    plain, model, adapter, recipe, paths = bottlenecks(name)
    ids = tokens()
    assert sorted(target.path for target in adapter.targets) == sorted(paths)
    assert torch.equal(model(ids).logits, plain(ids).logits), "the up-projections start at zero"
    randomise_values(adapter, scale=0.5)
    assert max(errors(model, adapter, lambda v: run_bottlenecks(plain, recipe, paths, v, ids), ids)) < FLOAT64


def test_bottlenecks_of_some_layers_with_checkpointing():
    plain, model, adapter, recipe, paths = bottlenecks("llama", layers=(1, 2))
    enable_checkpointing(model)
    randomise_values(adapter, scale=0.5)
    ids = tokens()
    assert len(adapter.targets) == 2
    assert max(errors(model, adapter, lambda v: run_bottlenecks(plain, recipe, paths, v, ids), ids)) < FLOAT64


def test_bottlenecks_need_an_attention_and_an_mlp():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"model\.layers\.0 of LlamaForCausalLM has not one attention and one MLP"):
        build_adapter(model, recipe_of("loretta_adp"), World(device=CPU))


@pytest.mark.parametrize(
    ("entries", "factors"),
    [
        (8, (8,)),
        (768 * 8, (8, 8, 12, 8)),
        (768 * 64, (8, 8, 12, 8, 8)),
        (1024 * 64, (4, 8, 8, 8, 8, 4)),
        (5120 * 64, (8, 8, 8, 10, 8, 8)),
        (13, (2, 7)),  # padded to 14
        (97, (2, 7, 7)),  # padded to 98
        (11008, (5, 7, 9, 7, 5)),  # padded to 11025
    ],
)
def test_entries_fold_into_small_factors(entries, factors):
    assert fold(entries) == factors


# ---- a trained head, and everything


@pytest.mark.parametrize("config", [BERT, ROBERTA], ids=["bert", "roberta"])
def test_a_trained_head_has_the_loss_and_gradients_of_the_models_own(tmp_path, config):
    recipe = toy_classifier(tmp_path, config={**config, **UNDROPPED}, classifier={"labels": 2, "head": "trained"})
    plain = load_backbone(recipe.backbone, CPU, recipe.seed, classes=2).double()  # type: ignore[call-arg]
    trainer = make_trainer(recipe, torch.float64)
    names = [name.removeprefix("head.") for name in trainer.adapter.trained() if name.startswith("head.")]
    assert names == list(head_tensors(plain)) and len(names) == 4
    batch = collate(trainer.data.table, range(8), 0)
    trainer.objective.loss_sum(batch).backward()
    for name in names:
        plain.get_parameter(name).requires_grad_(True)
    loss = Classifier(plain, trainer.world, recipe.label_sets).loss_sum(batch)
    gradients = torch.autograd.grad(loss, [plain.get_parameter(name) for name in names])
    for name, gradient in zip(names, gradients, strict=True):
        got = trainer.adapter.trained()[f"head.{name}"].grad
        assert got is not None and (got - gradient).norm() < FLOAT64 * gradient.norm()
    assert trainer.adapter.n_head == sum(gradient.numel() for gradient in gradients)


def test_full_trains_every_weight_once():
    plain = tiny_model("llama", dtype=torch.float64)
    model = copy.deepcopy(plain)
    adapter = build_adapter(model, recipe_of("full"), World(device=CPU))
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    plain.requires_grad_(True)
    plain(ids, labels=ids).loss.backward()
    trained = adapter.trained()
    assert adapter.n_trained == sum(p.numel() for p in plain.parameters()) and list(adapter.parameters()) == []
    for name, parameter in plain.named_parameters():
        grad = trained[name].grad
        assert grad is not None and parameter.grad is not None and torch.equal(grad, parameter.grad)
    with pytest.raises(ValueError, match="holds no frozen backbone"), adapter.disabled():
        pass


# ---- 4 bits


@pytest.mark.parametrize("kind", [*SETTINGS, "loretta_adp"])
def test_a_4_bit_backbone_trains(tmp_path, kind):
    adapter = SETTINGS.get(kind, {"alpha": 1.7, "loretta": {"bottleneck": 8, "tensor_rank": 3}})
    write_toy(tmp_path, config={**LLAMA, "hidden_size": 64, "intermediate_size": 128})
    backbone = {"quantization": "nf4", "dtype": "bfloat16"}
    adapter = {"rank": 16, "kind": kind, **adapter}
    trainer = make_trainer(toy_recipe(tmp_path, backbone=backbone, adapter=adapter), None)
    assert {value.dtype for value in trainer.adapter.trained().values()} == {torch.float32}
    before = trainer.evaluate()["eval_loss"]
    for _ in range(12):
        one_step(trainer)
    assert trainer.evaluate()["eval_loss"] < before
    assert all(value.dtype == torch.float32 for value in trainer.adapter.trained().values())


# ---- counts

HEAD = 768 * 768 + 768 + 2 * 768 + 2
PLANNED = [
    ("mtl_lora", ["adapter.rank=4"], 24 * (768 * 4 + 16 + 3 * 4 * 768 + 3), HEAD),
    ("loretta_rep", ["adapter.rank=8"], 24 * 2 * 5 * (8 + 5 * (8 + 12) + 8), HEAD),
    ("loretta_adp", [], 24 * (2 * 5 * (8 + 5 * (8 + 12 + 8) + 8) + 64 + 768), HEAD),
    ("head_only", ["classifier.head=trained"], 0, HEAD),
    ("metatt_4d", ["adapter.rank=8", "classifier.head=trained"], 13_184, HEAD),
    ("full", ["backbone.dtype=float32"], None, HEAD),
]


@pytest.mark.parametrize(("kind", "overrides", "count", "head"), PLANNED)
def test_a_plan_counts_adapter_and_head_apart(tmp_path, capsys, kind, overrides, count, head):
    names = ["adapter.target_modules=[query,value]"] * (kind in ("metatt_4d", "mtl_lora", "loretta_rep"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "output_dir: unused\nbackbone: {path: 'random:roberta_base'}\nclassifier: {labels: 2}\n"
        "data: {train: [{path: unused}], format: sentences, text_fields: [text]}\n"
    )
    arguments = ["plan", str(recipe), f"adapter.kind={kind}", *overrides, *names]
    assert main([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    if count is None:
        count = plan["backbone_parameters"]
    assert plan["trainable_parameters"] == count and plan["head_parameters"] == head
    assert main(arguments) == 0
    assert f"{count:,}" in capsys.readouterr().out
    assert main([*arguments, "--simulate"]) == 2
    assert "`plan --simulate` is for language models" in " ".join(capsys.readouterr().err.split())


# ---- what is refused


@pytest.mark.parametrize(
    ("kind", "keys", "says"),
    [
        ("mtl_lora", {"rank": [2, 3]}, "`rank` is [2, 3], but mtl_lora has one rank"),
        ("mtl_lora", {"init": "ze-no-no-id"}, "`init` is 'ze-no-no-id', which mtl_lora does not read"),
        ("mtl_lora", {"mode_order": ["input"]}, "which mtl_lora does not read"),
        ("moe_lora", {"operator": "reference"}, "`operator` is 'reference', which moe_lora does not read"),
        ("moe_lora", {"rank": 6}, "`rank` is 6, which 4 experts cannot share equally"),
        ("moe_lora", {"mtl_lora": {"temperature": 2.0}}, "`mtl_lora` is given, which moe_lora does not read"),
        ("metatt_4d", {"moe_lora": {"experts": 2}}, "(it is for moe_lora)"),
        ("loretta_adp", {"rank": 8}, "`rank` is 8, which loretta_adp does not read"),
        ("full", {"target_modules": ["query"]}, "which full does not read"),
        ("head_only", {}, "there is no head to train; set `classifier.head: trained`"),
    ],
)
def test_keys_that_a_kind_does_not_read(kind, keys, says):
    with pytest.raises(ValueError) as caught:
        recipe_of(kind, **keys)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"backbone": {"dtype": "float32", "quantization": "nf4"}}, "`backbone.quantization` is nf4"),
        ({"backbone": {"dtype": "bfloat16"}}, "`backbone.dtype` bfloat16; set them to none and float32"),
        ({"parallel": {"backbone": "fsdp2"}}, "`parallel.backbone` is fsdp2, which shards a frozen backbone"),
        ({"sweep": {"schedule": [{"after": 1, "rank": 2}]}}, "`sweep` changes the ranks of a tensor train"),
    ],
)
def test_what_full_cannot_be(tmp_path, changes, says):
    with pytest.raises(ValueError) as caught:
        toy_recipe(tmp_path, adapter={"kind": "full", "rank": 16, "alpha": 2.0}, **changes)
    assert says in str(caught.value)
