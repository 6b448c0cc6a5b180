"""Classes of sentences on tiny encoders: loss, gradient, head, scores, resume, exports, and what is refused."""

import json
from typing import Any

import pytest
import torch

from metatt_scale.adapter import load_adapter
from metatt_scale.backbone import HeadStart, head_tensors, load_backbone, resolve
from metatt_scale.cli import main
from metatt_scale.data import IGNORE, collate, micro_batches
from metatt_scale.recipe import BackboneRecipe
from metatt_scale.reopen import reopen
from metatt_scale.training import loop, run, train
from metatt_scale.training.classifier import Classifier
from tests.tiny import FLOAT32, FLOAT64, randomise
from tests.toy import BERT, CPU, LLAMA, ROBERTA, UNDROPPED, bits_of, make_trainer, metrics, quiet, toy_classifier

ENCODERS = pytest.mark.parametrize("config", [BERT, ROBERTA], ids=["bert", "roberta"])


def double_trainer(folder, config=BERT, **training):
    recipe = toy_classifier(folder, config={**config, **UNDROPPED}, training=training)
    trainer = make_trainer(recipe, torch.float64)
    randomise(trainer.adapter)
    return trainer


def gradients(trainer, indices):
    """Loss and gradients of all cores over these examples."""
    loss, _ = trainer._accumulate(indices, trainer.objective.denominator(trainer.data.table, indices), 0)
    found = [core.grad.clone() for core in trainer.adapter.cores]
    for core in trainer.adapter.cores:
        core.grad = None
    return [loss, *found]


def close(one, other, bound):
    assert all((a - b).norm() <= bound * b.norm() for a, b in zip(one, other, strict=True))


def with_another_head(*args):
    model = load_backbone(*args)
    with torch.no_grad():
        for name in head_tensors(model):
            model.get_parameter(name).add_(0.1)
    return model


# ---- loss and gradient


@ENCODERS
def test_a_padded_batch_has_the_loss_of_its_examples_alone(tmp_path, config):
    trainer = double_trainer(tmp_path, config)
    table, objective = trainer.data.table, trainer.objective
    assert len(set(table.lengths[:8].tolist())) > 1, "examples of several lengths"
    with torch.no_grad():
        together = objective.loss_sum(collate(table, range(8), 0))
        alone = sum(objective.loss_sum(collate(table, [i], 0)) for i in range(8))
    assert together.item() == pytest.approx(float(alone), rel=FLOAT64)


@ENCODERS
def test_the_size_of_micro_batches_does_not_change_loss_or_gradient(tmp_path, config):
    whole = double_trainer(tmp_path, config, micro_batch_size=16)
    parts = double_trainer(tmp_path, config, micro_batch_size=3)
    _, indices = whole.order.global_batch(0)
    close(gradients(parts, indices), gradients(whole, indices), FLOAT64)


def test_ranks_share_the_examples_and_fillers_add_nothing(tmp_path):
    trainer = double_trainer(tmp_path)
    _, indices = trainer.order.global_batch(0)
    batches = [
        batch
        for rank in range(4)
        for batch in micro_batches(
            *(trainer.data.table, indices[:3]), micro_batch_size=4, rank=rank, world_size=4, pad_token_id=0
        )
    ]
    assert len(batches) == 4 and sum(bool((batch.classes_B == IGNORE).all()) for batch in batches) == 1
    with torch.no_grad():
        total = sum(trainer.objective.loss_sum(batch) for batch in batches)
        whole = trainer.objective.loss_sum(collate(trainer.data.table, indices[:3], 0))
    assert float(total) == pytest.approx(whole.item(), rel=FLOAT64)


def test_bert_is_told_which_sentence_a_token_is_of(tmp_path):
    trainer = double_trainer(tmp_path)
    batch = collate(trainer.data.table, range(4), 0)
    assert batch.segments_BS is not None and set(batch.segments_BS.unique().tolist()) == {0, 1}
    first = trainer.data.table.lengths[0] - batch.segments_BS[0].sum()
    assert batch.segments_BS[0, :first].sum() == 0, "the first sentence comes first"
    swapped = batch._replace(segments_BS=1 - batch.segments_BS)
    assert trainer.objective.loss_sum(batch) != trainer.objective.loss_sum(swapped)


def test_a_long_pair_loses_the_end_of_the_longer_sentence(tmp_path):
    trainer = make_trainer(toy_classifier(tmp_path, data={"cutoff_length": 8}))
    table = trainer.data.table
    assert table.lengths.max() <= 8 and table.segments is not None
    assert all(
        0 < table.segments[start:end].sum() < end - start
        for start, end in zip(table.offsets, table.offsets[1:], strict=False)
    )


# ---- the head


def test_the_head_follows_from_the_seed_and_stays(tmp_path):
    recipe = toy_classifier(tmp_path)
    heads = [head_tensors(load_backbone(recipe.backbone, CPU, seed, classes=2)) for seed in (recipe.seed, 7)]
    assert set(heads[0]) == {
        f"{name}.{kind}" for name in ("bert.pooler.dense", "classifier") for kind in ("weight", "bias")
    }
    assert not torch.equal(heads[0]["classifier.weight"], heads[1]["classifier.weight"])
    trained = head_tensors(train(recipe, quiet()).model)
    assert all(torch.equal(trained[name], tensor) for name, tensor in heads[0].items())


