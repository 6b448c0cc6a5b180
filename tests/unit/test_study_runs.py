"""Runs of a study, with children that take no time: what is started, recorded, chosen, cut, and told."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from metatt_scale.cli import main
from metatt_scale.study import command
from metatt_scale.study.opening import open_study
from metatt_scale.study.outcome import collect
from tests.studies import CHOOSE, MACHINE, fake_commands, lines_of, study, write_study


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(command, "_PAUSE_SECONDS", 0.01)


def later(seconds, act):
    timer = threading.Timer(seconds, act)
    timer.start()
    return timer


def test_all_runs_end_in_one_table(tmp_path, monkeypatch):
    path = write_study(tmp_path, monkeypatch, compare=[["rank4", "rank2"]], jobs=3)
    code, said = study(path)
    assert code == 0 and "rank4, seed 1: eval_accuracy 0.0410 (best 0.0910); 0:00:0" in said and "none left" in said
    assert re.match(r"6 left; 3 at a time, each with a log.txt below .*\n", said)
    lines = lines_of(path)
    assert len(lines) == 6 and {(line["arm"], line["seed"]) for line in lines} == {
        (arm, seed) for arm in ("rank2", "rank4") for seed in (1, 2, 3)
    }
    line = next(line for line in lines if (line["arm"], line["seed"]) == ("rank4", 2))
    assert line["scores"]["eval_accuracy"] == {
        "last": pytest.approx(0.042),
        "best": pytest.approx(0.092),
        "per_epoch": pytest.approx([-0.058, 0.092, 0.042]),
    }
    assert line["scores"]["eval_loss"] == {"last": None, "best": None, "per_epoch": [None] * 3}
    assert line["ranks"] == [4] * 3 and line["trainable_parameters"] == 4000 and line["seconds"] > 0
    assert line.items() >= MACHINE.items() and line["overrides"] == ["adapter.rank=4"] and line["tried"] is None
    assert str(tmp_path) not in json.dumps(lines), "the file is committed: no paths of a machine"
    text = (tmp_path / "studies" / "results" / "toy.md").read_text()
    assert text in said
    # Seeds 1, 2, 3 give a standard deviation of 1e-3: standard error 1e-3 / sqrt(3), times 4.303 for the interval.
    cells = [re.split(r" *\| *", line)[1:8] for line in text.splitlines() if line.startswith("| rank")]
    assert ["rank4", "4", "4 4 4", "3", "**0.0420 ± 0.0006**", "± 0.0025", "**0.0920 ± 0.0006**"] in cells
    assert ["rank2", "2", "2 2 2", "3", "_0.0220 ± 0.0006_", "± 0.0025", "_0.0620 ± 0.0006_"] in cells
    assert "- rank4 - rank2, eval_accuracy: +0.0200 ± 0.0000 at 95 % over 3 common seeds" in text
    assert "Runs on: test, torch 0, metatt_scale 0 at no commit." in text
    rows = list(csv.DictReader((tmp_path / "studies" / "results" / "toy.csv").read_text().splitlines()))
    assert [row["arm"] for row in rows] == ["rank2", "rank4"] and rows[0]["seeds"] == "1 2 3"
    assert float(rows[1]["eval_accuracy"]) == pytest.approx(0.042)
    assert float(rows[1]["eval_accuracy_half_width_95"]) == pytest.approx(4.302653e-3 / 3**0.5, rel=1e-6)


SHOW_GPU = "import os; print('sees', os.environ.get('CUDA_VISIBLE_DEVICES'))"


def commands_that_tell_their_gpu(opened, run):
    return [(sys.executable, "-c", SHOW_GPU), *fake_commands(opened, run)]


def test_every_run_sees_one_gpu_and_the_study_says_which(tmp_path, monkeypatch):
    """All that ran at a time were on the first GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,MIG-5")
    code, said = study(write_study(tmp_path, monkeypatch, jobs=3, seeds=[1]), commands_that_tell_their_gpu)
    assert code == 0 and "3 at a time, on GPUs 4, MIG-5, each with a log.txt" in said
    assert "`jobs: 2`" in said, "a warning that GPUs are shared"
    gpus = set()
    for arm in ("rank2", "rank4"):
        log = (tmp_path / "runs" / "studies" / "toy" / arm / "seed-1" / "log.txt").read_text()
        gpus |= set(seen := re.findall(r"^sees (.*)", log, re.MULTILINE))
        assert len(seen) == 1 and re.search(rf"^{arm}, seed 1: .* on GPU {seen[0]};", said, re.MULTILINE)
    assert gpus == {"4", "MIG-5"}


