"""Bytes of everything but the weights on one rank: chain, activations, logits, gathered layers; and their peak.

The activations are those that autograd keeps for transformers' Llama layer, counted tensor by tensor (also Mistral,
Qwen2, Qwen3). For other architectures a layer is taken to keep every linear's output, its attention and two
norms: within about 30 %. A classifier's examples have one target, and its labels for a vocabulary. Not counted: the
CUDA context, cuBLAS workspaces, fragmentation; and the logits of models that cap or scale them (Gemma 2, Granite,
Cohere), whose output head cannot give the loss itself.

Letters: see shape.py. A target positions per example, T = B A of a micro-batch, C of a chunk of the loss, R bond to
the right of the input mode.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from metatt_scale.adapter.modes import factors
from metatt_scale.plan.shape import ITEM_SIZE, ModelShape
from metatt_scale.recipe import Recipe
from metatt_scale.shapes import round_up
from metatt_scale.training.loss import chunk_rows

FP32 = 4
_INPUT_OF = {"q_proj": "normed", "k_proj": "normed", "v_proj": "normed", "o_proj": "attention"}
_INPUT_OF |= {"gate_proj": "normed again", "up_proj": "normed again", "down_proj": "inner"}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one rank sends through the model at once."""

    examples: int
    tokens: int
    """Of each example."""
    answers: int
    """Positions per example whose next token is a target."""
    packed: bool
    """The examples stand in one row."""

    @property
    def rows(self) -> int:
        """Rows N of every activation: B S, rounded up where the examples are packed."""
        rows = self.examples * self.tokens
        return round_up(rows) if self.packed else rows


@dataclass(frozen=True, kw_only=True)
class ChainBytes:
    """The chain on every rank."""

    cores: int
    """4 P for P trained values."""
    moments: int
    """AdamW's two: 8 P."""
    factors: int
    """What the modules multiply with: copies in the backbone's dtype of A and of C and B, or of C B."""
    gradients: int
    """Of the factors' leaves and of the cores, and the flat buffer that is all-reduced."""

    @property
    def total(self) -> int:
        """Their sum."""
        return self.cores + self.moments + self.factors + self.gradients


def chain_bytes(shape: ModelShape, recipe: Recipe, tail: int, *, folded: bool) -> ChainBytes:
    """Return the chain's bytes; `tail` values ride behind the gradients in the all-reduce.

    With f values in n distinct factors (e bytes each as copies, 4 as gradients; a leaf owns one value):
    cores 4 P, moments 8 P, factors e f + 4 n, gradients 4 f + 4 P + 4 (P + tail). The graph between factors and cores
    keeps the middle products besides, 4 L M r^2.

    Args:
        shape: the model, its targets and the chain.
        recipe: says the type that computes.
        tail: values behind the gradients.
        folded: C is folded into B (adapter/folding.py).
    """
    n = shape.spec.n_parameters
    sizes = _factor_values(shape, folded)
    return ChainBytes(
        cores=FP32 * n,
        moments=2 * FP32 * n,
        factors=ITEM_SIZE[recipe.backbone.dtype] * sum(sizes) + FP32 * len(sizes),
        gradients=FP32 * (sum(sizes) + n + n + tail),
    )


def _factor_values(shape: ModelShape, folded: bool) -> list[int]:
    """Return the number of values of each distinct factor of the targets."""
    cores = [torch.empty(core, device="meta") for core in shape.spec.shapes]
    a_LMIP, c_LMPQ, b_LMQO = factors(shape.spec, cores)
    p, q = c_LMPQ.shape[-2:]
    sizes: dict[tuple[object, ...], int] = {}
    for index, target in enumerate(shape.target_map.targets):
        terms = [("a", a_LMIP, target.d_in * p)]
        terms += [] if folded else [("c", c_LMPQ, p * q), ("b", b_LMQO, q * target.d_out)]
        for name, factor, values in terms:
            place = (target.layer if factor.shape[0] > 1 else 0, target.projection if factor.shape[1] > 1 else 0)
            sizes[(name, *place, values)] = values
        if folded:
            sizes["m", index] = p * target.d_out
    return list(sizes.values())


# ---- activations


def norm_bytes(shape: ModelShape, work: Work) -> int:
    """Return what one RMSNorm keeps: its input in fp32 and 1 / rms, 4 N (D + 1)."""
    return FP32 * work.rows * (shape.hidden + 1)


