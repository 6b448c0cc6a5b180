"""A report says what runs have logged: the right numbers, at the right epochs, in one file that needs no other."""

import base64
import json
import re
import struct
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from metatt_scale.cli import main
from metatt_scale.report import curves
from metatt_scale.report.groups import Group, make_groups, mean_and_error, span
from metatt_scale.report.page import _summary
from metatt_scale.report.runs import read_runs

EPOCHS, STEPS = 6, 4
"""Steps are of an epoch; every second is logged."""
SIZES = {"input": 5, "layer": 3, "projection": 2, "output": 7}
BEST = {"fixed": (0.80, 0.82, 0.84), "swept": (0.70, 0.80, 0.90)}
"""Accuracy of each seed in the epoch before the last; 0.10 less in the others."""
SWEEPS = {2: 3, 4: 2}
"""Ranks after epochs."""


def lines_of(group, seed):
    rank = 4
    for step in range(2, EPOCHS * STEPS + 1, 2):
        epoch = (step - 1) // STEPS
        line = {
            "step": step,
            "epoch": epoch,
            "loss": 2.0 / step + seed / 100,
            "grad_norm": 1.0,
            "learning_rate": 1e-3,
        }
        line |= {
            "tokens_per_second": 100.0 * seed,
            "seconds": 0.1,
            "ranks": [rank] * 3,
            "memory_gib": 2.0,
            "skipped": 0,
        }
        line["gradient_norms"] = {mode: [0.1 + i for i in range(1 if n > 3 else n)] for mode, n in SIZES.items()}
        if step % STEPS == 0:
            if group == "swept" and epoch + 1 in SWEEPS:
                before, rank = rank, SWEEPS[epoch + 1]
                line["sweep"] = {"ranks_before": [before] * 3, "ranks_after": [rank] * 3, "bonds": [], "norm": 1.0}
            line["eval_loss"] = 1.0 / (epoch + 1)
            line["eval_accuracy"] = BEST[group][seed - 1] - (0.0 if epoch == EPOCHS - 2 else 0.1)
            line["spectra"] = [[0.0 if epoch == 0 else 2.0**-k for k in range(rank)]] * 3
        yield line


