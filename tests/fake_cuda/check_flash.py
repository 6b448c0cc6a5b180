"""flash-attn's kernels replaced by recorders: what they are given, and that no layer waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, modeling_flash_attention_utils

from metatt_scale.backbone import loading
from tests.fake_cuda.device import CUDA
from tests.fake_cuda.fixtures import RARELY, STEPS, check_queue, run_on_gpu
from tests.toy import LLAMA, toy_recipe


class Kernels:
    """Stand-ins for flash-attn's functions, which return the queries."""

    def __init__(self) -> None:
        self.packed: list[dict[str, Any]] = []
        self.dense = 0

    def of_packed_rows(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        self.packed.append(options)
        return q.clone()

    def of_rows(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        self.dense += 1
        return q.clone()

    def find(self, *_: Any, **__: Any) -> Any:
        """Answer as `lazy_import_flash_attention`: the kernels, and what makes their arguments."""
        kernels = self.of_rows, self.of_packed_rows, None, None, None
        return kernels, (
            lambda max_seqlen_q=None, max_seqlen_k=None, **_: self._lengths(max_seqlen_q, max_seqlen_k),
            None,
        )

    @staticmethod
    def _lengths(q: int | None, k: int | None) -> dict[str, int | None]:
        return {"max_seqlen_q": q, "max_seqlen_k": k}


@pytest.fixture
def kernels() -> Iterator[Kernels]:
    kernels = Kernels()
    with (
        mock.patch.object(loading, "pick_attention", lambda *_: "flash_attention_2"),
        mock.patch.object(modeling_flash_attention_utils, "lazy_import_flash_attention", kernels.find),
        mock.patch.object(PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True),
        mock.patch.object(PreTrainedModel, "_check_and_adjust_attn_implementation", lambda _, name, *__, **___: name),
    ):
        yield kernels


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_come_with_their_boundaries(tmp_path: Path, kernels: Kernels, checkpointing: bool) -> None:
    backbone = {"dtype": "bfloat16", "gradient_checkpointing": checkpointing}
    check_queue(run_on_gpu(toy_recipe(tmp_path, backbone=backbone, training=STEPS, logging=RARELY)))
    forwards = 2 + checkpointing * 1  # micro-batches of a step, each layer
    assert len(kernels.packed) >= STEPS["max_steps"] * LLAMA["num_hidden_layers"] * forwards
    for options in kernels.packed:
        ends = options["cu_seqlens_q"]
        assert ends.dtype == torch.int32 and ends.device == CUDA and isinstance(options["max_seqlen_q"], int)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_padded_rows_are_not_searched(tmp_path: Path, kernels: Kernels, checkpointing: bool) -> None:
    backbone = {"dtype": "bfloat16", "gradient_checkpointing": checkpointing}
    training = {**STEPS, "packing": False, "micro_batch_size": 1}
    check_queue(run_on_gpu(toy_recipe(tmp_path, backbone=backbone, training=training, logging=RARELY)))
    assert kernels.dense and not kernels.packed
