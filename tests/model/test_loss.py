"""The loss: beside that of transformers, and of hidden states beside cross entropy on all logits."""

import pytest
import torch
from torch.nn import functional as F

from metatt_scale.backbone import byte_tokenizer
from metatt_scale.benchmark.memory import peak_bytes
from metatt_scale.data import IGNORE, micro_batches, prepare
from metatt_scale.training import loss as module
from metatt_scale.training.loss import fused_head, loss_of_hidden, token_loss_sum
from metatt_scale.training.start import make_ready
from tests.tiny import FLOAT32, FLOAT64, MODELS, tiny_model, tokens
from tests.toy import CPU, quiet, toy_recipe

CAUSAL = [name for name in MODELS if name not in ("bert", "roberta")]
N, D, V, T = 70, 48, 300, 37


# ---- of a model's answers to a batch


def toy_batch(tmp_path):
    """One micro-batch of 16 additions with padding."""
    data = prepare(toy_recipe(tmp_path).data, byte_tokenizer(), 0)
    order = data.train.epoch_order(0, 0)[:16]
    (batch,) = micro_batches(data.table, order, micro_batch_size=16, rank=0, world_size=1, pad_token_id=0)
    assert 0 in batch.attention_mask_BS, "without padding this batch would prove nothing"
    return batch


@pytest.mark.parametrize("name", CAUSAL)
def test_loss_is_that_of_transformers_and_needs_no_padding_mask(name, tmp_path):
    model = tiny_model(name, dtype=torch.float64, vocab_size=300).eval()
    batch = toy_batch(tmp_path)
    labels = batch.labels_BS.clone()
    loss = token_loss_sum(model, batch, CPU)
    assert torch.equal(labels, batch.labels_BS)
    n_targets = int((labels[:, 1:] != IGNORE).sum())
    assert loss.dtype == torch.float64 and n_targets > 16
    theirs = model(input_ids=batch.input_ids_BS, labels=labels).loss
    masked = model(input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS).logits
    ours_masked = F.cross_entropy(masked[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    # transformers computes its loss in fp32 whatever the logits are.
    assert loss.item() == pytest.approx(theirs.item() * n_targets, rel=FLOAT32)
    assert loss.item() == pytest.approx(ours_masked.item(), rel=FLOAT64)


def test_a_batch_without_targets_adds_nothing(tmp_path):
    model = tiny_model("llama", vocab_size=300)
    batch = toy_batch(tmp_path)
    batch = batch._replace(labels_BS=torch.full_like(batch.labels_BS, IGNORE))
    assert token_loss_sum(model, batch, CPU).item() == 0


def test_low_precision_logits_are_summed_in_fp32(tmp_path):
    model = tiny_model("llama", dtype=torch.bfloat16, vocab_size=300)
    assert token_loss_sum(model, toy_batch(tmp_path), CPU).dtype == torch.float32


# ---- of hidden states


def problem(dtype, bias):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, D, generator=generator), 0.5 * torch.randn(V, D, generator=generator)
    rows = torch.randperm(N, generator=generator)[:T].sort().values
    targets = torch.randint(0, V, (T,), generator=generator)
    shift = 3 * torch.randn(V, generator=generator) if bias else None
    return hidden.to(dtype), weight.to(dtype), shift if shift is None else shift.to(dtype), rows, targets


def value_and_gradient(function, hidden, factor):
    leaf = hidden.detach().requires_grad_()
    value = function(leaf)
    (value * factor).backward()
    return value.detach().double(), leaf.grad.double()


@pytest.mark.parametrize("chunk", [1, 8, T, 1000])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_value_and_gradient_are_those_of_cross_entropy(monkeypatch, dtype, tolerance, bias, chunk):
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * V * chunk)
    hidden, weight, shift, rows, targets = problem(dtype, bias)

    def plain(x):
        return F.cross_entropy(F.linear(x[rows], weight, shift), targets, reduction="sum")

    expected = value_and_gradient(plain, hidden, 0.3)
    found = value_and_gradient(lambda x: loss_of_hidden(x, weight, shift, rows, targets), hidden, 0.3)
    assert abs(found[0] - expected[0]) <= tolerance * expected[0]
    assert (found[1] - expected[1]).norm() <= tolerance * expected[1].norm()
    assert not found[1][~torch.isin(torch.arange(N), rows)].any()


