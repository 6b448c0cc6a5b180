"""Malformed recipes and overrides: each ends in one readable message; none hangs, runs code or leaks a traceback."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from metatt_scale.recipe import RecipeError, load_recipe

GOOD = "output_dir: out\nbackbone: {path: model}\ndata:\n  train: [{path: train.json}]\n"
JARGON = (
    *("type=", "pydantic", "Traceback", "input_value", "Input should", "valid integer", "valid array", "tuple["),
    *("literal[", "None", "True", "False", "Error", "constructor", "tag:yaml.org"),
)
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40)
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A recipe (GOOD and `text`, or `whole`) with overrides, and what its message must say."""

    name: str
    text: str = ""
    whole: str | bytes | None = None
    overrides: tuple[str, ...] = ()
    says: tuple[str, ...]

    def write(self, path: Path) -> None:
        whole = GOOD + self.text if self.whole is None else self.whole
        path.write_bytes(whole if isinstance(whole, bytes) else whole.encode())


def case(name: str, text: str, *says: str) -> Case:
    return Case(name=name, text=text, says=says)


def whole(name: str, content: str | bytes, *says: str) -> Case:
    return Case(name=name, whole=content, says=says)


def override(argument: str, *says: str, text: str = "") -> Case:
    return Case(name=f"override {argument[:40]}", text=text, overrides=(argument,), says=says)