def make_run(folder, group="fixed", seed=1, *, lines=None, finished=True, **sections):
    """Write a run directory as `train` leaves it."""
    folder.mkdir(parents=True)
    lines = list(lines_of(group, seed)) if lines is None else lines
    recipe = {
        "output_dir": str(folder),
        "seed": seed,
        "backbone": {"path": "random:roberta_base"},
        "data": {"train": [{"path": "mrpc.jsonl"}]},
        "adapter": {"rank": 4, "alpha": 2.0 if group == "fixed" else 4.0},
        **sections,
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if finished:
        last = (lines[-1].get("sweep") or {}).get("ranks_after") or lines[-1]["ranks"]
        about = {
            "trainable_parameters": {4: 128, 2: 44}.get(last[0]),
            "modes": list(SIZES),
            "sizes": list(SIZES.values()),
            "ranks": last,
            "projections": ["query", "value"],
        }
        (folder / "adapter").mkdir()
        (folder / "adapter" / "metatt.json").write_text(json.dumps(about), encoding="utf-8")
    return folder


def without(*keys):
    return [{key: value for key, value in line.items() if key not in keys} for line in lines_of("fixed", 1)]


def groups_of(*folders) -> list[Group]:
    return make_groups(read_runs(folders))


def report(*arguments):
    return main(["report", *map(str, arguments)])


class Reader(HTMLParser):
    """Tags of a page with their attributes, and the cells of its tables."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self._in_cell = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        self._in_cell = tag in ("td", "th")
        if self._in_cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self._in_cell = False

    def handle_data(self, data):
        if self._in_cell:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of two groups of three seeds; one run was killed while it wrote a line."""
    root = tmp_path_factory.mktemp("runs")
    runs = [make_run(root / f"{group}_{seed}", group, seed) for group in BEST for seed in (1, 2, 3)]
    with (runs[0] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 26, "epoch": 6, "lo')
    assert report(*runs, "--out", root / "out") == 0
    return root / "out"


def test_the_page_needs_nothing_else(written):
    text = (written / "report.html").read_text(encoding="utf-8")
    resources = [
        (tag, name, value)
        for tag, attributes in Reader(text).tags
        for name, value in attributes.items()
        if name in ("src", "srcset", "href", "data", "action", "poster")
    ]
    assert len(resources) == 2 * (3 + 2 + 2) and all(v.startswith("data:image/png;base64,") for _, _, v in resources)
    assert not re.search(r"url\(|@import|https?:|file:|<script|<link|<iframe", re.sub(r"base64,[^\"]*", "", text))


def test_every_picture_is_there_in_light_and_dark_beside_the_page_and_in_it(written):
    text = (written / "report.html").read_text(encoding="utf-8")
    inside = {base64.b64decode(found) for found in re.findall(r"base64,([^\"]*)", text)}
    names = ["scores", "ranks", "speed", "spectra-1", "spectra-2", "gradients-1", "gradients-2"]
    files = {f"{name}-{theme}.png" for name in names for theme in ("light", "dark")}
    assert {path.name for path in written.iterdir()} == files | {"report.html"}
    for name in files:
        png = (written / name).read_bytes()
        assert png[:8] == b"\x89PNG\r\n\x1a\n" and png in inside
        width, height = struct.unpack(">II", png[16:24])
        assert width == 1440 and 300 < height < 2000
    assert (written / "scores-light.png").read_bytes() != (written / "scores-dark.png").read_bytes()


def test_the_table_has_means_and_standard_errors(written):
    head, *rows = Reader((written / "report.html").read_text(encoding="utf-8")).rows
    fixed, swept = (dict(zip(head, row, strict=True)) for row in rows[:2])
    assert [fixed["group"], swept["group"]] == ["adapter.alpha=2.0", "adapter.alpha=4.0"]
    assert fixed["runs"] == swept["runs"] == "3"
    assert (fixed["parameters"], swept["parameters"]) == ("128", "44")
    assert (fixed["final ranks"], swept["final ranks"]) == ("4", "2")
    # deviations of 0.02 (0.10) on both sides of the mean: s = 0.02 (0.10), divided by the square root of 3
    assert (fixed["accuracy, best"], swept["accuracy, best"]) == ("0.8200 ± 0.0115", "0.8000 ± 0.0577")
    assert (fixed["accuracy, last"], swept["accuracy, last"]) == ("0.7200 ± 0.0115", "0.7000 ± 0.0577")
    assert fixed["evaluation loss, best"] == "0.1667 ± 0.0000"
    assert fixed["tokens/s"] == "200 ± 58" and fixed["memory (GiB)"] == "2.00 ± 0.00"


def test_the_best_is_one_with_the_ranks_of_the_last_evaluation(tmp_path):
    """As of a study, also where the last line is no evaluation and tells of a later sweep."""
    lines = [line | ({"eval_accuracy": 0.99} if line["step"] == 8 else {}) for line in lines_of("swept", 1)]
    sweep = {"ranks_before": [2] * 3, "ranks_after": [1] * 3}
    later = {"step": 26, "epoch": 6, "loss": 0.1, "ranks": [1] * 3, "sweep": sweep}
    for name, more in (("a", []), ("b", [later])):
        run = make_run(tmp_path / name, "swept", lines=[*lines, *more])
        head, (row,) = _summary(groups_of(run))
        cells = dict(zip(head, row, strict=True))
        assert cells["final ranks"] == ("1" if more else "2") and cells["accuracy, best"] == "0.7000"


def test_ranks_change_where_sweeps_were(tmp_path):
    run, fixed = make_run(tmp_path / "a", "swept"), make_run(tmp_path / "b")
    swept, constant = groups_of(run, fixed)
    assert swept.rank_changes() == {2.0: [[3, 3, 3]], 4.0: [[2, 2, 2]]} and constant.rank_changes() == {}
    curve = swept.rank_curves()[0]
    assert dict(zip(curve.x, curve.mean, strict=True)) == {
        **{x: 4 for x in (0.5, 1.0, 1.5)},
        **{x: 3 for x in (2.0, 2.5, 3.0, 3.5)},
        **{x: 2 for x in (4.0, 4.5, 5.0, 5.5, 6.0)},
    }
    # Told by the ranks of later lines alone, where the line of the sweep was not logged.
    told = [line for line in lines_of("swept", 1) if "sweep" not in line]
    assert groups_of(make_run(tmp_path / "c", lines=told))[0].rank_changes() == {2.5: [[3, 3, 3]], 4.5: [[2, 2, 2]]}


def test_curves_are_means_over_the_seeds_that_got_there(tmp_path):
    short = list(lines_of("fixed", 3))[:4]
    runs = [make_run(tmp_path / "1", seed=1), make_run(tmp_path / "3", seed=3, lines=short, finished=False)]
    (group,) = groups_of(*runs)
    curve = group.curve("eval_accuracy")
    assert curve is not None
    np.testing.assert_allclose(curve.x, range(1, 7))
    np.testing.assert_allclose(curve.mean, [0.72, 0.72, 0.70, 0.70, 0.80, 0.70])
    np.testing.assert_allclose(curve.error[:2], 0.02)  # 0.70 and 0.74: s = 0.02 sqrt 2, divided by sqrt 2
    assert np.isnan(curve.error[2:]).all()
    smooth = group.curve("loss", most=3)
    assert smooth is not None and len(smooth.x) == 3 and group.curve("eval_f1") is None


def test_gradients_stand_in_chain_order_a_column_per_epoch(tmp_path):
    lines = [
        {**line, "gradient_norms": dict(reversed(line["gradient_norms"].items()))} for line in lines_of("fixed", 1)
    ]
    edges, found = groups_of(make_run(tmp_path / "a", lines=lines, finished=False))[0].gradients()
    assert list(found) == list(SIZES) and edges.tolist() == list(range(7))
    np.testing.assert_allclose(found["layer"], [[0.1] * 6, [1.1] * 6, [2.1] * 6])


def test_the_last_step_of_an_epoch_belongs_to_it(tmp_path):
    lines = [{**line, "gradient_norms": {"input": [float(line["step"])]}} for line in lines_of("fixed", 1)]
    edges, found = groups_of(make_run(tmp_path / "a", lines=lines))[0].gradients()
    # Of steps 2 and 4, of 6 and 8, ...
    assert edges.tolist() == list(range(7)) and found["input"].tolist() == [[3, 7, 11, 15, 19, 23]]


def test_spectra_end_where_a_rank_ends(tmp_path):
    bonds = groups_of(make_run(tmp_path / "a", "swept"))[0].spectra()
    x, values = bonds[2]
    assert len(bonds) == 3 and x.tolist() == [1, 2, 3, 4, 5, 6]
    assert np.isfinite(values).sum(axis=1).tolist() == [4, 3, 3, 2, 2, 2]


def test_a_run_of_one_epoch_is_shown_over_steps(tmp_path):
    (group,) = groups_of(make_run(tmp_path / "a", lines=list(lines_of("fixed", 1))[:2], finished=False))
    assert group.unit == "step" and group.rank_curves()[0].x.tolist() == [2, 4]


def test_a_run_killed_in_its_first_epoch_has_the_epochs_of_its_kind(tmp_path):
    whole, killed = make_run(tmp_path / "a"), make_run(tmp_path / "b", "swept", lines=without()[:1], finished=False)
    assert [group.steps_per_epoch for group in groups_of(whole, killed)] == [STEPS, STEPS]


@pytest.mark.parametrize(
    "lines",
    [
        without("eval_loss", "eval_accuracy", "spectra", "gradient_norms"),
        without("eval_accuracy")[:1],
        [{"step": 1, "epoch": 0}],
        [{**line, "loss": None, "gradient_norms": {"input": [None], "layer": [0.0, None]}} for line in without()],
    ],
    ids=["no evaluations", "one line", "nothing", "not finite"],
)
def test_what_is_missing_is_left_out(tmp_path, lines, capsys):
    run = make_run(tmp_path / "a", lines=lines, finished=False)
    assert report(run) == 0, capsys.readouterr().err
    head, row, *_ = Reader((run / "report" / "report.html").read_text(encoding="utf-8")).rows
    assert row[:3] == ["a", "1 (1 unfinished)", "–"] and len(row) == len(head)


def test_lines_that_are_none_are_passed_over(tmp_path):
    run = make_run(tmp_path / "a")
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'[1]\n{"epoch": 1}\n\xff\xfe\n{"step": 24, "epoch": 5, "loss": 7.0}\n{"st')
    (found,) = read_runs([run])
    assert found.passed_over == 4 and len(found.lines) == 12, "of a step that stands twice the later line counts"
    assert found.last["loss"] == 7.0


@pytest.mark.parametrize(
    "change",
    [
        {"ranks": 7},
        {"ranks": [2, "2", 2]},
        {"ranks": [2, 2]},
        {"gradient_norms": [1]},
        {"gradient_norms": {"input": 1.0}},
        {"spectra": 4},
        {"spectra": [[1.0]]},
        {"spectra": [["a"]] * 3},
        {"sweep": 3},
        {"sweep": {"ranks_after": 4}},
        {"step": "24"},
        {"step": True},
        {"epoch": None},
        {"step": 9 * 10**14},
        {"epoch": 9 * 10**11},
        {"step": 9 * 10**14, "epoch": 9 * 10**11},
        {"epoch": 25},
    ],
    ids=str,
)
def test_lines_of_another_form_are_passed_over(tmp_path, change):
    lines = list(lines_of("swept", 1))
    run = make_run(tmp_path / "a", "swept", lines=[lines[0] | change, *lines[1:], lines[-1] | change], finished=False)
    (found,) = read_runs([run])
    assert list(found.lines) == lines[1:] and found.passed_over == 2


def test_runs_whose_chains_differ_in_length_have_a_report(tmp_path, capsys):
    """One recipe gives chains of one length; a folder that was edited may tell another."""
    short = [line | {"ranks": [4], "spectra": [[1.0, 0.5]]} for line in lines_of("fixed", 2)]
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=2, lines=short, finished=False)]
    (runs[0] / "adapter" / "metatt.json").write_text('{"sizes": 7, "modes": 3}')
    assert report(*runs, "--out", tmp_path / "out") == 0, capsys.readouterr().err