@pytest.mark.parametrize("dtype, epsilon", [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_half_precision_is_near_the_sum_in_fp64(dtype, epsilon):
    """Logits and their gradients are rounded to 16 bits, nothing else; so is what autograd does with all logits."""
    hidden, weight, shift, rows, targets = problem(dtype, True)
    assert shift is not None
    exact = value_and_gradient(
        lambda x: F.cross_entropy(F.linear(x[rows], weight.double(), shift.double()), targets, reduction="sum"),
        hidden.double(),
        1.0,
    )
    plain = value_and_gradient(
        lambda x: F.cross_entropy(F.linear(x[rows], weight, shift).float(), targets, reduction="sum"), hidden, 1.0
    )
    found = value_and_gradient(lambda x: loss_of_hidden(x, weight, shift, rows, targets), hidden, 1.0)
    assert loss_of_hidden(hidden, weight, shift, rows, targets).dtype == torch.float32
    assert abs(found[0] - exact[0]) <= epsilon * exact[0]
    error, of_plain = ((x[1] - exact[1]).norm() / exact[1].norm() for x in (found, plain))
    assert error <= 1.2 * of_plain and error <= 4 * epsilon


def test_large_logits_do_not_overflow():
    hidden, weight, _, rows, targets = problem(torch.float32, False)
    value, gradient = value_and_gradient(lambda x: loss_of_hidden(x, weight, None, rows, targets), hidden * 1e4, 1.0)
    assert value.isfinite() and gradient.isfinite().all() and gradient.any()


def test_no_rows_give_a_loss_of_zero_that_can_be_differentiated():
    hidden, weight, _, rows, targets = problem(torch.float32, False)
    rows, targets = rows[:0], targets[:0]
    value, gradient = value_and_gradient(lambda x: loss_of_hidden(x, weight, None, rows, targets), hidden, 1.0)
    assert value == 0 and gradient.shape == hidden.shape and not gradient.any()


def test_without_gradients_none_is_computed(monkeypatch):
    hidden, weight, _, rows, targets = problem(torch.float32, False)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "mm", lambda *_, **__: pytest.fail("a gradient that nobody asked for"))
        assert not loss_of_hidden(hidden, weight, None, rows, targets).requires_grad
    assert loss_of_hidden(hidden.requires_grad_(), weight, None, rows, targets).requires_grad


@pytest.mark.parametrize("name", ["llama", "phi", "gpt2"])
def test_the_head_gives_logits_to_everyone_else(name):
    """phi: with a bias."""
    plain, ready = (tiny_model(name, seed=2).requires_grad_(False) for _ in range(2))
    assert make_ready(ready, True, CPU, quiet())
    head = fused_head(ready)
    assert head is not None and fused_head(plain) is None
    ids = tokens(2, 7)
    assert torch.equal(plain(ids).logits, ready(ids).logits)
    with pytest.raises(ZeroDivisionError), head.giving_the_loss(torch.arange(2), torch.arange(2)):
        raise ZeroDivisionError
    assert torch.equal(plain(ids).logits, ready(ids).logits)
    assert make_ready(ready, True, CPU, quiet()) and fused_head(ready) is head, "a second trainer changes nothing"


def test_a_head_that_trains_gives_logits():
    model = tiny_model("llama")
    make_ready(model, "auto", CPU, quiet())
    assert fused_head(model) is None


@pytest.mark.parametrize("dtype, bytes_a_value", [(torch.float32, 4), (torch.bfloat16, 6)])
def test_one_chunk_of_logits_lives_at_once(monkeypatch, dtype, bytes_a_value):
    rows, width, vocabulary, chunk = 192, 4, 1000, 64
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * vocabulary * chunk)
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    weight, targets = torch.randn(vocabulary, width).to(dtype), torch.arange(rows)
    act = lambda: loss_of_hidden(hidden, weight, None, torch.arange(rows), targets).backward()  # noqa: E731
    act()  # scratch that is made once
    hidden.grad = None
    logits = bytes_a_value * vocabulary * chunk  # in bf16: what the head gives beside what the loss is computed in
    assert logits <= peak_bytes(act, CPU) < 1.3 * logits
