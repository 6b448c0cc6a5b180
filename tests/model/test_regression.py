"""Numbers of sentences on tiny encoders: loss, gradient, scores, what decides the best, and what is refused."""

import json
import math

import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from metatt_scale.data import collate, micro_batches
from metatt_scale.reopen import read_recipe
from metatt_scale.training import train
from metatt_scale.training.classifier import Classifier
from tests.tiny import FLOAT64, randomise
from tests.toy import BERT, ROBERTA, UNDROPPED, make_trainer, metrics, quiet, said, toy_classifier

RECORDS = [{"one": f"{i * 7 % 131}", "two": f"{'0' * (i % 5)}{i}", "label": i * 8 % 131 / 26 - 1} for i in range(80)]
WHOLE = {"one": "3", "two": "4", "label": 2}
"""A whole number is a number."""


def toy_regression(folder, records=(*RECORDS, WHOLE), **sections):
    recipe = toy_classifier(folder, **{"classifier": {"labels": 1}, **sections})
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return recipe


def double_trainer(folder, config=BERT, **training):
    trainer = make_trainer(toy_regression(folder, config={**config, **UNDROPPED}, training=training), torch.float64)
    randomise(trainer.adapter)
    return trainer


@pytest.mark.parametrize("config", [BERT, ROBERTA], ids=["bert", "roberta"])
def test_the_loss_is_the_squared_error_and_scores_are_scipys(tmp_path, config):
    trainer = double_trainer(tmp_path, config)
    table = trainer.data.table
    assert table.classes is None and table.values is not None and table.values.dtype == "float32"
    assert table.values.tolist() == pytest.approx([r["label"] for r in (*RECORDS, WHOLE)])
    assert trainer.data.validation is not None
    indices = trainer.data.validation.indices
    with torch.no_grad():
        model = trainer.model.eval()
        alone = [(torch.from_numpy(table.example(i)[0])[None], collate(table, [i], 0).segments_BS) for i in indices]
        keys = [{"token_type_ids": two[:, : ids.shape[1]]} if config is BERT else {} for ids, two in alone]
        predicted = [model(ids, **given).logits.item() for (ids, _), given in zip(alone, keys, strict=True)]
    true, scores = table.values[indices], trainer.evaluate()
    assert scores["eval_loss"] == pytest.approx(((predicted - true) ** 2).mean(), rel=1e-6)
    assert scores["eval_pearson"] == pytest.approx(pearsonr(predicted, true)[0], rel=FLOAT64)
    assert scores["eval_spearman"] == pytest.approx(spearmanr(predicted, true)[0], rel=FLOAT64)


def test_micro_batches_ranks_and_fillers_change_nothing(tmp_path):
    trainer = double_trainer(tmp_path, micro_batch_size=16)
    parts = double_trainer(tmp_path, micro_batch_size=3)
    assert trainer.evaluate() == pytest.approx(parts.evaluate(), rel=FLOAT64)
    _, indices = trainer.order.global_batch(0)
    batches = [
        batch
        for rank in range(4)
        for batch in micro_batches(
            *(trainer.data.table, indices[:3]), micro_batch_size=4, rank=rank, world_size=4, pad_token_id=0
        )
    ]
    fillers = [b for b in batches if b.values_B is not None and bool(b.values_B.isnan().all())]
    assert len(batches) == 4 and len(fillers) == 1
    total = torch.stack([trainer.objective.loss_sum(batch) for batch in batches]).sum()
    total.backward()  # through the filler too: engines run collectives in every backward
    trainer.adapter.pull_back()
    with torch.no_grad():
        whole = trainer.objective.loss_sum(collate(trainer.data.table, indices[:3], 0))
    assert total.item() == pytest.approx(whole.item(), rel=FLOAT64)
    assert all(core.grad is not None and bool(core.grad.isfinite().all()) for core in trainer.adapter.cores)


