"""FSDP2 over a fake process group on the fake device: what is placed where. Its forward needs real streams."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from metatt_scale.backbone import load_backbone
from metatt_scale.methods import build_adapter
from metatt_scale.parallel import World
from metatt_scale.parallel.fsdp2 import Fsdp2
from tests.fake_cuda.device import CUDA, fake_cuda
from tests.toy import toy_recipe


@pytest.fixture
def two_ranks() -> Iterator[World]:
    """The first of two ranks that never answer."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield World(device=CUDA, rank=0, size=2, local_size=2)
    dist.destroy_process_group()


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("kind", ["metatt_4d", "lora"])
def test_what_trains_is_on_the_device_that_computes(
    tmp_path: Path, two_ranks: World, offload: bool, kind: str
) -> None:
    adapter = {"kind": kind, "target_modules": ["q_proj", "v_proj"]}
    recipe = toy_recipe(tmp_path, parallel={"backbone": "fsdp2", "cpu_offload": offload}, adapter=adapter)
    with fake_cuda():
        engine = Fsdp2(two_ranks, recipe.parallel, torch.float32)
        model = load_backbone(recipe.backbone, CUDA, engine=engine)
        adapter = build_adapter(model, recipe, two_ranks, engine)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu" if offload else "cuda"}
    assert {parameter.device for parameter in adapter.trained().values()} == {CUDA}