def test_groups_are_called_after_what_differs(tmp_path):
    other = {"path": "random:llama2_7b"}
    runs = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", "swept", backbone=other),
        make_run(tmp_path / "c", seed=2, device="cpu"),
    ]
    names = [(group.name, len(group.runs)) for group in groups_of(*runs)]
    assert names == [
        ("backbone.path=random:roberta_base, adapter.alpha=2.0", 2),
        ("backbone.path=random:llama2_7b, adapter.alpha=4.0", 1),
    ]
    assert [group.name for group in groups_of(runs[0], runs[2])] == ["a"]


def test_a_section_that_others_have_not_is_named_by_what_it_sets(tmp_path):
    sweep = {"schedule": [{"after": 2, "rank": 2}]}
    plain = make_run(tmp_path / "plain", "fixed", 1)
    swept = make_run(tmp_path / "swept", "fixed", 1, sweep=sweep)
    assert [group.name for group in groups_of(plain, swept)] == [
        "sweep=null",
        'sweep.schedule=[{"after": 2, "rank": 2}]',
    ]


ODD = [
    ({"loss": 1e308, "eval_loss": -1e308, "tokens_per_second": 1e308, "memory_gib": -1e308}, True),
    ({"spectra": [[1e308] * 4] * 3, "gradient_norms": {"layer": [1e308, -1e308, None]}}, True),
    ({"loss": 10**400}, False),
    ({"note": {"deep": [10**400]}}, False),
    ({"eval_$x_{$": 0.5, r"eval_$\frac$": 0.5}, True),
    ({f"eval_{i}": 0.5 for i in range(100)}, True),
    ({"ranks": [2] * 3000, "spectra": [[1.0]] * 3000}, False),
    ({"spectra": [[1.0] * 8000] * 3}, True),
    ({"gradient_norms": {"layer": [1.0] * 8000}}, True),
    ({"gradient_norms": {str(i): [1.0] for i in range(3000)}}, False),
    ({"step": 10**9 - 1, "epoch": 10**9 - 1}, True),
    ({"skipped": {"a": 1}}, False),
]
"""What lines may hold besides, and whether such a line is taken."""


