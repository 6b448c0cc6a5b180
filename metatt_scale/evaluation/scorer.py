"""The harness's model for transformers, computing logits only where choices are scored.

Import this file late: it imports lm_eval.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM

from metatt_scale.backbone import check_tokens
from metatt_scale.evaluation.progress import Advance
from metatt_scale.parallel import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The harness's registration decorator hides the class's type from a type checker.
_HFLM: Any = HFLM

Request = tuple[Any, list[int], list[int]]
"""(strings, tokens of the context, tokens of the continuation)"""


class Scorer(_HFLM):
    """HFLM over an already loaded model, with a progress callback; the ranks of a job take its batches in turn.

    The harness asks for the logits of every position and uses those of the continuation, a few at the end of each
    sequence. Its own slicing counts from the end, so handing it only the last positions of a batch changes no
    score; it saves most of the output projection (a 135M model on a CPU: 2.8 times faster, answers equal). The
    softmax is taken in float32: in bfloat16 the log-likelihoods are rounded so coarsely that choices tie.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        world: World,
        advance: Advance,
    ) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            softmax_dtype="float32",
        )
        self._device = world.device  # HFLM takes that of the first parameter, which may be offloaded
        self.world = world
        self.advance = advance
        self.truncated = 0
        """Sequences that were longer than the model's positions, cut at their beginning."""
        self._last_positions = 0
        self._can_select = "logits_to_keep" in inspect.signature(model.forward).parameters

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Score (context, continuation) pairs without the harness's own bars."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self._check(requests)
        # Continuations of one token after the same context share a forward in the harness: keep them together.
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (_, context, continuation) in enumerate(requests):
            groups[tuple(context + continuation[:-1])].append(i)
            self.truncated += len(context) + len(continuation) > self.max_length + 1
        ordered = sorted(groups.items(), key=lambda item: (-len(item[0]), item[0]))
        size = int(self.batch_size)
        batches = [ordered[first : first + size] for first in range(0, len(ordered), size)]
        answers_N2 = torch.zeros(
            len(requests), 2, dtype=torch.float64
        )  # log-likelihood, whether it is the greedy choice
        for first in range(0, len(batches), self.world.size):
            mine = first + self.world.rank
            # A rank with none left repeats the first batch: a sharded model needs all ranks in every forward.
            batch = batches[mine if mine < len(batches) else 0]
            longest = min(len(batch[0][0]), self.max_length)
            rows = [i for _, members in batch for i in members]
            # A row's continuation ends `longest - length` positions before the end of the padded batch.
            self._last_positions = max(
                longest - min(len(tokens), self.max_length) + len(requests[i][2])
                for tokens, members in batch
                for i in members
            )
            part = super()._loglikelihood_tokens([requests[i] for i in rows], disable_tqdm=True)
            if mine < len(batches):
                answers_N2[rows] = torch.tensor(part, dtype=torch.float64)
            in_round = batches[first : first + self.world.size]
            self.advance(sum(len(members) for batch in in_round for _, members in batch))
        total_N2 = self.world.sum(answers_N2.to(self.world.device))
        return [(score, bool(greedy)) for score, greedy in total_N2.tolist()]

    def _check(self, requests: list[Request]) -> None:
        """Refuse what cannot be scored, nor cut: an empty choice, one that is longer than the model's positions, and
        tokens without an embedding.
        """
        lengths = [len(continuation) for _, _, continuation in requests]
        if not all(lengths):
            raise ValueError("a choice of the task is empty, so there is nothing to score; correct the question")
        check_tokens(self.model, max(max(context + continuation) for _, context, continuation in requests))
        longest = max(lengths)
        if longest > self.max_length:
            raise ValueError(
                f"a choice has {longest} tokens, but {type(self.model).__name__} has {self.max_length} positions; "
                "leave the task out, or take a model with more"
            )

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        if not self._can_select:
            return super()._model_call(inps, attn_mask, labels)
        length = inps.shape[1]
        # Named one by one: the last positions as a slice would be a strided input to the output projection.
        positions = torch.arange(length - min(length, self._last_positions), length, device=inps.device)
        with torch.no_grad():
            return self.model(inps, logits_to_keep=positions, use_cache=False).logits