def attention_bytes(shape: ModelShape, work: Work, item: int, attention: str) -> int:
    """Return what the attention of one layer keeps, after its projections.

    sdpa, flash: q, k, v, output and log-sum: e N (2 Q + 2 K) + 4 N H.
    eager: q and the repeated k, v: 3 e N Q, and the softmax in fp32 with its cast: B H S^2 (4, or 4 + e for e < 4).
    Norms of q and k (Qwen3): 4 N (Q + K).
    """
    n, q, k = work.rows, shape.query, shape.key
    norms = FP32 * n * (q + k) if shape.head_norms else 0
    if attention != "eager":
        return norms + item * n * (2 * q + 2 * k) + FP32 * n * shape.heads
    return norms + 3 * item * n * q + square(shape, work) * (FP32 + (item if item < FP32 else 0))


def square(shape: ModelShape, work: Work) -> int:
    """Return the values of all attention weights of a layer: B H S^2."""
    return work.examples * shape.heads * work.tokens**2


def mlp_bytes(shape: ModelShape, work: Work, item: int) -> int:
    """Return what the gated MLP of one layer keeps: gate, silu(gate) and up, 3 e N F."""
    return 3 * item * work.rows * shape.inner


def adapter_bytes(shape: ModelShape, work: Work, recipe: Recipe, strategy: str) -> int:
    """Return what the adapted linears of one layer keep: each distinct input x, and x A of R values a row.

    e N (sum of the widths of distinct inputs + R * number of distinct x A). Under sdpa the input of o_proj is the
    attention's output, which is kept anyway. int8 layers keep every linear's input themselves, and so does the
    function that DeepSpeed puts in the place of PyTorch's for unquantised linears under ZeRO-3.
    """
    item = ITEM_SIZE[recipe.backbone.dtype]
    inputs: dict[str, int] = {}
    for target in shape.target_map.targets:
        inputs[_input_name(shape, target.projection)] = target.d_in
    start = list(shape.spec.modes).index("input")
    shared = start == 0 or set(shape.spec.modes[:start]).isdisjoint({"layer", "projection"})
    projections = len(inputs) if shared else len(shape.target_map.projections)
    if recipe.backbone.quantization == "int8" or _deepspeed_keeps_inputs(recipe, strategy):
        inputs = {
            "normed": shape.hidden,
            "attention": shape.query,
            "normed again": shape.hidden,
            "inner": shape.inner,
        }
    if recipe.backbone.attention != "eager":
        inputs.pop("attention", None)
    bond = shape.spec.ranks[start] if shape.spec.modes[-1] != "input" else shape.spec.ranks[-1]
    return item * work.rows * (sum(inputs.values()) + bond * projections)


def _deepspeed_keeps_inputs(recipe: Recipe, strategy: str) -> bool:
    return strategy == "zero3" and recipe.backbone.quantization == "none"


def _input_name(shape: ModelShape, projection: int) -> str:
    path = shape.target_map.projections[projection]
    return _INPUT_OF.get(path.rpartition(".")[2], path)


def layer_bytes(shape: ModelShape, work: Work, recipe: Recipe, strategy: str) -> int:
    """Return what autograd keeps of one layer: 2 norms + attention + MLP + adapter.

    Generic: e N (outputs of all linears + Q) + 2 norms + attention weights (eager) + adapter.
    """
    item, attention = ITEM_SIZE[recipe.backbone.dtype], recipe.backbone.attention
    adapter = adapter_bytes(shape, work, recipe, strategy)
    if shape.family == "llama":
        own = attention_bytes(shape, work, item, attention) + mlp_bytes(shape, work, item)
    else:
        weights = square(shape, work) * (FP32 + item) if attention == "eager" else 0
        own = item * work.rows * (shape.linear_outputs + shape.query) + weights
    return 2 * norm_bytes(shape, work) + own + adapter


def checkpoint_bytes(shape: ModelShape, work: Work, recipe: Recipe) -> int:
    """Return what one recomputed layer keeps: its input, e N D.

    int8 layers also keep the inputs of all their linears, which bitsandbytes hides from autograd and so from
    recomputation: e N (2 D + Q + F) more.
    """
    item = ITEM_SIZE[recipe.backbone.dtype]
    if recipe.backbone.quantization != "int8":
        return item * work.rows * shape.hidden
    return item * work.rows * (3 * shape.hidden + shape.query + shape.inner)