def test_a_study_on_the_cpu_speaks_of_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    path = write_study(tmp_path, monkeypatch, base=["device=cpu"], arms={"a": []}, seeds=[1])
    code, said = study(path)
    assert code == 0 and "GPU" not in said


def test_the_best_is_one_with_the_ranks_of_the_last_evaluation(tmp_path, monkeypatch):
    """A sweep changes the ranks: a score of larger ones is no result of the small ones that a run ends with."""
    path = write_study(tmp_path, monkeypatch, seeds=[1])
    assert study(path)[0] == 0
    opened = open_study(path)
    run = opened.reported("rank4", None, 1)
    told = [(8, 0.9, None), (8, 0.8, 0.3), (4, 0.6, 0.7), (4, None, 0.4), (4, 0.5, 0.5)]
    lines = [{"step": 1, "loss": 2.0, "ranks": [9] * 3}]
    lines += [{"ranks": [rank] * 3, "eval_accuracy": accuracy, "eval_loss": loss} for rank, accuracy, loss in told]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[0]]))
    line = collect(opened, run, 1.0, MACHINE)
    assert line["ranks"] == [4] * 3
    assert line["scores"] == {
        "eval_accuracy": {"last": 0.5, "best": 0.6, "per_epoch": [0.9, 0.8, 0.6, None, 0.5]},
        "eval_loss": {"last": 0.5, "best": 0.4, "per_epoch": [None, 0.3, 0.7, 0.4, 0.5]},
    }


def test_a_study_does_not_load_torch_beside_its_runs():
    code = "import sys, metatt_scale.study.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_is_finished_is_not_done_again(tmp_path, monkeypatch):
    path = write_study(tmp_path, monkeypatch, seeds=[1])
    assert study(path)[0] == 0
    write_study(tmp_path, monkeypatch, seeds=[1, 2])
    started = []

    def watched(opened, run):
        started.append((run.arm, run.seed))
        return fake_commands(opened, run)

    assert study(path, watched)[0] == 0 and started == [("rank2", 2), ("rank4", 2)]
    assert study(path, watched)[0] == 0 and len(started) == 2 and len(lines_of(path)) == 4


def test_a_trained_run_without_its_line_is_recorded_without_training(tmp_path, monkeypatch):
    path = write_study(tmp_path, monkeypatch, seeds=[1])
    assert study(path)[0] == 0
    results = tmp_path / "studies" / "results" / "toy.jsonl"
    before = lines_of(path)
    results.unlink()
    code, _ = study(path, command.commands_of)  # ours: it would train a model that does not exist
    assert code == 0 and [{**line, "seconds": 0} for line in lines_of(path)] == [
        {**line, "seconds": 0} for line in before
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, ": it is missing"),
        (b'{"step": 1}\n7\n', ", line 2: it is 7; it must be a JSON object"),
        (
            b'{"step": 1}\n{"step": 2, "eval_lo',
            ", line 2: it is no whole JSON: Unterminated string starting at, character 13",
        ),
        (b'{"eval_accuracy": "high"}', ', line 1: `eval_accuracy` is "high"; it must be a valid number'),
        (b'{"eval_accuracy": NaN}', ", line 1: `eval_accuracy` is NaN; it must be a finite number"),
        (b'{"eval_accuracy": 1.0, "ranks": 4}', ", line 1: `ranks` is 4; it must be a valid list"),
        (b"\xff\n", ", line 1: it is not UTF-8 text (byte 0)"),
    ],
    ids=str,
)
def test_a_damaged_file_of_a_trained_run_is_told(tmp_path, monkeypatch, capsys, content, said):
    path, folder = write_study(tmp_path, monkeypatch, seeds=[1], arms={"a": []}), "runs/studies/toy/a/seed-1"
    assert study(path)[0] == 0
    (tmp_path / "studies" / "results" / "toy.jsonl").unlink()
    (tmp_path / folder / "log.txt").unlink()
    metrics = tmp_path / folder / "metrics.jsonl"
    metrics.unlink() if content is None else metrics.write_bytes(content)
    assert study(path, command.commands_of)[0] == 1 and not lines_of(path)
    error = capsys.readouterr().err
    assert error.startswith(f"error: a, seed 1 has no result: {folder}/metrics.jsonl{said}")
    assert f"; remove {folder}, and the run is done again; the end of" in error
    shutil.rmtree(tmp_path / folder)
    assert study(path)[0] == 0 and len(lines_of(path)) == 1


