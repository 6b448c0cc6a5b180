"""The benchmark tables: arms train what they say, on untouched weights, in turns. No test asserts seconds."""

import hashlib
import json
import math
import os
import sys
import tempfile

import pytest
import torch

from metatt_scale.adapter import AdaptedLinear
from metatt_scale.backbone import byte_tokenizer, load_backbone
from metatt_scale.benchmark import generation
from metatt_scale.benchmark.arithmetic import Size
from metatt_scale.benchmark.arms import LORA_RANKS, Work, builders, random_batch, twin
from metatt_scale.benchmark.end_to_end import adjusted
from metatt_scale.benchmark.memory import held_bytes, peak_bytes
from metatt_scale.benchmark.report import describe_backbone
from metatt_scale.benchmark.settings import Settings
from metatt_scale.benchmark.sweep import truncate_dense, truncate_product
from metatt_scale.benchmark.timing import ratios, take_turns, turns
from metatt_scale.benchmark.trainers import Job, as_dataset, has_trl, micro_batch, pad_right
from metatt_scale.benchmark.turns import LoopInTurns
from metatt_scale.benchmark.wire import Traffic
from metatt_scale.cli import main
from metatt_scale.data import IGNORE, prepare
from metatt_scale.recipe import dump_recipe
from tests.distributed.jobs import ROOT, finish, torchrun
from tests.toy import CPU, GPT2, LLAMA, toy_recipe, write_toy

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # PEFT asks for it
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.distributed"),
]
# Rank 4 on q (32 -> 32) and v (32 -> 16) of three layers; 5D: heads of width 8, so 4 of them.
TRAINED = {
    "frozen": 0,
    "MetaTT-4D r=4": 2 * 32 * 4 + (3 + 2) * 4**2,
    "MetaTT-5D r=4": (32 + 8) * 4 + (3 + 2 + 4) * 4**2,
    "MetaTT-(4+1)D r=4": 2 * 32 * 4 + (3 + 3 + 2) * 4**2,  # three tasks, mixed in every batch
    **{f"LoRA r={rank}": rank * (64 + 48) * 3 for rank in LORA_RANKS},
    "VeRA r=256": (2 * 256 + 32 + 16) * 3,
}
BACKBONES = [{}, {"dtype": "bfloat16", "quantization": "nf4"}, {"dtype": "bfloat16", "quantization": "int8"}]


GENERATION = ("--table", "generation", "--examples", "3", "--length", "6", "--new-tokens", "5", "--repeats", "2")


@pytest.fixture
def recipe_file(tmp_path):
    write_toy(tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(toy_recipe(tmp_path)))
    return file


