"""The arms of a benchmark train what they say, on untouched weights."""

import hashlib

import pytest
import torch

from metatt_scale.adapter import AdaptedLinear
from metatt_scale.backbone import load_backbone
from metatt_scale.benchmark.arms import Work, builders, random_batch, twin
from tests.benchmark import BACKBONES, PEFT_WARNINGS, TRAINED
from tests.tiny import WIDE
from tests.toy import CPU, LLAMA, toy_recipe, write_toy

pytestmark = PEFT_WARNINGS


def state_of(model):
    """Everything of a model that another arm could have changed."""
    digest = hashlib.sha256()
    for tensor in [*model.parameters(), *model.buffers()]:
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    return digest.hexdigest(), repr(model), hooks, model.config.to_dict()


def make_arms(tmp_path, **backbone):
    write_toy(tmp_path, config={**LLAMA, **WIDE} if backbone else LLAMA)
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