@ENCODERS
def test_files_without_a_head_get_the_same_one_each_time(tmp_path, config):
    recipe = toy_classifier(tmp_path, config=config)
    whole: Any = load_backbone(recipe.backbone, CPU, 0, classes=2)
    whole.base_model.save_pretrained(tmp_path / "files")
    saved = BackboneRecipe(path=str(tmp_path / "files"), dtype="float32")
    one, same, other = (load_backbone(saved, CPU, seed, classes=3) for seed in (1, 1, 2))
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, same.get_parameter(name))
    weight = "classifier.out_proj.weight" if config is ROBERTA else "classifier.weight"
    assert one.get_parameter(weight).shape == (3, 32)
    assert not torch.equal(one.get_parameter(weight), other.get_parameter(weight))
    inner = "encoder.layer.1.output.dense.weight"
    assert torch.equal(one.base_model.get_parameter(inner), whole.base_model.get_parameter(inner))


@ENCODERS
@pytest.mark.parametrize("from_files", [False, True], ids=["random", "files"])
def test_the_spread_of_the_heads_random_weights_can_be_given(tmp_path, config, from_files):
    backbone = toy_classifier(tmp_path, config=config).backbone
    if from_files:
        whole: Any = load_backbone(backbone, CPU, 0, classes=2)
        whole.base_model.save_pretrained(tmp_path / "files")
        backbone = BackboneRecipe(path=str(tmp_path / "files"), dtype="float32")
    usual, wide = (load_backbone(backbone, CPU, 1, classes=2, head=HeadStart(std)) for std in (None, 0.5))
    assert usual.config.initializer_range == wide.config.initializer_range
    kept = {"bert.pooler.dense.weight"} if from_files else set()  # what the files hold
    for name, weight in usual.named_parameters():
        drawn = name in head_tensors(usual) and name not in kept and not name.endswith("bias")
        factor = 0.5 / usual.config.initializer_range if drawn else 1.0
        torch.testing.assert_close(wide.get_parameter(name), factor * weight, rtol=FLOAT32, atol=0)


def test_a_run_and_its_adapter_keep_that_spread(tmp_path):
    recipe = toy_classifier(tmp_path, classifier={"init_std": 0.5})
    usual = load_backbone(recipe.backbone, CPU, recipe.seed, classes=2).get_parameter("classifier.weight")
    factor = 0.5 / BERT["initializer_range"]
    trained = train(recipe, quiet())
    for model in (trained.model, reopen(trained.folder, quiet(), CPU).model):
        torch.testing.assert_close(model.get_parameter("classifier.weight"), factor * usual, rtol=FLOAT32, atol=0)


def test_an_adapter_brings_its_head_back(tmp_path):
    recipe = toy_classifier(tmp_path, config={**BERT, **UNDROPPED})
    run = train(recipe, quiet())
    fresh: Any = load_backbone(recipe.backbone, CPU, recipe.seed, classes=2)
    with torch.no_grad():
        for kind in ("weight", "bias"):
            fresh.get_parameter(f"classifier.{kind}").fill_(1.0)  # as if another version of torch had drawn it
    load_adapter(run.folder / "adapter", fresh, CPU)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, run.model.eval()(ids).logits)


def test_a_damaged_or_unfitting_head_is_refused(tmp_path):
    recipe = toy_classifier(tmp_path)
    folder = train(recipe, quiet()).folder / "adapter"
    with pytest.raises(ValueError, match=r"holds .* of shape .* load the backbone with the recipe's `classifier`"):
        load_adapter(folder, load_backbone(recipe.backbone, CPU, classes=3), CPU)
    content = (folder / "head.safetensors").read_bytes()
    (folder / "head.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="its hash differs"):
        reopen(folder, quiet(), CPU)
    (folder / "head.safetensors").unlink()
    with pytest.raises(ValueError, match=r"head\.safetensors is missing"):
        reopen(folder, quiet(), CPU)


# ---- scores


def test_scores_do_not_depend_on_micro_batches_and_are_written(tmp_path):
    one, other = (double_trainer(tmp_path, micro_batch_size=size).evaluate() for size in (16, 5))
    assert one == pytest.approx(other, rel=FLOAT64)
    train(toy_classifier(tmp_path), quiet())
    evaluated = [line for line in metrics(tmp_path / "run") if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [3, 6]
    assert all(0 <= line[name] <= 1 for line in evaluated for name in ("eval_accuracy", "eval_f1"))
    assert all(-1 <= line["eval_matthews"] <= 1 for line in evaluated)


def test_a_trained_chain_tells_classes_apart(tmp_path):
    recipe = toy_classifier(tmp_path, training={"max_steps": None, "epochs": 10, "eval_every": "never"})
    records = [{"one": "ab"[i % 2] * 4, "two": f"{i}", "label": i % 2} for i in range(80)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    trainer = make_trainer(recipe)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] / 2 and after["eval_accuracy"] == 1


# ---- a run


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("other_torch", [False, True])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, monkeypatch, other_torch):
    """Even where another version of torch draws other numbers for the head: its checkpoint has those of the start."""
    dropped = {**BERT, "hidden_dropout_prob": 0.1}
    straight, killed = (toy_classifier(tmp_path, config=dropped, output_dir=str(tmp_path / n)) for n in ("a", "b"))
    train(straight, quiet())
    launch = loop.Trainer._launch

    def dies(trainer):
        if trainer.progress.step == 5:
            raise Killed
        launch(trainer)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop.Trainer, "_launch", dies)
        train(killed, quiet())
    with monkeypatch.context() as patch:
        if other_torch:
            patch.setattr(run, "load_backbone", with_another_head)
        train(killed, quiet())
    for name in ("metatt.safetensors", "head.safetensors"):
        assert (tmp_path / "a/adapter" / name).read_bytes() == (tmp_path / "b/adapter" / name).read_bytes()
    assert bits_of(tmp_path / "a") == bits_of(tmp_path / "b")


