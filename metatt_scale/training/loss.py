"""The loss of one micro-batch: a sum over target tokens, whose denominator is the global batch's.

Shape legend: B examples, S tokens, V vocabulary, T target tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metatt_scale.data import IGNORE, Batch


def token_loss_sum(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """Return the sum of the cross entropy over all target tokens (scalar of at least fp32, nats).

    The batch is padded on the right, so under causal attention no token sees padding and no mask is needed: the
    kernels take their fast causal path. Logits are asked for from the first target on only.
    """
    labels_BS = batch.labels_BS
    is_target_BS = labels_BS != IGNORE
    is_target_BS[:, 0] = False  # nothing precedes the first token
    columns = is_target_BS.any(0).nonzero()
    first = int(columns[0]) if len(columns) else labels_BS.shape[1] - 1
    # Logits at position s predict token s + 1. Positions are named one by one: from a slice of the last ones the
    # output projection would get a strided input, for which it copies its weight once per example.
    positions = torch.arange(first - 1, labels_BS.shape[1], device=device)
    input_ids_BS = batch.input_ids_BS.to(device, non_blocking=True)
    logits_BSV = model(input_ids=input_ids_BS, use_cache=False, logits_to_keep=positions).logits
    assert logits_BSV.shape[1] == len(positions), "the model returned logits for other positions than asked for"
    wanted_BS = is_target_BS[:, first:].to(device, non_blocking=True)
    targets_T = labels_BS[:, first:].to(device, non_blocking=True)[wanted_BS]
    logits_TV = logits_BSV[:, :-1][wanted_BS]
    at_least_fp32 = torch.promote_types(logits_TV.dtype, torch.float32)
    return F.cross_entropy(logits_TV.to(at_least_fp32), targets_T, reduction="sum")
