"""The benchmark tables of training, and what their numbers are made of. No test asserts seconds."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from metatt_scale.backbone import byte_tokenizer
from metatt_scale.benchmark import sweep as benchmark_sweep
from metatt_scale.benchmark.arithmetic import Size
from metatt_scale.benchmark.arms import LORA_RANKS
from metatt_scale.benchmark.end_to_end import adjusted
from metatt_scale.benchmark.settings import Settings
from metatt_scale.benchmark.sweep import truncate_dense, truncate_product
from metatt_scale.benchmark.trainers import Job, as_dataset, has_trl, micro_batch, pad_right
from metatt_scale.benchmark.wire import Traffic
from metatt_scale.data import IGNORE, prepare
from metatt_scale.tensor import Swept
from tests.benchmark import PEFT_WARNINGS, TRAINED, run
from tests.distributed.jobs import ROOT, finish, torchrun
from tests.toy import CPU, toy_recipe

pytestmark = PEFT_WARNINGS


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


# ---- end to end


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


# ---- sweeps, scaling, the wire


def test_table_of_sweeps(recipe_file):
    report = run(recipe_file, "--table", "sweep", "--repeats", "2", "--ranks", "4,8")
    kinds = ("MetaTT-4D r={}", "LoRA r={}, QR first", "LoRA r={}, dense SVD")
    assert [row["arm"] for row in report["rows"]] == [kind.format(rank) for rank in (4, 8) for kind in kinds]
    assert report["settings"]["sizes"] == [32, 3, 2, 32]
    dense = report["rows"][2]
    # Three layers: q_proj is 32 -> 32, v_proj half as wide.
    measured = dense["measured_seconds"]
    assert dense["seconds"] == [pytest.approx(3 * sum(measured.values()))] and list(measured) == [
        "32 -> 32",
        "32 -> 16",
    ]
    assert "length" not in report["settings"] and report["settings"]["ranks"] == [4, 8]


def test_a_chain_is_rounded_where_training_rounds_it(monkeypatch):
    """On the CPU in float64: GPUs are slow at that, and cores that lie on one travel there and back."""
    seen = []
    monkeypatch.setattr(
        benchmark_sweep, "sweep", lambda cores, **rule: seen.append(cores) or Swept(cores=cores, cuts=())
    )
    with FakeTensorMode():
        cores = [torch.empty(shape, device="cuda") for shape in ((1, 32, 4), (4, 3, 4), (4, 32, 1))]
        result = benchmark_sweep._sweep(cores, 2)()
    assert {(core.device.type, core.dtype) for core in seen[0]} == {("cpu", torch.float64)}
    assert {(core.device.type, core.dtype) for core in result} == {("cuda", torch.float32)}


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


@pytest.mark.slow
def test_table_of_the_wire_between_two_ranks(recipe_file, tmp_path):
    out = tmp_path / "wire.json"
    options = ("--table", "wire", "--repeats", "2", "--ranks", "4", "--json", str(out))
    finish(torchrun(ROOT / "launch" / "benchmark.py", recipe_file, *options), tmp_path / "log")
    rows = {row["arm"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["MetaTT-4D r=4", *(f"LoRA r={rank}" for rank in LORA_RANKS)]
    assert rows["LoRA r=8"]["bytes"] == rows["LoRA r=8"]["sent_bytes"] == 4 * TRAINED["LoRA r=8"]
    assert all(len(row["seconds"]) == 2 for row in rows.values())
