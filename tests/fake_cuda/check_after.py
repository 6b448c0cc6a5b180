"""What follows training, on the fake device: a run of the CPU is opened, scored, merged and exported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from metatt_scale.adapter import merge
from metatt_scale.evaluation.generate import continue_tokens
from metatt_scale.export import FORMATS, export
from metatt_scale.parallel import World
from metatt_scale.reopen import Reopened, reopen
from metatt_scale.scoring import score_opened
from metatt_scale.training import train
from tests.exports import recipe_of, save_backbone
from tests.fake_cuda.device import CUDA, fake_cuda
from tests.questions import questions, write
from tests.questions import recipe as evaluation_of
from tests.toy import quiet


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a few steps on the CPU."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METATT_CACHE", str(folder / "cache"))
        save_backbone(folder / "backbone")
        return train(recipe_of(folder), quiet()).folder


@pytest.fixture
def opened(run: Path) -> Iterator[Reopened]:
    with fake_cuda():
        yield reopen(run, quiet(), CUDA)


def on_device(opened: Reopened) -> bool:
    tensors: list[Any] = [*opened.model.parameters(), *opened.model.buffers(), *opened.adapter.trained().values()]
    return {tensor.device for tensor in tensors} == {CUDA}


def test_a_run_is_opened_on_the_device(opened: Reopened) -> None:
    assert on_device(opened)


def test_text_is_generated(opened: Reopened) -> None:
    assert len(continue_tokens(opened.model, opened.tokenizer, [[5, 6, 7], [8, 9]], CUDA, 3)) == 2


def test_questions_are_asked(opened: Reopened, tmp_path: Path) -> None:
    write(tmp_path / "boolq.jsonl", questions("boolq"))
    scores = score_opened(opened, evaluation_of(tmp_path, "boolq"), World(device=CUDA), zero_shot=True)
    assert {len(score["boolq"].samples["acc"]) for score in scores.values()} == {12}


def test_the_chain_is_merged(opened: Reopened) -> None:
    merge(opened.adapter)
    assert on_device(opened)


@pytest.mark.parametrize("to", FORMATS)
def test_a_run_is_exported(run: Path, tmp_path: Path, to: str) -> None:
    def save(model: PreTrainedModel, folder: Path, **_: Any) -> None:
        """Stand in for what tells tensors apart by their addresses, which fake ones have not got."""
        assert {parameter.device for parameter in model.parameters()} == {CUDA}
        save_file({}, folder / "model.safetensors")

    with mock.patch.object(PreTrainedModel, "save_pretrained", save), fake_cuda():
        folder = export(run, to, quiet(), out=tmp_path / to)
    assert list(folder.glob("*.safetensors"))


def test_fake_values_never_reach_the_process_outside(run: Path) -> None:
    with fake_cuda():
        reopen(run, quiet(), CUDA)
    assert not torch.cuda.is_available()
    assert torch.ones(2).add(1).tolist() == [2.0, 2.0]
