"""Every count the paper states, from `plan --json` on the shapes of its models: Q and V, the head left out."""

import json

import pytest

from metatt_scale.cli import main

LLAMA_7B, LLAMA_13B = "recipes/llama2_7b_commonsense.yaml", "recipes/llama2_13b_commonsense.yaml"
BASE, LARGE = "recipes/roberta_base_mrpc.yaml", "recipes/roberta_large_mrpc.yaml"
BASE_TASKS, LARGE_TASKS = "recipes/roberta_base_multitask.yaml", "recipes/roberta_large_multitask.yaml"
ROWS = [
    (LLAMA_7B, "metatt_4d", 16, 139_776),
    (LLAMA_7B, "metatt_4d", 256, 4_325_376),
    (LLAMA_7B, "lotr", 16, 147_456),
    (LLAMA_7B, "vera", 1024, 327_680),
    (LLAMA_7B, "lora", 8, 4_194_304),
    (LLAMA_7B, "lora", 16, 8_388_608),
    (LLAMA_13B, "metatt_4d", 16, 174_592),
    (LLAMA_13B, "metatt_4d", 64, 827_392),
    (LLAMA_13B, "lotr", 64, 983_040),
    (LLAMA_13B, "vera", 256, 430_080),
    (LLAMA_13B, "lora", 8, 6_553_600),
    (LLAMA_13B, "lora", 32, 26_214_400),
    (BASE, "metatt_4d", 8, 13_184),
    (BASE, "metatt_4d", 24, 44_928),
    (BASE, "metatt_4d", 64, 155_648),
    (BASE, "metatt_5d", 16, 19_968),
    (BASE, "metatt_5d", 64, 159_744),
    (BASE_TASKS, "metatt_4p1d", 8, 13_376),
    (BASE, "lorta", 8, 6_864),
    (BASE, "lorta", 64, 54_912),
    (BASE, "lotr", 32, 73_728),
    (BASE, "lotr", 40, 99_840),
    (BASE, "lotr", 80, 276_480),
    (BASE, "lotr", 88, 321_024),
    (BASE, "lora", 8, 294_912),
    (BASE, "vera", 1024, 43_008),
    (BASE, "adalora", 4, 221_328),  # 24 (2 x 768 + 1) r, r = 6 at the start
    (LARGE, "metatt_4d", 16, 39_424),
    (LARGE, "metatt_4d", 32, 92_160),
    (LARGE, "metatt_4d", 8, 18_048),
    (LARGE_TASKS, "metatt_4p1d", 8, 18_240),
    (LARGE, "lotr", 64, 327_680),
    (LARGE, "lorta", 8, 9_040),
    (LARGE, "lora", 8, 786_432),
    (LARGE, "vera", 256, 61_440),
    (LARGE, "metatt_5d", 32, 77_824),
    (BASE_TASKS, "mtl_lora", 4, 296_280),
    (LARGE_TASKS, "mtl_lora", 4, 789_168),
    (BASE_TASKS, "moe_lora", 8, 307_200),
    (LARGE_TASKS, "moe_lora", 8, 811_008),
]


@pytest.mark.parametrize(("recipe", "kind", "rank", "count"), ROWS)
def test_plan_states_the_papers_count(capsys, recipe, kind, rank, count):
    modules = "[query,value]" if "roberta" in recipe else "[q_proj,v_proj]"
    settings = f"adapter={{kind: {kind}, rank: {rank}, target_modules: {modules}}}"
    assert main(["plan", recipe, settings, "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["trainable_parameters"] == count and numbers["adapter"] == kind


@pytest.mark.parametrize(("recipe", "count"), [(BASE, 57_408), (LARGE, 132_864)])
def test_loretta_adp_in_table_2(capsys, recipe, count):
    """57 and 133 thousand there: bottlenecks of 64, tensor trains of rank 5, biases."""
    assert main(["plan", recipe, "adapter={kind: loretta_adp, alpha: 1.0}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trainable_parameters"] == count


@pytest.mark.parametrize(("recipe", "count"), [(BASE_TASKS, 308_736), (LARGE_TASKS, 814_080)])
def test_moe_lora_with_a_fourth_task(capsys, recipe, count):
    more = [
        "tasks.qnli={labels: 2, text_fields: [question, sentence]}",
        "data.train=[" + ", ".join(f"{{path: x, task: {name}}}" for name in ("cola", "mrpc", "rte", "qnli")) + "]",
        "data.validation=[]",
        "data.validation_size=10",
    ]
    settings = "adapter={kind: moe_lora, rank: 8, target_modules: [query, value]}"
    assert main(["plan", recipe, settings, *more, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trainable_parameters"] == count