# ---- what is refused


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"one": "a", "two": "b", "label": 2}, "class 2 in field 'label', but classes run from 0 to 1"),
        ({"one": "a", "two": "b", "label": -1}, "class -1 in field 'label'"),
        ({"one": "a", "two": "b", "label": -1}, "-1 marks records without a label, as in GLUE's test splits"),
        ({"one": "a", "two": "b", "label": "yes"}, "'yes' (a string) in field 'label', which must be a whole number"),
        ({"one": "a", "two": "b", "label": 1.0}, "1.0 (a number) in field 'label', which must be a whole number"),
        ({"one": "a", "two": "b", "label": True}, "a boolean in field 'label'"),
        ({"one": "a", "two": "b", "label": None}, "null in field 'label'"),
        ({"one": "a", "two": "b"}, "no field 'label' (its fields: 'one', 'two')"),
        ({"one": "a", "label": 1}, "no field 'two'"),
        ({"one": "a", "two": 3, "label": 1}, "a number in field 'two', which must be a string"),
        ({"one": " ", "two": "b", "label": 1}, "an empty 'one'"),
        (["a"], "is an array, not a JSON object"),
    ],
)
def test_a_bad_record_is_named_with_its_line(tmp_path, record, says):
    recipe = toy_classifier(tmp_path)
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    with pytest.raises(ValueError) as caught:
        make_trainer(recipe)
    assert f"{tmp_path / 'data.jsonl'}:81: record" in str(caught.value) and says in str(caught.value)
    skipping = toy_classifier(tmp_path, data={"on_bad_record": "skip"})
    assert len(make_trainer(skipping).data.table) == 80


def test_other_classes_or_fields_are_other_data(tmp_path):
    digests = {
        make_trainer(toy_classifier(tmp_path, **change)).data.digest
        for change in ({}, {"data": {"text_fields": ["two", "one"]}}, {"data": {"text_fields": ["one"]}})
    }
    assert len(digests) == 3
    recipe = toy_classifier(tmp_path, data={"label_field": "lable"})
    with pytest.raises(ValueError, match="no field 'lable'"):
        make_trainer(recipe)


def test_a_classifier_stands_on_an_encoder(tmp_path):
    recipe = toy_classifier(tmp_path, config=LLAMA)
    with pytest.raises(
        ValueError, match=r"it is a llama, but a classifier stands on an encoder here \(bert, roberta\)"
    ):
        load_backbone(recipe.backbone, CPU, classes=2)
    assert isinstance(make_trainer(toy_classifier(tmp_path)).objective, Classifier)


def test_too_long_for_the_positions_of_roberta(tmp_path):
    recipe = toy_classifier(tmp_path, config={**ROBERTA, "max_position_embeddings": 8})
    with pytest.raises(ValueError, match=r"has learned 7 positions; set data\.cutoff_length to 7"):
        train(recipe, quiet())


def test_commands_for_language_models_say_so(tmp_path, capsys):
    recipe = toy_classifier(tmp_path)
    folder = str(train(recipe, quiet()).folder)
    file = f"{folder}/recipe.yaml"
    for arguments in (
        ["evaluate", folder, "--tasks", "boolq"],
        ["generate", folder, "--prompt", "a"],
        ["plan", file, "--simulate"],
        ["benchmark", file],
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        name = "plan --simulate" if arguments[0] == "plan" else arguments[0]
        assert f"`{name}` is for language models, but this recipe has a `classifier`; " in error
        assert ("metrics.jsonl" in error) == (arguments[0] == "evaluate")


def test_a_package_may_hold_a_folder(tmp_path, monkeypatch):
    model = tmp_path / "toy_encoder_package" / "inside"
    model.mkdir(parents=True)
    (model.parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"or one folder with config\.json and safetensors, in the package; found 0"):
        resolve("package:toy_encoder_package")
    for name in ("config.json", "model.safetensors"):
        (model / name).touch()
    found = resolve("package:toy_encoder_package")
    assert (found.kind, found.location) == ("folder", str(model))
