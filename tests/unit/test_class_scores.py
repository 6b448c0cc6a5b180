"""Losses and scores of labels, against their formulas and known predictions; which evaluation is the best."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from metatt_scale.data import IGNORE
from metatt_scale.recipe import ClassifierRecipe
from metatt_scale.training.checkpoint import RunState
from metatt_scale.training.class_scores import class_scores, number_scores
from metatt_scale.training.classifier import class_loss, number_loss


@pytest.mark.parametrize(
    ("counts", "accuracy", "f1", "matthews"),
    [
        ([[5, 0], [0, 3]], 1.0, 1.0, 1.0),
        ([[0, 5], [3, 0]], 0.0, 0.0, -1.0),
        ([[0, 4], [0, 6]], 0.6, 2 * 6 / (2 * 6 + 4), 0.0),  # everything taken for class 1
        ([[4, 0], [6, 0]], 0.4, 0.0, 0.0),
        ([[6, 2], [1, 3]], 0.75, 6 / 9, (6 * 3 - 2 * 1) / math.sqrt(8 * 4 * 7 * 5)),
        # Of three: (c s - sum p t) / sqrt((s^2 - sum p^2) (s^2 - sum t^2)), c right of s, p taken, t true.
        ([[2, 1, 0], [0, 3, 0], [1, 0, 3]], 0.8, (2 / 3 + 6 / 7 + 6 / 7) / 3, (80 - 33) / math.sqrt(66 * 66)),
        # Of three, one of which never occurs: the other two's.
        ([[5, 2, 0], [1, 6, 0], [0, 0, 0]], 11 / 14, (10 / 13 + 12 / 15) / 2, 28 / math.sqrt(7 * 7 * 6 * 8)),
    ],
)
def test_scores_of_known_classes(counts, accuracy, f1, matthews):
    expected = {"eval_accuracy": accuracy, "eval_f1": f1, "eval_matthews": matthews}
    assert class_scores(np.array(counts, float)) == pytest.approx(expected, abs=1e-12)


def test_scores_of_known_numbers():
    true = np.array([0.0, 1.0, 2.5, 5.0])
    assert number_scores(3 * true - 1, true) == pytest.approx({"eval_pearson": 1, "eval_spearman": 1})
    scores = number_scores(-np.exp(true), true)
    assert scores["eval_spearman"] == pytest.approx(-1) and -1 < scores["eval_pearson"] < -0.8
    ties = number_scores(np.array([1.0, 1.0, 2.0, 3.0]), true)  # ranks 1.5, 1.5, 3, 4 against 1, 2, 3, 4
    assert ties["eval_spearman"] == pytest.approx(4.5 / math.sqrt(4.5 * 5))


@pytest.mark.parametrize("predicted", [[1.0, 1.0, 1.0], [1.0, math.nan, 2.0], [1.0, math.inf, 2.0]])
def test_correlations_that_say_nothing_are_nan(predicted):
    assert all(math.isnan(score) for score in number_scores(np.array(predicted), np.arange(3.0)).values())
    assert all(math.isnan(score) for score in number_scores(np.ones(1), np.ones(1)).values())


def test_fillers_have_no_loss():
    torch.manual_seed(0)
    logits_BK, classes_B = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 2, 1, IGNORE, 2])
    known = classes_B != IGNORE
    expected = F.cross_entropy(logits_BK[known], classes_B[known], reduction="sum")
    assert class_loss(logits_BK, classes_B).sum().item() == pytest.approx(expected.item(), rel=1e-12)

    predicted_B = torch.randn(5, dtype=torch.float64, requires_grad=True)
    values_B = torch.tensor([0.5, -1.0, 3.0, math.nan, 2.0])
    loss = number_loss(predicted_B, values_B).sum()
    errors = (predicted_B - values_B.double())[known].detach()
    assert loss.item() == pytest.approx(errors.square().sum().item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, predicted_B)
    assert gradient[3] == 0 and torch.equal(gradient[known], 2 * errors)


def test_half_precision_is_widened_before_the_loss():
    predicted_B = torch.tensor([1000.0], dtype=torch.bfloat16)
    assert number_loss(predicted_B, torch.tensor([999.0])).item() == 1.0  # 999 is no bfloat16
    assert class_loss(torch.zeros(1, 3, dtype=torch.bfloat16), torch.tensor([1])).dtype == torch.float32


def test_the_best_evaluation_by_loss_or_by_metric():
    by_loss, by_metric = RunState(), RunState()
    evaluations = [(1.0, 0.5), (0.8, 0.4), (0.9, 0.6), (math.nan, 0.9), (0.7, math.nan), (0.85, 0.6)]
    seen = []
    for step, (loss, metric) in enumerate(evaluations):
        by_loss.step = by_metric.step = step
        seen.append((by_loss.improved(loss), by_metric.improved(loss, metric)))
    assert [one for one, _ in seen] == [True, True, False, False, True, False]
    assert [other for _, other in seen] == [True, False, True, False, False, False]
    assert (by_loss.best_loss, by_loss.best_metric, by_loss.best_step) == (0.7, None, 4)
    assert (by_metric.best_loss, by_metric.best_metric, by_metric.best_step) == (0.9, 0.6, 2)
    assert (by_loss.evaluations_without_gain, by_metric.evaluations_without_gain) == (1, 3)
    by_metric.forget_best()
    assert by_metric.improved(2.0, -0.5) and by_metric.best_metric == -0.5


def test_the_headline_is_the_usual_score_or_the_one_asked_for():
    assert ClassifierRecipe(labels=2).headline == "accuracy" and ClassifierRecipe(labels=1).headline == "spearman"
    assert ClassifierRecipe(labels=2, metric="matthews").headline == "matthews"
    assert ClassifierRecipe(labels=1, metric="pearson").headline == "pearson"
