"""How good predictions are: pure functions of all examples' predictions, whichever ranks made them."""

from __future__ import annotations

import math
import warnings
from typing import Any, cast

import numpy as np

# scikit-learn and scipy are slow to import, and only classifiers need them.


def class_scores(counts_KK: np.ndarray) -> dict[str, float]:
    """Return accuracy, F1 and Matthews' correlation of predicted classes.

    F1 is that of class 1 where there are two (as GLUE's MRPC), else the mean over the classes that occur, as truth or
    as prediction. Matthews' correlation of all classes is 0 where one class was always taken.

    Args:
        counts_KK: examples of class [row] that were taken for class [column].
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    truth_KK, taken_KK = np.indices(counts_KK.shape)
    seen = counts_KK.ravel() > 0
    truth, taken, weights = (values_KK.ravel()[seen] for values_KK in (truth_KK, taken_KK, counts_KK))
    average = "binary" if len(counts_KK) == 2 else "macro"
    return {
        "eval_accuracy": float(accuracy_score(truth, taken, sample_weight=weights)),
        "eval_f1": float(f1_score(truth, taken, average=average, sample_weight=weights, zero_division=cast(Any, 0))),
        "eval_matthews": float(matthews_corrcoef(truth, taken, sample_weight=weights)),
    }


def number_scores(predicted_N: np.ndarray, true_N: np.ndarray) -> dict[str, float]:
    """Return Pearson's correlation and Spearman's rank correlation of predicted with true numbers.

    Both are NaN where they say nothing: of fewer than two examples, of numbers that are all the same or not finite.
    """
    from scipy.stats import ConstantInputWarning, NearConstantInputWarning, pearsonr, spearmanr

    if len(true_N) < 2 or not (np.isfinite(predicted_N).all() and np.isfinite(true_N).all()):
        return {"eval_pearson": math.nan, "eval_spearman": math.nan}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        warnings.simplefilter("ignore", NearConstantInputWarning)
        return {
            "eval_pearson": float(cast(Any, pearsonr(predicted_N, true_N)).statistic),
            "eval_spearman": float(cast(Any, spearmanr(predicted_N, true_N)).statistic),
        }