def run(recipe_file, *arguments):
    """The JSON that a command leaves."""
    out = recipe_file.with_name("out.json")
    assert main(["benchmark", str(recipe_file), *arguments, "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    for row in report["rows"]:
        assert row["seconds"] and all(math.isfinite(s) and s > 0 for s in row["seconds"])
    assert {"torch", "transformers", "peft", "bitsandbytes", "device", "threads"} <= report["machine"].keys()
    return report


def state_of(model):
    """Everything of a model that another arm could have changed."""
    digest = hashlib.sha256()
    for tensor in [*model.parameters(), *model.buffers()]:
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    return digest.hexdigest(), repr(model), hooks, model.config.to_dict()


# ---- fair turns


def test_turns_are_taken_round_by_round():
    once = ["A", "B", "C"]
    assert [name for _, name in turns(once, 2)] == once * 4
    assert [number for number, _ in turns(once, 2)] == [-2] * 3 + [-1] * 3 + [0] * 3 + [1] * 3
    calls = []
    acts = {name: lambda name=name: calls.append(name) for name in once}
    seconds = take_turns(acts, 3, CPU, lambda text: None)
    assert calls == once * 5 and {name: len(s) for name, s in seconds.items()} == {"A": 3, "B": 3, "C": 3}


def test_ratios_are_taken_pair_by_pair():
    assert ratios((1.1, 2.6, 4.8), (1.0, 2.0, 4.0)) == pytest.approx((1.2, 1.1, 1.3))


def loop_that_logs(ready, pause, name, pauses, log):
    ready(name)
    for i in range(pauses):
        with open(log, "a") as file:
            file.write(f"{name}{i} ")
        if pause():
            break
    return pauses


def loop_that_fails(ready, pause):
    ready(None)
    pause()
    raise ValueError("told")


def loop_that_dies(ready, pause):
    ready(None)
    os._exit(3)


def test_loops_in_processes_take_turns(tmp_path):
    log = tmp_path / "log"
    a, b = (LoopInTurns(loop_that_logs, name, 9, str(log)) for name in "ab")
    assert (a.facts, b.facts) == ("a", "b") and not log.exists()
    for _ in range(2):
        a.advance()
        b.advance()
    assert (a.close(), b.close()) == (9, 9)
    assert log.read_text().split() == ["a0", "b0", "a1", "b1"]


def test_a_loop_that_fails_says_why():
    broken = LoopInTurns(loop_that_fails)
    broken.advance()
    with pytest.raises(ValueError, match="told"):
        broken.advance()
    with pytest.raises(ValueError, match="ended with code 3"):
        LoopInTurns(loop_that_dies).advance()


# ---- memory


def test_the_peak_is_counted_to_the_byte():
    def bytes_of(size):
        return torch.empty(size, dtype=torch.uint8)

    before = bytes_of(10_000)

    def act():
        a, b = bytes_of(1000), bytes_of(500)
        del a
        c = bytes_of(700)  # 1200 now, 1500 was the most
        view, d = c[:100], before.add_(1)  # no memory of their own
        return b, view, d

    assert peak_bytes(act, CPU) == 1500
    x = torch.ones(100, 50, requires_grad=True)
    # x + x, and in the backward pass the gradient it adds up for x; both 20,000 bytes, the scalars beside them small.
    assert 20_000 <= peak_bytes(lambda: (x + x).sum().backward(), CPU) <= 40_100
    assert x.grad is not None and held_bytes([x, x[:1], x.view(-1), x.grad]) == 40_000


# ---- arms


def make_arms(tmp_path, **backbone):
    write_toy(tmp_path, config={**LLAMA, "hidden_size": 64, "intermediate_size": 128} if backbone else LLAMA)
    recipe = toy_recipe(tmp_path, backbone=backbone)
    model = load_backbone(recipe.backbone, CPU, recipe.seed).train()
    work = Work(recipe=recipe, batch=random_batch(model, 2, 16), device=CPU)
    return model, work, builders(recipe, (4,))


def parameters_of(model):
    """What an arm trains, found in its module tree."""
    adapters = {id(m.adapter): m.adapter for m in model.modules() if isinstance(m, AdaptedLinear)}
    chains = [core for adapter in adapters.values() for core in adapter.cores]
    return chains + [p for p in model.parameters() if p.requires_grad]


def test_arms_train_what_they_claim(tmp_path):
    model, work, arms = make_arms(tmp_path)
    assert list(arms) == list(TRAINED)
    for name, build in arms.items():
        own = twin(model)
        arm = build(name, own, work)
        trained, reached = parameters_of(own), []
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(lambda p, reached=reached: reached.append(p.numel()))
        arm.step()
        assert arm.trained == sum(p.numel() for p in trained) == sum(reached) == TRAINED[name], name
        assert all(p.grad is None or not p.grad.any() for p in trained), f"{name} leaves a gradient behind"
        assert arm.own_bytes >= 4 * arm.trained


@pytest.mark.parametrize("backbone", BACKBONES, ids=["float32", "nf4", "int8"])
def test_no_arm_touches_the_backbone(tmp_path, backbone):
    model, work, arms = make_arms(tmp_path, **backbone)
    before = state_of(model)
    storages = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    for name, build in arms.items():
        own = twin(model)
        assert {tensor.untyped_storage().data_ptr() for tensor in own.parameters()} == storages
        arm = build(name, own, work)
        arm.step()
        arm.step()
        assert state_of(model) == before, name
    assert ("LoRA r=8 in bfloat16" in arms) == bool(backbone)


def test_a_narrow_adapter_is_one_of_its_own_type(tmp_path):
    model, work, arms = make_arms(tmp_path, dtype="bfloat16")
    dtypes = {}
    for name in ("LoRA r=8", "LoRA r=8 in bfloat16"):
        own = twin(model)
        arms[name](name, own, work)
        dtypes[name] = {p.dtype for p in parameters_of(own)}
    assert dtypes == {"LoRA r=8": {torch.float32}, "LoRA r=8 in bfloat16": {torch.bfloat16}}


# ---- tables


def test_table_of_steps(recipe_file, capsys):
    sizes = ("--examples", "2", "--length", "16", "--repeats", "2", "--ranks", "4")
    report = run(recipe_file, *sizes)
    text = capsys.readouterr()
    assert "/ frozen" in text.out and "out.json" in text.out and text.err == ""
    assert {row["arm"]: row["trained"] for row in report["rows"]} == TRAINED
    assert all(len(row["seconds"]) == 2 and row["peak_bytes"] > 0 for row in report["rows"])
    floor = report["rows"][0]
    assert floor["time_ratio"] == {"median": 1, "smallest": 1, "largest": 1} and floor["bytes_over_frozen"] == 0
    assert report["settings"]["recipe"]["adapter"]["target_modules"] == ["q_proj", "v_proj"]

    checkpointed = run(
        recipe_file, "backbone.gradient_checkpointing=true", "adapter.target_modules=[o_proj,k_proj]", *sizes
    )
    trained = {row["arm"]: row["trained"] for row in checkpointed["rows"]}
    assert trained["LoRA r=8"] == 8 * (64 + 48) * 3
    assert checkpointed["settings"]["recipe"]["adapter"]["target_modules"] == ["o_proj", "k_proj"]
    assert checkpointed["rows"][0]["peak_bytes"] < floor["peak_bytes"]


def test_table_end_to_end(recipe_file):
    report = run(recipe_file, "--table", "end_to_end", "--repeats", "2", "--block-steps", "4")
    names = ["metatt_4d r=4, metatt-scale", "LoRA r=8, transformers Trainer"]
    assert [row["arm"] for row in report["rows"]] == names + ["LoRA r=8, TRL packing"] * has_trl()
    ours, trainer = report["rows"][:2]
    # 64 records in batches of 16: each turn is an epoch, in whatever order.
    assert (ours["trained"], trainer["trained"]) == (TRAINED["MetaTT-4D r=4"], TRAINED["LoRA r=8"])
    assert ours["tokens"] == trainer["tokens"] and len(set(ours["tokens"])) == 1 and len(ours["seconds"]) == 2
    assert report["settings"]["recipe"]["data"]["train_on_inputs"] is False


def test_nothing_but_steps_is_measured_end_to_end(tmp_path):
    recipe = toy_recipe(
        tmp_path,
        sweep={"unit": "step", "schedule": [{"after": 2, "rank": 2}]},
        training={"eval_every": 1, "save_every": 1, "early_stopping_patience": 1, "keep": "best"},
    )
    measured = adjusted(recipe, Settings(repeats=3, block_steps=4))
    training = measured.training
    assert (training.eval_every, training.save_every, training.early_stopping_patience) == ("never", "never", None)
    assert measured.sweep is None and training.max_steps == 4 * (1 + 3) and measured.adapter == recipe.adapter


def test_both_sides_see_the_same_records(tmp_path):
    recipe = toy_recipe(tmp_path)
    data = prepare(recipe.data, byte_tokenizer(), recipe.seed)
    job = Job(
        recipe=recipe, data=data, tokenizer=byte_tokenizer(), device=CPU, block_steps=1, folder=tmp_path / "scratch"
    )
    dataset = as_dataset(job)
    order = data.train.epoch_order(recipe.seed, 0)
    assert len(dataset) == len(order) == 64
    for row, index in zip(dataset, order, strict=True):
        tokens, flags = data.table.example(int(index))
        assert row["input_ids"] == tokens.tolist() and row["length"] == len(tokens)
        assert row["labels"] == [t if flag else IGNORE for t, flag in zip(tokens.tolist(), flags, strict=True)]
    batch = pad_right([dataset[0], dataset[1]], 7)
    lengths = [dataset[i]["length"] for i in (0, 1)]
    assert batch["attention_mask"].sum(1).tolist() == lengths and batch["input_ids"].shape == (2, max(lengths))
    assert batch["labels"][0, : lengths[0]].tolist() == dataset[0]["labels"]
    padding = batch["attention_mask"] == 0
    assert bool((batch["labels"][padding] == IGNORE).all()) and bool((batch["input_ids"][padding] == 7).all())


@pytest.mark.parametrize("batch, largest, expected", [(32, 8, 8), (32, 64, 32), (30, 8, 6), (7, 4, 1)])
def test_every_step_of_a_foreign_trainer_has_the_whole_batch(batch, largest, expected):
    assert micro_batch(batch, largest) == expected


def test_table_of_sweeps(recipe_file):
    report = run(recipe_file, "--table", "sweep", "--repeats", "2", "--ranks", "4,8")
    kinds = ("MetaTT-4D r={}", "LoRA r={}, QR first", "LoRA r={}, dense SVD")
    assert [row["arm"] for row in report["rows"]] == [kind.format(rank) for rank in (4, 8) for kind in kinds]
    assert report["settings"]["sizes"] == [32, 3, 2, 32]
    dense = report["rows"][2]
    assert dense["seconds"] == [pytest.approx(sum(dense["measured_seconds"]) * 6 / 2)]


def test_both_truncations_are_the_best():
    generator = torch.Generator().manual_seed(0)
    b, a = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((20, 6), (6, 30)))
    thin, dense = (left @ right for left, right in (truncate_product(b, a, 3), truncate_dense(b @ a, 3)))
    torch.testing.assert_close(thin, dense, rtol=1e-12, atol=1e-12)
    assert int(torch.linalg.matrix_rank(thin)) == 3


def test_table_of_scaling(recipe_file):
    report = run(recipe_file, "--table", "scaling", "--examples", "2", "--length", "8", "--repeats", "2")
    rows = {row["arm"]: row for row in report["rows"]}
    assert list(rows) == ["base", "2 L", "2 M", "2 r", "2 D"]
    assert [rows["base"][letter] for letter in ("L", "M", "r", "D", "rows")] == [3, 2, 4, 32, 16]
    assert [rows[f"2 {letter}"][letter] for letter in ("L", "M", "r", "D")] == [6, 4, 8, 64]
    assert rows["2 L"]["predicted_ratio"] == 2


def test_operations_of_the_arithmetic():
    size = Size(L=2, M=3, r=4, D=10, rows=100)
    assert size.flops(False) == 2 * 2 * (3 * 100 * 10 * 4 + 3 * (100 * (4 * 16 + 3 * 40) + 3 * 64))
    assert size.flops(True) == 2 * 2 * (3 * 100 * 10 * 4 + 3 * (3 * 100 * 40 + 3 * 16 * 10 + 3 * 64))


def test_lora_travels_in_buckets():
    assert Traffic(name="MetaTT-4D r=8", values=10**7).sizes == [10**7]
    full = 25 * 2**20 // 4
    assert Traffic(name="LoRA r=8", values=2 * full + 5).sizes == [full, full, 5]
    assert Traffic(name="LoRA r=8", values=full).sizes == [full]


def test_table_of_generation(recipe_file, capsys, monkeypatch):
    calls = []
    real = generation.continue_greedily

    def count(model, prompts_BS, new_tokens):
        tokens_BN = real(model, prompts_BS, new_tokens)
        calls.append((model.training, tuple(prompts_BS.shape), tuple(tokens_BN.shape)))
        return tokens_BN

    monkeypatch.setattr(generation, "continue_greedily", count)
    report = run(recipe_file, *GENERATION, "--ranks", "4,64")
    text = capsys.readouterr()
    assert "/ base" in text.out and "merging dequantises" not in text.out and text.err == ""
    rows = {row["arm"]: row for row in report["rows"]}
    chains = [f"MetaTT-4D r={rank}, {form}" for rank in (4, 64) for form in ("merged", "unmerged")]
    assert list(rows) == ["base", *chains, "LoRA r=8, unmerged"]
    # Folded at rank 4; at 64 the products of this narrow model would take more than their part of the memory.
    assert [rows[name]["order"] for name in chains] == ["merged", "folded", "merged", "thin"]
    assert calls == [(False, (3, 6), (3, 5))] * 6 * (2 + 2)
    for row in rows.values():
        assert (
            row["tokens_per_second"] == [pytest.approx(15 / s) for s in row["seconds"]] and len(row["seconds"]) == 2
        )
    assert rows["base"]["rate_ratio"] == {"median": 1, "smallest": 1, "largest": 1}
    assert all(rows[name]["same_tokens"] and rows[name]["prompts_as_base"] < 3 for name in chains)
    assert {rows[name]["same_tokens"] for name in ("base", "LoRA r=8, unmerged")} == {None}


@pytest.mark.parametrize("backbone", BACKBONES[1:], ids=["nf4", "int8"])
def test_generation_says_what_merging_does_to_packed_weights(tmp_path, recipe_file, backbone, capsys):
    write_toy(tmp_path, config={**LLAMA, "hidden_size": 64, "intermediate_size": 128})
    recipe_file.write_text(dump_recipe(toy_recipe(tmp_path, backbone={**backbone, "gradient_checkpointing": True})))
    report = run(recipe_file, *GENERATION, "--ranks", "4")
    said = f"the backbone is {backbone['quantization']}, and merging dequantises"
    assert said in capsys.readouterr().out and "no checkpointing" in report["title"]
    assert [row["arm"] for row in report["rows"]][3:] == ["LoRA r=8, unmerged", "LoRA r=8 in bfloat16, unmerged"]


def test_generation_goes_on_after_the_end_of_text(tmp_path):
    model = load_backbone(toy_recipe(tmp_path).backbone, CPU, 0)
    prompts_BS = random_batch(model, 2, 6).input_ids_BS
    first_B = generation.continue_greedily(model, prompts_BS, 4)[:, 0]
    # What the model would write first now ends a text; sampling, which a checkpoint may ask for, is not done either.
    model.generation_config.eos_token_id, model.generation_config.do_sample = first_B.tolist(), True
    tokens_BN = generation.continue_greedily(model, prompts_BS, 4)
    assert tokens_BN.shape == (2, 4) and not torch.isin(tokens_BN, first_B).any()
    assert torch.equal(tokens_BN, generation.continue_greedily(model, prompts_BS, 4))


@pytest.mark.parametrize(
    "config, says",
    [
        (GPT2, "--length 60 and --new-tokens 5 take 65 positions, but the model has 64"),
        (
            {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 300},
            "cannot generate; --table generation needs a causal model",
        ),
    ],
)
def test_generation_refuses_what_cannot_continue(tmp_path, recipe_file, config, says, capsys):
    write_toy(tmp_path, config=config)
    assert main(["benchmark", str(recipe_file), *GENERATION, "--length", "60"]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and says in output.err and output.err.count("\n") == 1


@pytest.mark.parametrize(
    "config, says",
    [
        (GPT2, "--length is 65, but GPT2LMHeadModel has learned 64 positions; set --length to 64 or less"),
        (
            {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 300},
            "is not a causal language model that this toolkit can train (an encoder needs a `classifier`)",
        ),
    ],
)
def test_steps_refuse_what_training_refuses(tmp_path, recipe_file, config, says, capsys):
    write_toy(tmp_path, config=config)
    assert main(["benchmark", str(recipe_file), "--length", "65", "--repeats", "1"]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and says in output.err and output.err.count("\n") == 1


@pytest.mark.slow
def test_table_of_the_wire_between_two_ranks(recipe_file, tmp_path):
    out = tmp_path / "wire.json"
    options = ("--table", "wire", "--repeats", "2", "--ranks", "4", "--json", str(out))
    finish(torchrun(ROOT / "launch" / "benchmark.py", recipe_file, *options), tmp_path / "log")
    rows = {row["arm"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["MetaTT-4D r=4", *(f"LoRA r={rank}" for rank in LORA_RANKS)]
    assert rows["LoRA r=8"]["bytes"] == rows["LoRA r=8"]["sent_bytes"] == 4 * TRAINED["LoRA r=8"]
    assert all(len(row["seconds"]) == 2 for row in rows.values())


# ---- what cannot be


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--repeats", "0"], "--repeats is 0; it must be at least 1"),
        (["--length", "1"], "--length is 1; it must be at least 2"),
        (["--examples", "-1"], "--examples is -1"),
        (["--table", "end_to_end", "--block-steps", "0"], "--block-steps is 0"),
        (["--table", "speed"], "invalid choice: 'speed'"),
        (["--table", "wire", "--examples", "4"], "--table wire takes --ranks, --repeats only"),
        (["--block-steps", "4"], "choose another table"),
        (["--new-tokens", "4"], "--table steps takes --examples, --length, --ranks, --repeats only"),
        (["--table", "generation", "--new-tokens", "0"], "--new-tokens is 0; it must be at least 1"),
        (["--table", "generation", "--block-steps", "4"], "--table generation takes --examples, --length, --new"),
        (["--ranks", "8,x"], "--ranks is '8,x'"),
        (["--ranks", "8,8"], "give different numbers"),
        (["--ranks", "0"], "numbers from 1 to 8192"),
        (["adapter.target_modules=[qproj]", "--json", "new/a/out.json"], "'qproj' matches no module"),
        (["backbone.compile=true"], "--table steps compiles no arm, so its numbers would be another run's; add back"),
        (["--json", "."], "--json is ., which is a folder"),
        (["--json", ""], "--json is ''; give the name of a file, for example steps.json"),
        (["--json", "recipe.yaml/out.json"], "recipe.yaml is a file and not a folder; give a file below a folder"),
        (["--json", "x" * 230], "(File name too long); give --json a file in a folder that you may write to"),
        (["--table", "wire"], "start it with torchrun"),
    ],
)
def test_bad_arguments_are_one_message(recipe_file, arguments, says, capsys, monkeypatch):
    monkeypatch.chdir(recipe_file.parent)
    before = sorted(os.listdir())
    assert main(["benchmark", str(recipe_file), *arguments]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and says in output.err and output.err.count("\n") == 1
    assert output.out == "" and sorted(os.listdir()) == before


@pytest.mark.parametrize("given", [[], ["--json", "new/out.json"]], ids=["default", "named"])
def test_a_folder_that_takes_no_file_is_refused_first(recipe_file, given, monkeypatch, capsys):
    def refuse(*arguments, **named):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    assert main(["benchmark", str(recipe_file), *given]) == 2
    said = capsys.readouterr().err
    assert ("--json is new/out.json, and" if given else "--json is not given, and") in said
    assert "(Read-only file system); give --json a file in a folder that you may write to" in said


def test_a_measured_table_is_printed_though_its_numbers_cannot_be_written(recipe_file, monkeypatch, capsys):
    def fail(path, value):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("metatt_scale.benchmark.report.write_json", fail)
    options = ("--table", "sweep", "--repeats", "1", "--ranks", "4", "--json", str(recipe_file.with_name("a.json")))
    assert main(["benchmark", str(recipe_file), *options]) == 2
    output = capsys.readouterr()
    assert "MetaTT-4D r=4" in output.out and "raw numbers" not in output.out
    assert "No space left on device" in output.err


def test_only_the_wire_is_measured_by_several_processes(recipe_file, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["benchmark", str(recipe_file)]) == 2
    assert "`benchmark --table steps` works in one" in capsys.readouterr().err


@pytest.mark.parametrize("table", ["steps", "end_to_end", "generation"])
def test_peft_is_named_where_it_is_missing_before_anything_is_loaded(recipe_file, table, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    arguments = [f"backbone.path={recipe_file.parent / 'nowhere'}", "--table", table, "--repeats", "1"]
    assert main(["benchmark", str(recipe_file), *arguments]) == 2
    assert "PEFT, which is not installed; run `pip install peft`" in capsys.readouterr().err


def test_settings_have_defaults_that_the_help_names(capsys):
    with pytest.raises(SystemExit):
        main(["benchmark", "--help"])
    text = capsys.readouterr().out
    text = " ".join(text.split())
    assert "(8,16,64); for steps, sweep, wire, generation" in text
    assert f"({Settings().block_steps}); for end_to_end" in text and "rounds that count (7) --" in text


def test_a_title_names_what_is_not_the_default(tmp_path):
    plain = toy_recipe(tmp_path)
    other = toy_recipe(tmp_path, backbone={"attention": "eager"}, adapter={"operator": "reference"})
    assert describe_backbone(plain).endswith("checkpointing")
    assert describe_backbone(other) == describe_backbone(plain) + ", attention eager, operator reference"


def test_overrides_are_not_required(capsys):
    assert main(["benchmark"]) == 2
    said = capsys.readouterr().err
    assert "required: recipe" in said and "dotted.key" not in said