def test_odd_numbers_and_names_have_a_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(curves, "_MOST_PANELS", 6)
    first, taken = next(lines_of("fixed", 1)), 1
    run = make_run(tmp_path / "a", lines=[first])
    odd = [{**first, "step": 100 + i, "epoch": 30, **change} for i, (change, _) in enumerate(ODD)]
    for line, (_, wanted) in zip(odd, ODD, strict=True):
        (run / "metrics.jsonl").write_text(json.dumps(first) + "\n" + json.dumps(line) + "\n")
        assert read_runs([run])[0].passed_over == (not wanted), line
        taken += wanted
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [first, *odd]))
    assert len(read_runs([run])[0].lines) == taken
    assert report(run) == 0, capsys.readouterr().err


def test_halves_of_surrogate_pairs_are_no_obstacle(tmp_path):
    """In a line of metrics, in a description, in the name of a folder and in a label."""
    runs = [make_run(tmp_path / "a\udcff", output_dir="a"), make_run(tmp_path / "b", "swept")]
    with (runs[0] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "epoch": 7, "eval_\\udcff": 1.0}\n')
    about = json.loads((runs[0] / "adapter" / "metatt.json").read_text())
    (runs[0] / "adapter" / "metatt.json").write_text(json.dumps(about | {"projections": ["\ud800", "value"]}))
    assert [run.passed_over for run in read_runs(runs)] == [1, 0]
    assert report(*runs, "--out", tmp_path / "out", "--label", "x\udcff", "$y$") == 0
    assert "x?" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_names_cannot_add_to_the_page(tmp_path):
    runs = [make_run(tmp_path / "<script>alert(1)"), make_run(tmp_path / "$b$_&", "swept")]
    out = tmp_path / "out"
    assert report(*runs, "--out", out, "--label", '<img src="x">', r"_$\frac$ 漢") == 0
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text and '<img src="x">' not in text
    cells = [cell for row in Reader(text).rows for cell in row]
    assert {"<script>alert(1)", "$b$_&", '<img src="x">', r"_$\frac$ 漢"} <= set(cells)