UNKNOWN_KEYS = [
    case("section", "adaptor: {rank: 4}", "unknown key `adaptor`", "did you mean `adapter`?"),
    case(
        "key", "training: {learning_rte: 1e-4}", "`training.learning_rte`", "did you mean `training.learning_rate`?"
    ),
    case("key of another section", "training: {rank: 4}", "`training.rank`", "did you mean `adapter.rank`?"),
    case("key at the top", "epochs: 3", "`epochs` (value 3)", "did you mean `training.epochs`?"),
    case("like nothing", "zzz: 1", "`zzz`", "known keys: output_dir, seed, backbone"),
    case("named like a type", "training: {int: 1}", "unknown key `training.int`", "known keys: epochs"),
    case("empty", "'': 1", "unknown key ``"),
    case("merge", "training: {<<: {epochs: 1}}", "unknown key `training.<<`"),
    case("logging", "logging: {evry: 1}", "`logging.evry`", "`logging.every`"),
    case("evaluation", "evaluation: {task: [boolq]}", "`evaluation.task`", "`evaluation.tasks`"),
    whole("backbone", GOOD.replace("path: model", "path: m, dtpye: float32"), "`backbone.dtpye`", "`backbone.dtype`"),
    whole("in a list", GOOD.replace("}]", ", wieght: 2}]"), "`data.train.0.wieght`", "`data.train.0.weight`?"),
]
SENTENCES = GOOD + "  format: sentences\n  text_fields: [one, two]\n"
CLASSIFIER = "classifier: {labels: 2}\n"
CLASSIFIERS = [
    whole("no classifier", SENTENCES, "`data.format` is sentences", "no `classifier`", "classifier: {labels: 2}"),
    whole(
        "no sentences", GOOD + CLASSIFIER, "`classifier` needs records with a label", "set `data.format: sentences`"
    ),
    whole("three fields", SENTENCES.replace("two]", "two, three]") + CLASSIFIER, "name one field or two"),
    whole("no field", SENTENCES.replace("[one, two]", "[]") + CLASSIFIER, "name one field or two"),
    whole("one field twice", SENTENCES.replace("two]", "one]") + CLASSIFIER, "name different fields"),
    whole("fields of text", GOOD + "  text_fields: [one]", "`text_fields` is ['one']", "`format` is instruction"),
    whole("no label", SENTENCES + CLASSIFIER.replace("2", "0"), "`classifier.labels` is 0", "at least 1"),
    whole("numbers by F1", SENTENCES + "classifier: {labels: 1, metric: f1}", "numbers (`labels` is 1)", "pearson"),
    whole("classes by rank", SENTENCES + "classifier: {labels: 3, metric: spearman}", "3 classes", "matthews"),
    whole("metric", SENTENCES + "classifier: {labels: 3, metric: mcc}", "`classifier.metric`", "'matthews'"),
    whole("best text", GOOD + "training: {best_by: metric}", "`training.best_by` is metric", "leave it out"),
    whole(
        "packed", SENTENCES + CLASSIFIER + "training: {packing: true}", "`training.packing` is true", "leave it out"
    ),
    whole(
        "sharded head",
        SENTENCES + CLASSIFIER + "parallel: {backbone: zero3}",
        "`parallel.backbone` is zero3",
        "fsdp2",
    ),
    whole("no name", SENTENCES + "classifier: {}\ntasks: {'': {labels: 2}}", '`tasks.` is ""; it must match'),
    whole("name in a key", SENTENCES + "classifier: {}\ntasks: {a b: {labels: 2}}", '`tasks.a b` is "a b"; it must'),
    whole("tasks", SENTENCES + CLASSIFIER + "evaluation: {tasks: [boolq]}", "`evaluation.tasks`", "leave it out"),
    whole("prompts", SENTENCES + "  train_on_inputs: true\n" + CLASSIFIER, "`train_on_inputs` is true"),
]
WRONG_TYPES = [
    case("text for int", "training: {epochs: two}", '`training.epochs` is "two"; give a whole number', "Passes over"),
    case("bool for int", "training: {epochs: true}", "`training.epochs` is true; give a whole number"),
    case("bool for seed", "seed: no", "`seed` is false; give a whole number"),
    case("quoted number", 'training: {epochs: "2"}', '`training.epochs` is "2"; give a whole number'),
    case("float for int", "training: {epochs: 2.5}", "`training.epochs` is 2.5; give a whole number"),
    case("null for int", "training: {epochs: null}", "`training.epochs` is null; give a whole number"),
    case("text for float", "adapter: {alpha: big}", '`adapter.alpha` is "big"; give a number'),
    case("bool for float", "adapter: {alpha: true}", "`adapter.alpha` is true; give a number"),
    case(
        "int for bool", "adapter: {allow_nonzero_start: 1}", "`adapter.allow_nonzero_start` is 1; give true or false"
    ),
    case("list for text", "evaluation: {data: [a]}", '`evaluation.data` is ["a"]; give text'),
    case("text for list", "evaluation: {tasks: boolq}", '`evaluation.tasks` is "boolq"; give a list'),
    case("list of numbers", "adapter: {target_modules: [1]}", "`adapter.target_modules.0` is 1; give text"),
    case("number for a union", "adapter: {target_modules: 5}", "`adapter.target_modules` is 5; give a list or text"),
    case("text for a union", "adapter: {rank: x}", '`adapter.rank` is "x"; give a whole number or a list'),
    case("text in a rank list", "adapter: {rank: [4, x, 4]}", '`adapter.rank.1` is "x"; give a whole number'),
    case("choice", "training: {schedule: linaer}", "`training.schedule`", "give 'linear', 'cosine' or 'constant'"),
    case("int or choice", "training: {eval_every: x}", "give a whole number or 'epoch' or 'never'"),
    case("null section", "training: null", "`training` is null; give keys and values"),
    case("empty section", "training:", "`training` is null; give keys and values"),
    case("list for a section", "training: [1]", "`training` is [1]; give keys and values"),
    case("text for a section", "adapter: lora", '`adapter` is "lora"; give keys and values'),
    whole(
        "text for sources", GOOD.replace("[{path: train.json}]", "t.json"), '`data.train` is "t.json"; give a list'
    ),
    whole("text for a source", GOOD.replace("{path: train.json}", "t.json"), '`data.train.0` is "t.json"; give keys'),
    whole("number for text", GOOD.replace("out\n", "5\n"), "`output_dir` is 5; give text"),
    case("date", "seed: 2026-01-01", '`seed` is "2026-01-01"; give a whole number'),
    case("octal of YAML 1.1", "training: {epochs: 010}", '`training.epochs` is "010"; give a whole number'),
    case("sexagesimal of YAML 1.1", "training: {epochs: 1:30}", '`training.epochs` is "1:30"; give a whole number'),
    case("long text", f"seed: {'x' * 5000}", '`seed` is "xxx', "xxx...; give a whole number"),
]
OUT_OF_RANGE = [
    case("zero epochs", "training: {epochs: 0}", "`training.epochs` is 0; it must be at least 1"),
    case("zero rate", "training: {learning_rate: 0}", "`training.learning_rate` is 0; it must be greater than 0"),
    case("all warm-up", "training: {warmup_ratio: 1.0}", "`training.warmup_ratio` is 1.0; it must be less than 1"),
    case("negative seed", "seed: -1", "`seed` is -1; it must be at least 0"),
    case("one checkpoint", "training: {keep_checkpoints: 1}", "`training.keep_checkpoints` is 1", "at least 2"),
    case("rank 0", "adapter: {rank: 0}", "in `adapter`: `rank` is 0; ranks must be at least 1"),
    case("beta 1", "training: {betas: [0.9, 1.0]}", "in `training`: `betas`", "both must be in [0, 1)"),
    case("one beta", "training: {betas: [0.9]}", "`training.betas` has too few entries"),
    case("three layers", "adapter: {layers: [1, 2, 3]}", "`adapter.layers` is [1, 2, 3]; it must have 2 entries"),
    case("nan", "training: {learning_rate: .nan}", "`training.learning_rate` is NaN; it must be a finite number"),
    case("inf", "adapter: {alpha: .inf}", "`adapter.alpha` is Infinity; it must be a finite number"),
    case("overflow", "adapter: {alpha: 1e999}", "`adapter.alpha` is Infinity; it must be a finite number"),
    case("31 digits", f"seed: 1{'0' * 30}", "`seed` is 1000000", "whole numbers must be below 2**63"),
    case("5001 digits", f"seed: 1{'0' * 5000}", "line 5", "a whole number of 5001 digits"),
    whole("empty path", GOOD.replace("path: model", "path: ''"), '`backbone.path` is ""; it must not be empty'),
    whole("no sources", GOOD.replace("[{path: train.json}]", "[]"), "`data.train` is []; it must not be empty"),
    whole("half a character", GOOD.replace("model", r'"\ud800"'), "`backbone.path`", "half of a surrogate pair"),
]
CONTRADICTIONS = [
    whole("no backbone", "output_dir: out\n", "key `backbone` is missing (The frozen model", "key `data` is missing"),
    whole("no path", GOOD.replace("path: train", "split: train"), "key `data.train.0.path` is missing"),
    case("best of nothing", "training: {keep: best}", "`training.keep: best`", "set `data.validation_size`"),
    case("never evaluated", "training: {keep: best, eval_every: never}", "in `training`", "set `eval_every: epoch`"),
    case("stop at nothing", "training: {early_stopping_patience: 2}", "`training.early_stopping_patience`"),
    case("step 0", "training: {save_every: 0}", "`save_every` is 0; give a positive number"),
    case("ranks", "adapter: {rank: [4, 4]}", "2 entries but metatt_4d has 3 inner bonds; give 3 ranks"),
    case("ranks 5d", "adapter: {kind: metatt_5d, rank: [4, 4, 4]}", "metatt_5d has 4 inner bonds"),
    case("init", "adapter: {init: ze-no-id}", "`init` is 'ze-no-id'", "for example ze-no-no-id"),
    case("dead start", "adapter: {init: ze-id-ze-id}", "with 2 cores at zero", "leave one `ze`"),
    case("backward layers", "adapter: {layers: [3, 1]}", "`layers` must be [first, last)"),
    case("no targets", "adapter: {target_modules: []}", "`target_modules` is empty"),
    whole("two validations", GOOD + "  validation_size: 3\n  validation: [{path: v.json}]\n", "exclude each other"),
]
NOT_YAML = [
    case("duplicate", "seed: 1\nseed: 2", "line 6", "key `seed` appears twice; keep one of them"),
    case("duplicate below", "training: {epochs: 1, epochs: 2}", "line 5", "key `epochs` appears twice"),
    case("tab", "training:\n\tepochs: 1", "line 6", "indent with spaces, not tabs"),
    case("indentation", "training:\n  epochs: 1\n    seed: 1", "line 7", "check the indentation"),
    case("colon", "evaluation: {data: a}: b", "line 5", "not valid YAML"),
    case("unclosed bracket", "training: {epochs: 1", "not valid YAML", "expected ',' or '}'"),
    case("unclosed quote", "seed: 'x", "not valid YAML", "unexpected end of stream"),
    case("reserved character", "seed: @x", "line 5", "put text that begins so in quotes"),
    case("two documents", "---\nseed: 1", "line 5", "found another document"),
    case("number as key", "5: 1", "line 5", "key 5 is not text"),
    case("null as key", "~: 1", "line 5", "key null is not text"),
    case("switch as key", "on: 1", "line 5", "key true is not text; put it in quotes"),
    case("list as key", "? [a]\n: 1", "line 5", 'key ["a"] is not text'),
    case(
        "command", "seed: !!python/object/apply:os.system ['false']", "line 5", "tag !!python/object/apply:os.system"
    ),
    case("module", "seed: !!python/module:os ''", "tag !!python/module:os is not supported"),
    case("bytes", "seed: !!binary aGk=", "tag !!binary is not supported"),
    case("set", "seed: !!set {a}", "tag !!set is not supported"),
    case("bad tagged number", "seed: !!int ''", "tag !!int is not supported"),
    case("tagged section", "training: !!map [1]", "tag !!map is not supported"),
    case("billion laughs", LAUGHS, "line 6", "alias *a0 is not supported; write the value out"),
    case("list of itself", "seed: &s [*s]", "line 5", "alias *s is not supported"),
    case("deep nesting", f"seed: {'[' * 20_000}{']' * 20_000}", "nested too deeply"),
    case("control character", "seed: \x00", "special characters are not allowed"),
    whole("empty", "", "the file is empty; a recipe is a mapping"),
    whole("comment", "# nothing else\n", "the file is empty"),
    whole("list", "- backbone\n", "the file is a list; a recipe is a mapping"),
    whole("text", "hello\n", "the file is text"),
    whole("number", "5\n", "the file is a number"),
    whole("binary", bytes(range(256)), "is not UTF-8 text (byte 128)"),
    whole("utf-16", GOOD.encode("utf-16"), "is not UTF-8 text"),
    whole("long", b"# x\n" * 300_000, "longer than 1 MiB"),
]
OVERRIDES = [
    override("training.packing=maybe", "`training.packing` is \"maybe\"; give 'auto', true or false (Put"),
    override("training.max_steps", "override 'training.max_steps': expected dotted.key=value"),
    override("=5", "override '=5': expected dotted.key=value"),
    override("training..epochs=5", "override 'training..epochs=5': expected dotted.key=value"),
    override("--epochs", "override '--epochs': expected dotted.key=value"),
    override("training.epochz=1", "'training.epochz=1'", "unknown key `training.epochz`", "`training.epochs`?"),
    override("training.epochs=two", "'training.epochs=two'", '`training.epochs` is "two"; give a whole number'),
    override("training=null", "'training=null'", "`training` is null; give keys and values"),
    override("training.epochs=1", "override 'training.epochs=1': `training` is null", text="training: null"),
    override("backbone.path.x=1", "override 'backbone.path.x=1': `backbone.path` is \"model\", not a section"),
    override("data.train.0.path=x", "`data.train` is [", "give the whole list, for example 'data.train=[...]'"),
    override("data.train=t.json", "'data.train=t.json'", '`data.train` is "t.json"; give a list'),
    override("adapter.rank=[1,", "override 'adapter.rank=[1,', line 1: not valid YAML"),
    override("seed=!!python/name:os.system", "override 'seed=!!python/name:os.system'", "is not supported"),
    override("seed=*a", "override 'seed=*a'", "alias *a is not supported"),
    override("seed=nan", '`seed` is "nan"; give a whole number'),
    override("adapter.alpha=.inf", "`adapter.alpha` is Infinity; it must be a finite number"),
    override("seed=" + "[" * 20_000, "override 'seed=[[[", "...'", "nested too deeply"),
]
CASES = [*UNKNOWN_KEYS, *CLASSIFIERS, *WRONG_TYPES, *OUT_OF_RANGE, *CONTRADICTIONS, *NOT_YAML, *OVERRIDES]


