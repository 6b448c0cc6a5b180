"""`metatt-scale doctor` as a user starts it, in strange environments: it ends with a verdict for each line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from metatt_scale.doctor.ask import ask

ROOT = Path(__file__).resolve().parents[2]
SECRETS = {"HF_TOKEN": "hf_0123456789", "WANDB_API_KEY": "wandb-0123456789", "NCCL_AUTH_TOKEN": "nccl-0123456789"}
STRANGE = {
    "RANK": "garbage",
    "PATH": "",
    "METATT_CACHE": "/dev/null/cache",
    "NCCL_DEBUG": "IN\x1b[31mFO",
    "COLUMNS": "-1",
}
LOOKED_AT = """
    metatt_scale Python system torch transformers accelerate datasets bitsandbytes deepspeed lm-eval peft flash-attn
    triton wandb driver CPU device attention NCCL gloo launcher threads memory secrets RANK NCCL_DEBUG
"""

pytestmark = pytest.mark.slow


def doctor(*arguments, folder, **environment):
    kept = {
        name: value for name, value in os.environ.items() if name not in ("HOME", "COLUMNS", "RANK", "WORLD_SIZE")
    }
    path = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "metatt_scale.cli", "doctor", *arguments],
        env={**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
    )


def test_every_line_in_a_strange_environment(tmp_path):
    done = doctor("--json", folder=tmp_path, **STRANGE, **SECRETS)
    assert done.returncode == 2 and done.stderr == "", done.stderr
    report = json.loads(done.stdout)
    lines = {line["name"]: line for line in report["lines"]}
    assert len(lines) == len(report["lines"]) and set(LOOKED_AT.split()) <= lines.keys()
    assert all(set(line) == {"section", "name", "found", "verdict", "remedy"} for line in report["lines"])
    problems = {name for name, line in lines.items() if line["verdict"] == "problem"}
    assert report["verdict"] == "problem" and problems == {"launcher", "metatt_scale cache"}
    working = ("torch", "bitsandbytes", "deepspeed", "gloo", "4-bit kernels", "device", "attention", "working folder")
    assert {name: lines[name]["verdict"] for name in working} == dict.fromkeys(working, "ok")
    assert lines["RANK"]["found"] == "garbage" and lines["NCCL_DEBUG"]["found"] == r"IN\x1b[31mFO"
    assert not [secret for secret in SECRETS.values() if secret in done.stdout]


def test_a_broken_torch_is_one_problem(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    done = doctor(folder=tmp_path)
    assert done.returncode == 2 and done.stderr == "" and max(map(len, done.stdout.splitlines())) <= 80
    assert "1 problem (torch)" in done.stdout.splitlines()[-1] and "libcudart.so.13" in done.stdout


def test_only_the_first_process_of_a_node_reports(tmp_path):
    done = doctor(folder=tmp_path, LOCAL_RANK="1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_crash_and_a_hang_are_answers(tmp_path, monkeypatch):
    (tmp_path / "crashes.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    (tmp_path / "leaves.py").write_text("import sys; sys.exit('please install me')")
    (tmp_path / "hangs.py").write_text("import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answers = ask(["import crashes", "import leaves", "import json"], seconds=60)
    assert "SIGSEGV" in answers["import crashes"].error and "please install me" in answers["import leaves"].error
    assert answers["import json"].error == "" and answers.keys() == {"import crashes", "import leaves", "import json"}
    assert ask(["import hangs"], seconds=0.5)["import hangs"].error


def test_no_python_to_start_is_an_answer(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/python")
    assert "/no/python" in ask(["folders", "torch"])["folders"].error