def test_a_trained_chain_tells_numbers_apart(tmp_path):
    records = [{"one": "ab"[i % 2] * 4, "two": f"{i}", "label": i % 2 - 0.5} for i in range(80)]
    training = {"max_steps": None, "epochs": 10, "eval_every": "never"}
    trainer = make_trainer(toy_regression(tmp_path, records, training=training))
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert isinstance(trainer.objective, Classifier) and trainer.recipe.headline == "eval_spearman"
    assert after["eval_loss"] < before["eval_loss"] / 2 and after["eval_pearson"] > 0.9


def test_the_best_by_its_metric_is_kept_and_patience_counts_by_it(tmp_path, monkeypatch):
    training = {"keep": "best", "best_by": "metric", "eval_every": 1, "early_stopping_patience": 2}
    recipe = toy_regression(tmp_path, training=training, classifier={"labels": 1, "metric": "pearson"})
    told = iter([(3.0, 0.1), (2.0, 0.5), (1.0, 0.4), (0.5, math.nan)])

    def evaluate(*_):
        loss, score = next(told)
        return {"eval_loss": loss, "eval_pearson": score, "eval_spearman": 1 - score}

    monkeypatch.setattr(Classifier, "evaluate", evaluate)
    console = quiet()
    run = train(recipe, console)
    assert "stopped early after step 4: no higher eval_pearson in 2 evaluations" in said(console)
    assert [line["eval_pearson"] for line in metrics(run.folder)] == [0.1, 0.5, 0.4, None]
    description, _ = read_recipe(run.folder / "adapter")
    assert (description["step"], description["best_loss"], description["best_metric"]) == (2, 2.0, 0.5)


def test_what_was_never_a_number_is_said_and_not_taken_for_the_best(tmp_path, monkeypatch):
    training = {"keep": "best", "best_by": "metric", "eval_every": 1, "early_stopping_patience": 2}
    scores = {"eval_loss": 1.0, "eval_pearson": math.nan, "eval_spearman": math.nan}
    monkeypatch.setattr(Classifier, "evaluate", lambda *_: scores)
    console = quiet()
    run = train(toy_regression(tmp_path, training=training), console)
    assert "stopped early after step 2: no finite eval_spearman in 2 evaluations" in said(console)
    assert "no evaluation qualified (eval_spearman was never finite, or ranks changed" in said(console)
    description, _ = read_recipe(run.folder / "adapter")
    assert (description["step"], description["best_metric"]) == (2, None)


def test_one_number_has_no_correlation_to_choose_by(tmp_path):
    training = {"keep": "best", "best_by": "metric"}
    recipe = toy_regression(tmp_path, training=training, data={"validation_size": 1})
    with pytest.raises(ValueError, match="there is 1 validation record, which has no correlation; give at least two"):
        train(recipe, quiet())


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ('"2.5"', "has '2.5' (a string) in field 'label', which must be a number (`labels` is 1)"),
        ("true", "has a boolean in field 'label', which must be a number"),
        ("null", "has null in field 'label', which must be a number"),
        ("[1]", "has an array in field 'label', which must be a number"),
        ("NaN", "has nan in field 'label', which must be finite in 32 bits"),
        ("-Infinity", "has -inf in field 'label', which must be finite"),
        ("1e39", "has 1e+39 in field 'label', which must be finite"),
        (
            f"1{'0' * 400}",
            "has 1000000000000000000000000000000000000000 in field 'label', which must be finite",
        ),
    ],
)
def test_a_label_that_is_no_number_is_named_with_its_line(tmp_path, label, says):
    recipe = toy_regression(tmp_path)
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write(f'{{"one": "a", "two": "b", "label": {label}}}\n')
    with pytest.raises(ValueError) as caught:
        make_trainer(recipe)
    assert f"{tmp_path / 'data.jsonl'}:82: record {says}" in str(caught.value)


def test_records_without_labels_are_refused_but_one_minus_one_is_a_number(tmp_path):
    unlabelled = [{**record, "label": -1.0} for record in RECORDS]
    with pytest.raises(ValueError, match=r"all 80 records have -1 in field 'label', .* GLUE's test splits"):
        make_trainer(toy_regression(tmp_path, unlabelled))
    make_trainer(toy_regression(tmp_path, [RECORDS[1], *unlabelled[1:]]))