@pytest.mark.parametrize("content", ["[]", "7", "{}", "\0", '{"recipe": []}', pytest.param("[" * 100_000, id="deep")])
def test_a_run_with_a_damaged_description_is_trained_on(tmp_path, monkeypatch, content):
    """Training goes on from its last checkpoint, and writes the adapter again."""
    path = write_study(tmp_path, monkeypatch, seeds=[1], arms={"a": []})
    assert study(path)[0] == 0
    opened = open_study(path)
    run = opened.reported("a", None, 1)
    assert not command.commands_of(opened, run)
    (run.folder / "adapter" / "metatt.json").write_text(content)
    assert [made[3] for made in command.commands_of(opened, run)] == ["train"]
    with pytest.raises(ValueError, match=r"adapter/metatt\.json: .*; remove runs/studies/toy/a/seed-1, and the run"):
        collect(opened, run, 1.0, MACHINE)


def test_an_arm_chooses_before_it_is_reported(tmp_path, monkeypatch):
    path = write_study(tmp_path, monkeypatch, choose=CHOOSE, arms={"rank4": ["adapter.rank=4"]})
    code, said = study(path, dry_run=True)
    assert code == 0 and "6 runs are left, and 3 that wait for a choice" in said and not lines_of(path)
    code, said = study(path)
    chosen = [line for line in lines_of(path) if "chosen" in line]
    assert code == 0 and "rank4 takes training.learning_rate=0.002, by eval_accuracy: " in said
    assert chosen == [
        {
            "arm": "rank4",
            "chosen": "training.learning_rate=0.002",
            "by": "eval_accuracy",
            "means": {
                f"training.learning_rate={rate}": pytest.approx(mean)
                for rate, mean in ((0.001, 0.0405), (0.002, 0.0415), (0.004, 0.0395))
            },
        }
    ]
    assert len(lines_of(path)) == 6 + 1 + 3
    assert "| rank4 | 0.002 " in said and "training.learning_rate" in said
    for line in lines_of(path):
        trial = bool(line.get("tried"))
        assert "chosen" in line or ("data.validation_size=40" in line["overrides"]) == trial


def test_another_choice_is_not_mixed_with_what_is_reported(tmp_path, monkeypatch):
    arms = {"rank4": ["adapter.rank=4"]}
    path = write_study(tmp_path, monkeypatch, choose={**CHOOSE, "values": [1e-3, 4e-3]}, arms=arms)
    assert study(path)[0] == 0
    write_study(tmp_path, monkeypatch, choose=CHOOSE, arms=arms)
    with pytest.raises(ValueError, match=r"rank4, seed 1 .* were .*rate=0\.001, now they are .*rate=0\.002"):
        study(path)
    assert len([line for line in lines_of(path) if line.get("tried")]) == 6, "trials that are done are kept"


def test_the_recipes_device_is_that_of_scoring_and_of_the_machine(tmp_path, monkeypatch):
    """And makes no other run of a run."""
    keys = {"seeds": [1], "arms": {"a": []}, "recipe": "../text.yaml", "score": {"tasks": ["piqa"]}}
    digests, asked = set(), []
    for base, wanted in (([], []), (["device=cpu"], ["--device", "cpu"])):
        opened = open_study(path := write_study(tmp_path, monkeypatch, base=base, **keys))
        run = opened.reported("a", None, 1)
        digests.add(run.digest)
        assert list(command.commands_of(opened, run)[-1][7:]) == wanted
        with pytest.raises(ZeroDivisionError):
            study(path, machine=lambda device: asked.append(device) or 1 / 0)
    assert asked == ["auto", "cpu"] and len(digests) == 1


def test_a_failed_run_is_told_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    arms = {"unlucky": ["adapter.rank=13"], "rank4": ["adapter.rank=4"]}
    path = write_study(tmp_path, monkeypatch, arms=arms, seeds=[1])
    code, said = study(path)
    error = capsys.readouterr().err
    assert code == 1 and "error: unlucky, seed 1 ended with code 2; the end of runs/studies/toy/unlucky" in error
    assert error.endswith("  error: thirteen is unlucky\n") and "Traceback" not in error
    assert [line["arm"] for line in lines_of(path)] == ["rank4"]
    assert "1 run is left; the same command" in said and "Without a finished run: unlucky." in said