def test_what_cannot_be_reported_is_said_in_one_message(tmp_path, capsys, monkeypatch):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", "swept")
    empty, out = make_run(tmp_path / "empty", lines=[], finished=False), tmp_path / "out"
    (tmp_path / "nothing").mkdir()
    for arguments, said in (
        ([tmp_path / "nothing"], "no run, it has no recipe.yaml; give run directories"),
        ([tmp_path / "absent"], "no run"),
        ([a, empty], "holds no readable step"),
        ([a, tmp_path / "b" / ".." / "a"], "is given twice"),
        (
            [a, b, "--label", "x"],
            "--label has 1 names for 2 groups of runs; give one for each of: adapter.alpha=2.0;",
        ),
        ([a, b, "--out", tmp_path], "which is no part of a report; give another folder with --out"),
        ([a, "--out", a / "recipe.yaml"], "recipe.yaml is a file, where a folder is needed"),
    ):
        assert report(*arguments, *([] if "--out" in arguments else ["--out", out])) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report(a) == 2 and "pip install metatt-scale[report]" in capsys.readouterr().err
    assert not out.exists() and not (a / "report").exists()


def test_only_a_report_is_replaced(tmp_path, capsys):
    run, out = make_run(tmp_path / "a", lines=without()[:2], finished=False), tmp_path / "out"
    out.mkdir()
    for name in ("report.html", "scores-light.png"):
        (out / name).write_text("mine")
        assert report(run, "--out", out) == 2 and f"holds {name}" in capsys.readouterr().err
        assert (out / name).read_text() == "mine"
        (out / name).unlink()
    assert report(run, "--out", out) == 0
    (out / "spectra-9-dark.png").write_text("of an earlier report with more groups")
    assert report(run, "--out", out) == 0 and not (out / "spectra-9-dark.png").exists()
    (out / "notes.txt").write_text("mine")
    assert report(run, "--out", out) == 2 and "holds notes.txt" in capsys.readouterr().err


def test_statistics():
    mean, error = mean_and_error(np.array([[1.0, 5.0, np.nan], [3.0, np.nan, np.nan]]))
    np.testing.assert_array_equal(mean, [2, 5, np.nan])
    np.testing.assert_array_equal(error, [1, np.nan, np.nan])
    assert [span([[8, 8]]), span([[8, 6], [8, 4]]), span([])] == ["8", "8·4–6", "–"]