def backward_bytes(shape: ModelShape, work: Work, recipe: Recipe, strategy: str) -> int:
    """Return what the backward pass of one layer needs at once on top of what the layer kept.

    The largest of: in the MLP, gradients of gate, up and their product, 3 e N F + e N D (less e N F where DeepSpeed
    kept the product as the last matrix's input, which is freed by then); in its last matrix, unpacked if it is
    quantised, e (N F + N D + D F); in eager attention, gradients of the softmax, 8 B H S^2 + e N (2 D + Q).
    By then the MLP, its norm and the cast of the softmax are freed, but not where the layer was recomputed and the
    chain remembers its last projected input behind them.
    """
    item, n, d, f = ITEM_SIZE[recipe.backbone.dtype], work.rows, shape.hidden, shape.inner
    unpacked = item * shape.widest_linear if recipe.backbone.quantization != "none" else 0
    kept = f if _deepspeed_keeps_inputs(recipe, strategy) else 0
    moments = [item * n * (3 * f + d - kept), item * n * (f + d) + unpacked]
    if recipe.backbone.attention == "eager":
        freed = mlp_bytes(shape, work, item) + norm_bytes(shape, work) + square(shape, work) * (FP32 - item)
        softmax = 2 * FP32 * square(shape, work) + item * n * (2 * d + shape.query)
        late = any(_input_name(shape, target.projection) != "normed" for target in shape.target_map.targets)
        moments.append(softmax if recipe.backbone.gradient_checkpointing and late else softmax - freed)
    return max(moments)


def logit_bytes(shape: ModelShape, work: Work, recipe: Recipe) -> int:
    """Return what the head needs at once to give the loss of T = B A targets (all positions: A = S - 1).

    Hidden states e N D, the gradient of those of the targets, rounded up, e T D, and of one chunk of C targets
    (training/loss.py) hidden states e C D, logits in fp32 4 C V, and in the backbone's dtype e C V (e < 4).
    """
    item, targets = ITEM_SIZE[recipe.backbone.dtype], round_up(work.examples * work.answers)
    chunk = min(targets, chunk_rows(shape.vocabulary))
    logits = (FP32 + (item if item < FP32 else 0)) * chunk * shape.vocabulary
    return item * shape.hidden * (work.rows + targets + chunk) + logits


def head_bytes(shape: ModelShape, work: Work, recipe: Recipe) -> int:
    """Return what the head's backward needs: all gradients of hidden states, the targets' twice, e D (N + 2 T)."""
    return ITEM_SIZE[recipe.backbone.dtype] * shape.hidden * (work.rows + 2 * work.examples * work.answers)


@dataclass(frozen=True, kw_only=True)
class ActivationBytes:
    """What one micro-batch adds on one rank."""

    kept: int
    """Kept of all layers from forward to backward."""
    layer: int
    """The live set of the layer whose backward runs, recomputed activations and gradients, less the last norm's."""
    logits: int
    """At the loss."""


def activation_bytes(shape: ModelShape, work: Work, recipe: Recipe, strategy: str) -> ActivationBytes:
    """Return the activations of one micro-batch, with or without recomputation.

    Without: every layer from the first adapted one keeps its own; that one's first norm sees no gradient. With: every
    such layer keeps its input; one is recomputed at a time (in fp32 its first norm keeps the very same input).
    Both: the last norm, freed before a layer's backward; cosines and sines 2 e S (D / H), of a packed row
    2 e N (D / H); and under eager attention, which packs nothing, the mask e B S^2.
    """
    item, eager = ITEM_SIZE[recipe.backbone.dtype], recipe.backbone.attention == "eager"
    positions = work.rows if work.packed else work.tokens
    rotary = 2 * item * positions * math.ceil(shape.query / shape.heads)
    mask = item * work.examples * work.tokens**2 if eager else 0
    one, extra = layer_bytes(shape, work, recipe, strategy), backward_bytes(shape, work, recipe, strategy)
    norm, logits = norm_bytes(shape, work), logit_bytes(shape, work, recipe)
    last = norm + rotary + mask
    layers = shape.layers - shape.target_map.layers[0]
    if not recipe.backbone.gradient_checkpointing:
        return ActivationBytes(kept=layers * one - norm + last, layer=extra - norm, logits=logits)
    shared = item * work.rows * shape.hidden if item == FP32 else 0
    kept = layers * checkpoint_bytes(shape, work, recipe) + last
    return ActivationBytes(kept=kept, layer=one + extra - shared - norm, logits=logits)