def message_of(path: Path, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert caught.value.__context__ is None or caught.value.__suppress_context__  # no "during handling of the above"
    return str(caught.value)


def assert_readable(message: str) -> None:
    assert not [word for word in JARGON if word in message]
    assert "http" not in message and len(message) < 1000
    assert all(line.isprintable() for line in message.splitlines())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_readable_message(case: Case, tmp_path: Path):
    path = tmp_path / "wrong.yaml"
    case.write(path)
    message = message_of(path, case.overrides)
    assert message.startswith((str(path), "override "))
    for part in case.says:
        assert part in message
    assert_readable(message.replace(str(path), "wrong.yaml"))


def test_the_recipe_the_cases_are_made_from_is_good(tmp_path: Path):
    path = tmp_path / "good.yaml"
    for encoded in (GOOD.encode(), GOOD.replace("\n", "\r\n").encode(), GOOD.encode("utf-8-sig")):
        path.write_bytes(encoded)
        assert load_recipe(path).backbone.path == "model"


def test_missing_file_names_its_neighbours(tmp_path: Path):
    (tmp_path / "other.yaml").write_text(GOOD)
    message = message_of(tmp_path / "absent.yaml")
    assert message == f"{tmp_path / 'absent.yaml'}: no such recipe. The folder holds: other.yaml."
    assert message_of(tmp_path / "no" / "absent.yaml").endswith("absent.yaml: no such recipe.")


def test_folder_and_impossible_name(tmp_path: Path):
    assert message_of(tmp_path) == f"{tmp_path}: is a folder; give the path of a recipe file"
    assert "too long" in message_of(tmp_path / ("x" * 300))
    (tmp_path / "file").write_text(GOOD)
    assert "cannot be read (" in message_of(tmp_path / "file" / "recipe.yaml")


def test_every_wrong_key_is_named_at_once_but_not_forty(tmp_path: Path):
    path = tmp_path / "wrong.yaml"
    path.write_text(GOOD + "seed: x\ntraining: {epochs: 0, batch: 3}\n")
    assert [line.split("`")[1] for line in message_of(path).splitlines()] == [
        "seed",
        "training.epochs",
        "training.batch",
    ]
    path.write_text(GOOD + "".join(f"unknown{i}: 1\n" for i in range(40)))
    lines = message_of(path).splitlines()
    assert len(lines) == 11 and lines[-1] == "and 30 more problems"


def test_message_names_all_overrides(tmp_path: Path):
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    message = message_of(path, ("seed=1", "training.epoch=3"))
    assert message.startswith(f"{path} with 'seed=1' 'training.epoch=3': unknown key `training.epoch`")


def test_tags_run_nothing(tmp_path: Path):
    path, witness = tmp_path / "wrong.yaml", tmp_path / "witness"
    path.write_text(GOOD + f"seed: !!python/object/apply:os.system ['touch {witness}']\n")
    message_of(path)
    message_of(path, (f"seed=!!python/object/apply:os.system ['touch {witness}']",))
    assert not witness.exists()


def test_a_wrong_recipe_is_refused_before_torch_is_imported(tmp_path: Path):
    path = tmp_path / "wrong.yaml"
    path.write_text(GOOD + "epochs: 3\n")
    code = (
        "import sys\n"
        "from metatt_scale.recipe import RecipeError, load_recipe\n"
        "try:\n    load_recipe(sys.argv[1])\n"
        "except RecipeError as error:\n    print(error)\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{path}: unknown key `epochs`") and not done.stderr
