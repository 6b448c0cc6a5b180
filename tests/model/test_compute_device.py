"""Everything of ours lies on the device that computes, wherever an engine keeps the frozen weights meanwhile."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import metatt_scale.reopen as reopen_module
import metatt_scale.training.run as run_module
from metatt_scale.backbone import load_backbone
from metatt_scale.evaluation import evaluate
from metatt_scale.evaluation.generate import generate
from metatt_scale.methods import build_adapter
from metatt_scale.parallel import World
from metatt_scale.recipe import validate
from metatt_scale.reopen import reopen
from metatt_scale.training import train
from metatt_scale.training.optimizer import make_optimizer
from tests.questions import questions, recipe, write
from tests.toy import CPU, bits_of, quiet, toy, toy_classifier, write_toy

ELSEWHERE = torch.device("meta")
HERE = World(device=CPU)
ADAPTERS = {
    "metatt_4d": {"rank": 4},
    "metatt_5d": {"rank": 4},
    "lora": {"rank": 4},
    "pissa": {"kind": "lora", "init": "pissa", "rank": 4},
    "vera": {"rank": 4},
    "adalora": {"rank": 4},
    "mtl_lora": {"rank": 4},
    "moe_lora": {"rank": 4, "moe_lora": {"experts": 2}},
    "loretta_rep": {"rank": 4},
    "loretta_adp": {},
}


def offload(model):
    """Keep the embedding, whose weight is the model's first parameter, on another device between its forwards."""
    table = model.get_input_embeddings()
    weight, away = table.weight, nn.Parameter(table.weight.to(ELSEWHERE), requires_grad=False)
    table.weight = away
    table.register_forward_pre_hook(lambda module, _: setattr(module, "weight", weight))
    table.register_forward_hook(lambda module, *_: setattr(module, "weight", away))
    assert model.device == ELSEWHERE
    return model


@pytest.fixture
def offloaded(monkeypatch):
    """Have `train` and `reopen` load such models."""
    for module in (run_module, reopen_module):
        monkeypatch.setattr(module, "load_backbone", lambda *given, **named: offload(load_backbone(*given, **named)))


def places(tensors):
    return {tensor.device for tensor in tensors}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_and_their_moments(name, tmp_path):
    write_toy(tmp_path)
    recipe = validate({**toy(tmp_path), "adapter": {"kind": name, **ADAPTERS[name]}}, "toy")
    model = offload(load_backbone(recipe.backbone, CPU))
    built = build_adapter(model, recipe, HERE)
    assert places([*built.tensors().values(), *built.trained().values()]) == {CPU}
    optimizer = make_optimizer(built.trained().values(), recipe.training)
    for value in built.trained().values():
        value.grad = torch.ones_like(value)
    optimizer.step()
    assert places(value for state in optimizer.state.values() for value in state.values()) == {CPU}


def test_a_trained_head(tmp_path):
    recipe = toy_classifier(tmp_path, classifier={"labels": 2, "head": "trained"})
    model = offload(load_backbone(recipe.backbone, CPU, classes=2))
    adapter = build_adapter(model, recipe, HERE)
    assert adapter.head is not None and places(adapter.head.parameters()) == {CPU}


def test_a_run_gives_the_same_bits_and_opens_again(tmp_path, monkeypatch):
    """Loaded as ever, and offloaded."""
    folders = []
    for name, load in {"here": load_backbone, "away": lambda *a, **k: offload(load_backbone(*a, **k))}.items():
        for module in (run_module, reopen_module):
            monkeypatch.setattr(module, "load_backbone", load)
        write_toy(tmp_path / name)
        run = train(validate(toy(tmp_path / name, training={"max_steps": 2}), "toy"), quiet())
        assert places(reopen(run.folder, quiet(), CPU).adapter.tensors().values()) == {CPU}
        folders.append(run.folder)
    assert bits_of(folders[0]) == bits_of(folders[1])


def test_text_and_scores(byte_llama, byte_bpe, tmp_path):
    """transformers and the harness believe `model.device`, so it has to be right while they run."""
    away, seen = offload(copy.deepcopy(byte_llama)), set()
    kind = type(away)
    away.model.layers[0].register_forward_pre_hook(lambda *_: seen.add(away.device))
    text = generate(away, byte_bpe, "a stone", CPU, 6)
    assert text == generate(byte_llama, byte_bpe, "a stone", CPU, 6)
    assert seen == {CPU} and type(away) is kind and away.device == ELSEWHERE
    write(tmp_path / "boolq.jsonl", questions("boolq", 4))
    settings = recipe(tmp_path, "boolq", batch_size=4)
    scores = [
        evaluate(model, byte_bpe, settings, tmp_path / f"{name}.json", "tuned", "f", world=HERE)["boolq"].samples
        for name, model in (("here", byte_llama), ("away", away))
    ]
    assert scores[0] == scores[1]
