"""`classifier.init_bias`: a new head starts at what the training labels are on average; the loss shows it."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from metatt_scale.backbone import head_tensors, load_backbone
from metatt_scale.data import Mixture, TokenTable
from metatt_scale.data.prepare import PreparedData
from metatt_scale.recipe import TaskRecipe
from metatt_scale.reopen import reopen
from metatt_scale.training import train
from metatt_scale.training.classifier import label_means
from tests.toy import BERT, CPU, ROBERTA, UNDROPPED, metrics, quiet, toy_classifier

ENCODERS = pytest.mark.parametrize("config", [BERT, ROBERTA], ids=["bert", "roberta"])
NEAR_ZERO = {"init_bias": "labels", "init_std": 1e-4}  # of the logits the bias is left


def skewed(folder, labels, **sections):
    """A recipe whose labels are, three times out of four, 0 of two classes, or 5 of the numbers 1 and 5."""
    recipe = toy_classifier(
        folder, data={"validation_size": 0}, **{"classifier": {"labels": labels, **NEAR_ZERO}, **sections}
    )
    values: tuple[Any, Any] = (1.0, 5.0) if labels == 1 else (1, 0)
    records = [{"one": f"{i}", "two": f"{i * 7}", "label": values[i % 4 > 0]} for i in range(80)]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return recipe


@ENCODERS
def test_the_first_loss_is_that_of_the_labels_alone(tmp_path, config):
    one_step = {"max_steps": 1, "batch_size": 80, "micro_batch_size": 80}
    config = {**config, **UNDROPPED}
    for labels, loss in ((1, 3.0), (2, math.log(82) - (60 * math.log(61) + 20 * math.log(21)) / 80)):
        run = train(skewed(tmp_path / f"{labels}", labels, config=config, training=one_step), quiet())
        first = next(line["loss"] for line in metrics(run.folder) if "loss" in line)
        assert first == pytest.approx(loss, rel=1e-3), labels
        name = next(it for it in head_tensors(run.model) if it.endswith(("classifier.bias", "out_proj.bias")))
        wanted = [4.0] if labels == 1 else [math.log(61 / 21) / 2, math.log(21 / 61) / 2]
        torch.testing.assert_close(run.model.get_parameter(name), torch.tensor(wanted))
        torch.testing.assert_close(reopen(run.folder, quiet(), CPU).model.get_parameter(name), torch.tensor(wanted))


@pytest.mark.parametrize("held", ["classifier.", "classifier.bias"], ids=["head", "bias"])
def test_a_bias_that_the_files_hold_stays(tmp_path, held):
    recipe = skewed(tmp_path, 2)
    whole: Any = load_backbone(recipe.backbone, CPU, 0, classes=2)
    with torch.no_grad():
        whole.get_parameter("classifier.bias").fill_(0.25)
    state = {name: tensor for name, tensor in whole.state_dict().items() if "classifier" not in name or held in name}
    whole.save_pretrained(tmp_path / "files", state_dict=state)
    again = recipe.model_copy(
        update={"backbone": recipe.backbone.model_copy(update={"path": str(tmp_path / "files")})}
    )
    assert train(again, quiet()).model.get_parameter("classifier.bias").tolist() == [0.25, 0.25]


def test_each_task_has_its_own_and_weights_count():
    tasks = np.array([0, 0, 0, 1, 1, 1, 0], np.int16)
    classes = np.array([1, 1, 0, -100, -100, -100, 0], np.int32)
    values = np.array([np.nan, np.nan, np.nan, 2.0, 4.0, 9.0, np.nan], np.float32)
    table = TokenTable(
        tokens=np.zeros(7, np.int32),
        flags=np.zeros(7, np.uint8),
        offsets=np.arange(8),
        segments=np.zeros(7, np.uint8),
        classes=classes,
        values=values,
        tasks=tasks,
    )
    # 6 is held out; the first source is passed through twice
    mixture = Mixture(members=(np.array([0, 1, 3]), np.array([2, 4, 5])), weights=(2.0, 1.0))
    data = PreparedData(table=table, train=mixture, validation=None, digest="", counts={})
    found = label_means(data, {"classes": TaskRecipe(labels=3), "number": TaskRecipe(labels=1)})
    logs = np.log([1 * 0.6 + 1, 4 * 0.6 + 1, 0 + 1])  # 3 records, though an epoch passes through 5
    np.testing.assert_allclose(found.numpy(), [*(logs - logs.mean()), (2 * 2 + 4 + 9) / 4], rtol=1e-12)
