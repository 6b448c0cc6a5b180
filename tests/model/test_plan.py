"""What a plan says, through the same command a user types: the paper's counts, layouts, wire, bad input."""

import json
from pathlib import Path

import numpy as np
import pytest

import metatt_scale.plan.weights as weights_module
from metatt_scale.backbone.source import Source
from metatt_scale.cli import main
from metatt_scale.data.batches import deal
from metatt_scale.plan.layout import lay_out
from metatt_scale.recipe import load_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
ROBERTA = ("backbone.path=random:{}", "adapter.target_modules=[query,value]")
GLUE_COUNTS = [
    ("base", "4d", 8, 13_184),
    ("base", "4d", 24, 44_928),
    ("base", "4d", 64, 155_648),
    ("base", "5d", 16, 19_968),
    ("base", "5d", 64, 159_744),
    ("large", "4d", 8, 18_048),
    ("large", "4d", 16, 39_424),
    ("large", "4d", 32, 92_160),
    ("large", "5d", 32, 77_824),
]
COUNTS = [
    ("llama2_7b_commonsense", (), "metatt_4d", 16, 139_776),
    ("llama2_7b_commonsense", (), "metatt_4d", 256, 4_325_376),
    ("llama2_13b_commonsense", (), "metatt_4d", 16, 174_592),
    ("llama2_13b_commonsense", (), "metatt_4d", 64, 827_392),
    ("llama2_7b_commonsense", "roberta_base", "metatt_4d", 8, 13_184),
    ("llama2_7b_commonsense", "roberta_base", "metatt_4d", 24, 44_928),
    ("llama2_7b_commonsense", "roberta_base", "metatt_4d", 64, 155_648),
    ("llama2_7b_commonsense", "roberta_base", "metatt_5d", 16, 19_968),
    ("llama2_7b_commonsense", "roberta_base", "metatt_5d", 64, 159_744),
    ("llama2_7b_commonsense", "roberta_large", "metatt_4d", 8, 18_048),
    ("llama2_7b_commonsense", "roberta_large", "metatt_4d", 16, 39_424),
    ("llama2_7b_commonsense", "roberta_large", "metatt_4d", 32, 92_160),
    ("llama2_7b_commonsense", "roberta_large", "metatt_5d", 32, 77_824),
]


