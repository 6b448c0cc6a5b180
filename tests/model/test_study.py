"""A real study on a toy model: killed in the middle, it goes on where it stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.toy import toy, write_toy

ROOT = Path(__file__).resolve().parents[2]
STUDY = {
    "recipe": "../recipe.yaml",
    "arms": {"rank2": ["adapter.rank=2"], "rank4": ["adapter.rank=4"]},
    "seeds": [1, 2],
    "score": {"metrics": ["eval_loss"]},
    "compare": [["rank4", "rank2"]],
}


@pytest.fixture
def study(tmp_path):
    write_toy(tmp_path)
    training = {"max_steps": 150, "save_every": "never", "eval_every": 50}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(toy(tmp_path, training=training)))
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "toy.yaml").write_text(yaml.safe_dump(STUDY))
    return tmp_path


def start(folder):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "study.py"), "studies/toy.yaml"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines_of(folder):
    results = folder / "studies" / "results" / "toy.jsonl"
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


@pytest.mark.slow
def test_a_study_killed_in_the_middle_goes_on(study):
    second = study / "runs" / "studies" / "toy" / "rank4" / "seed-1"
    process = start(study)
    deadline = time.monotonic() + 120
    while not ((second / "metrics.jsonl").exists() and (second / "metrics.jsonl").read_text().count("\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, out + err
    assert "rank2, seed 1: eval_loss" in out and "3 runs are left; the same command goes on" in out
    assert "SIGTERM: stopping 1 run(s)" in err and "error" not in err
    before = lines_of(study)
    assert [(line["arm"], line["seed"]) for line in before] == [("rank2", 1)]
    assert "the checkpoint is written" in (second / "log.txt").read_text()
    assert not (second / "adapter").exists()

    process = start(study)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0 and err == "", out + err
    assert "resuming after step" in (second / "log.txt").read_text() and "none left" in out
    lines = lines_of(study)
    assert lines[0] == before[0] and [(line["arm"], line["seed"]) for line in lines] == [
        *(("rank2", 1), ("rank4", 1), ("rank2", 2), ("rank4", 2))
    ]
    for line in lines:
        rank, scores = int(line["arm"][-1]), line["scores"]["eval_loss"]
        assert line["ranks"] == [rank] * 3 and line["trainable_parameters"] == 2 * 32 * rank + 5 * rank**2
        assert len(scores["per_epoch"]) == 3 and scores["last"] == scores["per_epoch"][-1]
        assert scores["best"] == min(scores["per_epoch"]) < scores["per_epoch"][0]
        assert line["torch"] and line["device"] and line["metatt_scale"]
    assert "| rank4 |" in out and "rank4 - rank2, eval_loss: " in out and "over 2 common seeds" in out