def test_a_number_that_runs_do_not_have_is_told(tmp_path, monkeypatch, capsys):
    path = write_study(tmp_path, monkeypatch, score={"metrics": ["eval_f1"]}, seeds=[1], arms={"a": []})
    code, said = study(path)
    assert code == 1 and not lines_of(path) and "no table yet" in said
    assert "metrics.jsonl has no eval_f1; it has eval_accuracy, eval_loss. Name one" in capsys.readouterr().err
    write_study(tmp_path, monkeypatch, seeds=[1], arms={"a": []})
    assert study(path, command.commands_of)[0] == 0, "what was trained counts, once the study asks for what is there"


def test_a_run_that_would_not_fit_the_budget_is_not_started(tmp_path, monkeypatch):
    path = write_study(tmp_path, monkeypatch, seeds=[1])
    assert study(path)[0] == 0
    results = tmp_path / "studies" / "results" / "toy.jsonl"
    results.write_text("".join(json.dumps({**line, "seconds": 600.0}) + "\n" for line in lines_of(path)))
    write_study(tmp_path, monkeypatch, seeds=[1, 2])
    code, said = study(path)
    assert code == 0 and len(lines_of(path)) == 3, "the first one is begun, or a long run would never be"
    assert "1 run is left; the same command goes on with them" in said
    (tmp_path / "runs" / "studies" / "toy" / "rank4" / "seed-2").mkdir(parents=True)
    (tmp_path / "runs" / "studies" / "toy" / "rank4" / "seed-2" / "seconds.txt").write_text("590.0\n")
    assert study(path)[0] == 0 and len(lines_of(path)) == 4


def test_a_run_is_cut_when_the_time_is_up(tmp_path, monkeypatch, capfd):
    path = write_study(tmp_path, monkeypatch, arms={"long": ["adapter.rank=60"]}, seeds=[1, 2])
    started = time.monotonic()
    code, said = study(path, budget_minutes=2 / 60)
    assert code == 0 and time.monotonic() - started < 30 and "2 runs are left" in said
    assert "the time is up: stopping 1 run(s)" in capfd.readouterr().err
    spent = tmp_path / "runs" / "studies" / "toy" / "long" / "seed-1" / "seconds.txt"
    assert 2 <= float(spent.read_text()) < 30


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 0)])
def test_a_signal_stops_the_runs_and_starts_no_more(tmp_path, monkeypatch, capfd, number, code):
    path = write_study(tmp_path, monkeypatch, arms={"long": ["adapter.rank=60"]}, seeds=[1, 2, 3], jobs=2)
    handler = signal.getsignal(number)
    timer = later(2.0, lambda: os.kill(os.getpid(), number))
    got, said = study(path)
    timer.join()
    assert got == code and "3 runs are left" in said and signal.getsignal(number) == handler
    assert f"{number.name}: stopping 2 run(s), which save their state" in capfd.readouterr().err
    assert not (tmp_path / "runs" / "studies" / "toy" / "long" / "seed-3").exists()


def test_a_second_signal_kills_what_does_not_stop(tmp_path, monkeypatch):
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    path = write_study(tmp_path, monkeypatch, arms={"deaf": []}, seeds=[1])
    log = tmp_path / "runs" / "studies" / "toy" / "deaf" / "seed-1" / "log.txt"

    def twice():
        while not (log.exists() and log.read_text()):
            time.sleep(0.02)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)

    timer, started = later(0.1, twice), time.monotonic()
    assert study(path, lambda opened, run: [(sys.executable, "-c", deaf)])[0] == 143
    assert time.monotonic() - started < 50
    timer.join()


def test_two_invocations_do_not_meet(tmp_path, monkeypatch):
    from filelock import FileLock

    path = write_study(tmp_path, monkeypatch)
    assert study(path, table_only=True)[0] == 0
    for lock in ("runs/studies/toy/.lock", "studies/results/.toy.lock"):
        (tmp_path / lock).parent.mkdir(parents=True, exist_ok=True)
        with FileLock(tmp_path / lock):
            with pytest.raises(ValueError, match=f"is running already, .*fuser .*{lock}.*; wait for it, or stop it"):
                study(path)
            assert study(path, table_only=True)[0] == 0 and not lines_of(path)