@pytest.mark.parametrize("recipe, architecture, kind, rank, count", COUNTS)
def test_counts_of_the_paper(capsys, recipe, architecture, kind, rank, count):
    overrides = [text.format(architecture) for text in ROBERTA] if architecture else []
    arguments = ["plan", str(RECIPES / f"{recipe}.yaml"), f"adapter.kind={kind}", f"adapter.rank={rank}", *overrides]
    assert main([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["trainable_parameters"] == count
    assert main(arguments) == 0  # and as text for a person
    assert f"{count:,}" in capsys.readouterr().out


@pytest.mark.parametrize("size, kind, rank, count", GLUE_COUNTS)
def test_counts_of_the_paper_on_glue_with_the_head_apart(capsys, size, kind, rank, count):
    init = "ze-id-id-id-id" if kind == "5d" else "ze-id-id-id"
    overrides = [f"adapter.kind=metatt_{kind}", f"adapter.rank={rank}", f"adapter.init={init}"]
    arguments = ["plan", str(RECIPES / f"roberta_{size}_mrpc.yaml"), *overrides]
    assert main([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    width = {"base": 768, "large": 1024}[size]
    assert plan["trainable_parameters"] == count
    assert plan["head_parameters"] == width * width + width + 2 * width + 2  # dense, then one row a class
    assert plan["backbone_parameters"] == {"base": 124_055_040, "large": 354_310_144}[size]
    assert plan["lora_parameters"]["8"] == {"base": 294_912, "large": 786_432}[size]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert f"{count:,}" in text and f"{plan['head_parameters']:,}" in text and "2 classes" in text


def test_a_pooler_belongs_to_the_head_and_a_language_model_has_none(capsys):
    assert main(["plan", str(RECIPES / "minilm_stsb.yaml"), "backbone.path=random:minilm_l6", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["head_parameters"] == 147_840 + 384 + 1 and plan["trainable_parameters"] == 6_656
    assert plan["backbone_parameters"] == 22_713_216 - 147_840
    assert plan["layout"]["answer_tokens_per_example"] == 1
    assert planned(capsys)["head_parameters"] == 0


def test_lora_beside_it(capsys):
    assert main(["plan", str(RECIPES / "llama2_7b_commonsense.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lora_parameters"] == {"8": 4_194_304, "16": 8_388_608}


QLORA = RECIPES / "llama2_7b_qlora_single_gpu.yaml"


def planned(capsys, *arguments):
    assert main(["plan", str(QLORA), *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_all_recipes_can_be_planned(capsys):
    encoders = [*RECIPES.glob("roberta*.yaml")]
    assert len(encoders) == 18
    for path in [*sorted(RECIPES.glob("llama*.yaml")), RECIPES / "qwen3_8b_commonsense.yaml", *encoders]:
        assert main(["plan", str(path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["memory"]["peak"] > 0


def test_the_single_gpu_recipe_fits_where_its_header_says(capsys):
    plan = planned(capsys, "--memory", "8")
    assert plan["memory"]["largest_micro_batch"] >= 8
    assert plan["wire"]["chain"]["sent"] == 0
    assert plan["memory"]["peak"] < 6 * 2**30


def test_shards_fall_and_the_quant_state_stays(capsys):
    memory = {ranks: planned(capsys, "--gpus-per-node", str(ranks))["memory"] for ranks in (1, 2, 4)}
    whole = memory[1]["weights"]
    for ranks in (2, 4):
        weights = memory[ranks]["weights"]
        for name in ("packed", "unquantised"):
            assert weights[name] == pytest.approx(whole[name] / ranks, rel=1e-6)
        assert weights["quant_state"] == whole["quant_state"]
        assert memory[ranks]["gathered"] >= 0


def test_wire_of_a_sharded_job(capsys):
    plan = planned(capsys, "--nodes", "2", "--gpus-per-node", "4")
    wire, count = plan["wire"], plan["trainable_parameters"]
    assert plan["layout"]["strategy"] == "fsdp2"
    assert wire["chain"] == {"all_reduces": 1, "bytes": 4 * (count + 6), "sent": 2 * 7 / 8 * 4 * (count + 6)}
    assert wire["lora_under_ddp"]["bytes"] == 4 * 4_194_304
    micro_batches = plan["layout"]["micro_batches_per_step"]
    assert wire["backbone"]["all_gathers"] == micro_batches * (2 * (32 + 2) + 1)
    assert wire["backbone"]["sent"] == pytest.approx(7 / 8 * wire["backbone"]["bytes"])


def test_what_auto_is_taken_for_is_said(capsys):
    """`train` would ask the launcher: nothing to assume where the recipe decides."""

    def said(*options):
        numbers = planned(capsys, "--nodes", "2", *options)
        assert main(["plan", str(QLORA), "--nodes", "2", *options]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert numbers["assumption"] in text if numbers["assumption"] else "auto: planned as" not in text
        return numbers["layout"]["strategy"], numbers["assumption"]

    strategy, assumed = said()
    assert strategy == "fsdp2" and "auto: planned as fsdp2 from 2 ranks on, which `accelerate launch" in assumed
    for override in ("backbone.quantization=int8", "backbone.quant_storage=uint8"):
        strategy, assumed = said(override)
        assert strategy == "replicate" and "cannot be sharded" in assumed
    assert said("parallel.backbone=fsdp2") == ("fsdp2", None)
    file = RECIPES.parent / "ds_configs" / "zero3.json"
    assert said(f"parallel.deepspeed_config={file}") == ("zero3", None)


def test_a_node_size_that_does_not_divide_the_scaling_table(capsys):
    rows = planned(capsys, "--nodes", "2", "--gpus-per-node", "6", "parallel.shard_size=node")["scaling"]
    assert [row["ranks"] for row in rows] == [2**k for k in range(11)]


def test_hybrid_sharding_gathers_within_a_node(capsys):
    plan = planned(capsys, "--nodes", "4", "--gpus-per-node", "2", "parallel.shard_size=node")
    assert plan["layout"]["ranks_per_copy"] == 2
    assert plan["wire"]["backbone"]["sent"] == pytest.approx(plan["wire"]["backbone"]["bytes"] / 2)


def test_offloading_moves_the_shards_to_the_host(capsys):
    options = ("--gpus-per-node", "2", "parallel.backbone=fsdp2", "parallel.cpu_offload=true")
    on_host, on_gpu = planned(capsys, *options), planned(capsys, *options[:3])
    moved = on_host["memory"]["weights_on_host"]
    assert moved == on_gpu["memory"]["weights"]["packed"] + on_gpu["memory"]["weights"]["unquantised"]
    assert on_host["memory"]["peak"] == on_gpu["memory"]["peak"] - moved
    assert on_host["memory"]["host_while_loading"] == on_gpu["memory"]["host_while_loading"] + moved


def test_loading_takes_two_layers_on_the_host_and_a_gguf_file_all_of_it(capsys, monkeypatch):
    two_layers = 2 * 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)  # Llama-2-7b in bf16
    for options in ([], ["--gpus-per-node", "2"], ["backbone.quantization=none"]):
        assert planned(capsys, *options)["memory"]["host_while_loading"] == two_layers
    monkeypatch.setattr(weights_module, "resolve", lambda path: Source(kind="gguf", location=path))
    whole = planned(capsys, "backbone.quantization=none")["memory"]
    assert whole["host_while_loading"] == whole["weights"]["unquantised"] + 2 * two_layers  # these in fp32


def test_a_deepspeed_file_is_read(capsys, tmp_path):
    def memory(file, *options):
        return planned(capsys, "--gpus-per-node", "4", f"parallel.deepspeed_config={file}", *options)["memory"]

    configs = RECIPES.parent / "ds_configs"
    usual = memory(configs / "zero3.json")
    plain = planned(capsys, "--gpus-per-node", "4", "parallel.backbone=zero3")["memory"]
    assert usual == plain
    sparing = tmp_path / "sparing.json"
    zero = {"stage": 3, "stage3_max_live_parameters": 1e6, "stage3_prefetch_bucket_size": 0}
    sparing.write_text(json.dumps({"zero_optimization": zero}))
    assert memory(sparing)["gathered"] < usual["gathered"] / 10
    for key, changes in [("stage3_max_reuse_distance", False), ("stage3_prefetch_bucket_size", True)]:
        sparing.write_text(json.dumps({"zero_optimization": {"stage": 3, key: 0}}))
        assert (memory(sparing)["gathered"] < usual["gathered"]) == changes, key
    layout = planned(capsys, "--gpus-per-node", "4", "parallel.backbone=zero3")["layout"]
    assert layout["values_fetched_ahead"] == 10**9
    sparing.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_param": {"device": "none"}}}))
    assert memory(sparing) == usual
    sparing.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": "big"}}))
    assert main(["plan", str(QLORA), f"parallel.deepspeed_config={sparing}"]) == 2
    assert "zero_optimization.stage3_prefetch_bucket_size is 'big'" in capsys.readouterr().err
    moved = memory(configs / "zero3_offload_cpu.json")["weights_on_host"]
    assert moved == usual["weights"]["packed"] + usual["weights"]["unquantised"]
    assert memory(configs / "zero2.json")["weights"]["packed"] == 4 * usual["weights"]["packed"]  # replicas


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3", "replicate"])
def test_scaling_runs_from_1_to_1024_ranks(capsys, strategy):
    rows = planned(capsys, f"parallel.backbone={strategy}")["scaling"]
    assert [row["ranks"] for row in rows] == [2**k for k in range(11)]
    assert all(row["step_s"] == max(row["compute_s"], row["gathers_s"]) + row["chain_s"] for row in rows)
    weights = [row["weights"] for row in rows]
    assert (weights[-1] == weights[0]) == (strategy == "replicate")
    assert rows[-1]["busy_ranks"] == 32


def test_rates_replace_those_of_the_table(capsys):
    slow = planned(capsys, "--tflops", "10", "--bandwidth-gbps", "8", "--gpus-per-node", "2")
    fast = planned(capsys, "--tflops", "20", "--bandwidth-gbps", "16", "--gpus-per-node", "2")
    assert slow["hardware"]["node_gb_per_s"] == 1.0
    assert slow["scaling"][0]["compute_s"] == pytest.approx(2 * fast["scaling"][0]["compute_s"])
    assert slow["scaling"][5]["gathers_s"] > 1.9 * fast["scaling"][5]["gathers_s"]


def test_fewer_answers_need_fewer_logits(capsys):
    part = ("data.train_on_inputs=false", "--answer-tokens", "16")
    few, many = (planned(capsys, *options)["memory"]["activations"]["logits"] for options in (part, part[:1]))
    assert few < many / 5  # what is left are hidden states


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8, 64])
@pytest.mark.parametrize("batch, micro", [(32, 8), (30, 4), (7, 8), (100, 3)])
def test_the_layout_deals_as_the_data_does(ranks, batch, micro):
    recipe = load_recipe(QLORA, [f"training.batch_size={batch}", f"training.micro_batch_size={micro}"])
    layout = lay_out(recipe, ranks, 8)
    parts = [
        deal(np.arange(batch) + 5, np.arange(batch), micro_batch_size=micro, rank=rank, world_size=ranks)
        for rank in range(ranks)
    ]
    assert {len(part) for part in parts} == {layout.micro_batches}
    assert max(len(indices) for part in parts for indices in part) == layout.work.examples


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--nodes", "0"], "--nodes is 0; it must be a number from 1 to 1,048,576"),
        (["--gpus-per-node", "-3"], "--gpus-per-node is -3; it must be a number from 1"),
        (["--memory", "nan"], "--memory is nan; it must be a number from 0.001 to 1,000,000"),
        (["--memory", "1e308"], "--memory is 1e+308; it must be a number from 0.001 to 1,000,000"),
        (["--tflops", "0"], "--tflops is 0.0; it must be a number from 0.001"),
        (["--tflops", "1e308"], "--tflops is 1e+308"),
        (["--tflops", "1e-320", "--json"], "--tflops is 1e-320"),
        (["--bandwidth-gbps", "-1"], "--bandwidth-gbps is -1.0"),
        (["--answer-tokens", "0"], "--answer-tokens is 0"),
        (["--answer-tokens", "9", "data.train_on_inputs=true"], "set data.train_on_inputs: false"),
        (["--hardware", "abacus"], "--hardware is abacus; known are h100-sxm"),
        (["--nodes", "2000000"], "--nodes is 2000000; it must be a number from 1 to 1,048,576"),
        (["--nodes", "1048576"], "1048576 x 8 = 8,388,608 ranks; plan for at most 1,048,576"),
        (
            ["--nodes", "2", "--gpus-per-node", "3", "parallel.shard_size=4"],
            "does not divide the 6 ranks of the job",
        ),
        (["parallel.backbone=fsdp2", "backbone.quantization=int8"], "set parallel.backbone: replicate"),
        (["parallel.backbone=zero3", "backbone.quant_storage=uint8"], "set backbone.quant_storage: bfloat16"),
        (
            ["--nodes", "2", "backbone.quantization=int8", "parallel.cpu_offload=true"],
            "int8, whose layers keep their weights outside",
        ),
    ],
)
def test_bad_input_is_one_message(capsys, arguments, message):
    assert main(["plan", str(QLORA), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error and error.count("error:") == 1


def test_a_classifier_has_no_answers_and_stands_on_an_encoder(capsys):
    recipe = str(RECIPES / "roberta_base_mrpc.yaml")
    for arguments, message in [
        (["--answer-tokens", "3"], "`plan --answer-tokens` is for language models"),
        (["--simulate"], "`plan --simulate` is for language models"),
        (["backbone.path=random:llama2_7b"], "it is a llama, but a classifier stands on an encoder"),
    ]:
        assert main(["plan", recipe, *arguments]) == 2
        assert message in capsys.readouterr().err