def test_one_study_is_not_run_from_two_working_folders_at_once(tmp_path, monkeypatch):
    path = write_study(tmp_path, monkeypatch, seeds=[1], arms={"a": []})
    (tmp_path / "elsewhere").mkdir()

    def from_elsewhere(opened, run):
        monkeypatch.chdir(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match=r"toy\.jsonl: this study is running already, perhaps from another"):
            study(path)
        monkeypatch.chdir(tmp_path)
        return fake_commands(opened, run)

    assert study(path, from_elsewhere)[0] == 0 and len(lines_of(path)) == 1


def test_the_table_alone(tmp_path, monkeypatch):
    path = write_study(tmp_path, monkeypatch, seeds=[1])
    code, said = study(path, table_only=True)
    assert code == 0 and said == "no table yet: no reported run is finished\n"
    _, said = study(path)
    for name in ("toy.md", "toy.csv"):
        (tmp_path / "studies" / "results" / name).unlink()
    code, again = study(path, table_only=True)
    assert code == 0 and again == said[said.index("# toy") :]
    assert (tmp_path / "studies" / "results" / "toy.md").read_text() == again


def test_a_dropped_line_is_told_and_its_run_done_again(tmp_path, monkeypatch):
    path = write_study(tmp_path, monkeypatch, seeds=[1], arms={"rank4": ["adapter.rank=4"]})
    assert study(path)[0] == 0
    results = tmp_path / "studies" / "results" / "toy.jsonl"
    results.write_text(results.read_text()[:-20])
    code, said = study(path, command.commands_of)
    assert code == 0 and "dropped a last line that was cut short; that run is done again" in said
    assert len(lines_of(path)) == 1


def test_tasks_are_scored_by_a_second_process(tmp_path, monkeypatch):
    """A line of results has the score of each task; a task that is added later is scored without training."""
    evaluate = (
        "import json, sys; from pathlib import Path; tasks = sys.argv[2].split(',');"
        "score = {'metric': 'acc_norm', 'samples': {'acc': '0000', 'acc_norm': '1110'}, 'key': {}, 'seconds': 1};"
        "scores = dict.fromkeys(tasks, score);"
        "Path(sys.argv[1], 'results.json').write_text(json.dumps({'scores': {'fine_tuned': scores}}))"
    )
    ran = []

    def with_scores(opened, run):
        commands = list(command.commands_of(opened, run))
        ran.append([made[3] for made in commands])
        assert commands[-1][3:] == ("evaluate", str(run.folder), "--tasks", ",".join(opened.study.score.tasks))
        train = fake_commands(opened, run) if commands[0][3] == "train" else []
        return [*train, (sys.executable, "-c", evaluate, str(run.folder), ",".join(opened.study.score.tasks))]

    keys = {"seeds": [1], "arms": {"a": []}, "recipe": "../text.yaml"}
    path = write_study(tmp_path, monkeypatch, score={"tasks": ["piqa"]}, **keys)
    code, said = study(path, with_scores)
    assert code == 0 and "a, seed 1: piqa 0.7500; 0:00:0" in said
    assert lines_of(path)[0]["scores"]["piqa"] == {"last": 0.75, "best": None, "per_epoch": []}
    write_study(tmp_path, monkeypatch, score={"tasks": ["piqa", "boolq"]}, **keys)
    assert study(path, with_scores)[0] == 0 and len(lines_of(path)) == 2
    assert ran == [["train", "evaluate"], ["evaluate"]]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["nowhere.yaml"], "no such study"),
        (["studies/toy.yaml", "--budget-minutes", "0"], "--budget-minutes is 0.0; it must be greater than 0"),
        (["studies/toy.yaml", "--budget-minutes", "nan"], "it must be greater than 0"),
        (["studies/toy.yaml", "--dry-run", "--table-only"], "not allowed with"),
    ],
)
def test_bad_arguments_are_one_message(tmp_path, monkeypatch, capsys, arguments, says):
    write_study(tmp_path, monkeypatch)
    assert main(["study", *arguments]) == 2
    output = capsys.readouterr()
    assert says in output.err and output.err.startswith("error: ") and not output.out


def test_a_study_is_one_process(tmp_path, monkeypatch, capsys):
    write_study(tmp_path, monkeypatch)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["study", "studies/toy.yaml"]) == 2
    assert "works in one process; start it with python" in capsys.readouterr().err
