"""dlkern.nn.Attention and MultiheadAttention: torch.nn's arguments, state_dict and numbers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from batch_norm_act_cases import spied
from torch import Tensor, nn

import dlkern
from dlkern import functional
from dlkern import nn as layers
from dlkern.nn.attention import why_not

WITHOUT = pytest.mark.skipif(
    dlkern.dispatch.unavailable("cpu") is not None, reason="the extension dlkern._C is not there"
)
BUILT = [
    {},
    {"bias": False, "batch_first": True},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"add_bias_kv": True, "batch_first": True},
    {"kdim": 12, "vdim": 20, "batch_first": True},
    {"add_zero_attn": True, "kdim": 12, "bias": False},
]


def _pair(**options: Any) -> tuple[nn.MultiheadAttention, layers.MultiheadAttention]:
    torch.manual_seed(0)
    stock = nn.MultiheadAttention(16, 4, **options)
    mine = layers.MultiheadAttention(16, 4, **options)
    mine.load_state_dict(stock.state_dict())
    assert [n for n, _ in mine.named_parameters()] == [n for n, _ in stock.named_parameters()]
    return stock, mine


def _masks(kind: str, batch: int, queries: int, keys: int) -> dict[str, Any]:
    padding = torch.arange(keys) >= torch.tensor([keys, 5, 3][:batch])[:, None]
    causal = torch.ones(queries, keys, dtype=torch.bool).triu(1)
    each = (torch.rand(batch * 4, queries, keys) < 0.3).index_fill(2, torch.tensor([0]), False)
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": torch.zeros(batch, keys).masked_fill(padding, -2.0)},
        "causal": {"attn_mask": causal, "is_causal": True},
        "causal and padding": {"attn_mask": causal, "is_causal": True, "key_padding_mask": padding},
        "each head": {"attn_mask": each, "key_padding_mask": padding & False},
        "float": {"attn_mask": torch.randn(queries, keys)},
        "float and bool": {"attn_mask": torch.randn(batch * 4, queries, keys), "key_padding_mask": padding},
    }[kind]


KINDS = ("none", "padding", "float padding", "causal", "causal and padding", "each head", "float", "float and bool")


@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
@pytest.mark.parametrize(("options", "kind"), list(itertools.product(BUILT, KINDS)), ids=str)
@pytest.mark.parametrize("shared", ["self", "key is value", "all differ"])
def test_against_pytorch(options: dict[str, Any], kind: str, shared: str) -> None:
    """Outputs and the gradients of inputs and Parameters, for each way to build, to mask and to share arguments."""
    if shared != "all differ" and "kdim" in options:
        options = {**options, "kdim": 16, "vdim": 16}
    stock, mine = _pair(**options)
    first = options.get("batch_first", False)
    queries, keys = 7, 7 if shared == "self" else 9

    def tensor(length: int, dim: int) -> Tensor:
        t = torch.randn(3, length, dim)
        return (t if first else t.transpose(0, 1).contiguous()).requires_grad_()

    q = tensor(queries, 16)
    k = q if shared == "self" else tensor(keys, options.get("kdim", 16))
    v = k if shared != "all differ" else tensor(keys, options.get("vdim", 16))
    masks = _masks(kind, 3, queries, keys)
    results = []
    for module in (stock, mine):
        module.zero_grad()
        out, weights = module(q, k, v, need_weights=False, **masks)
        assert weights is None
        inputs = [*dict.fromkeys((q, k, v)), *module.parameters()]
        results.append([out, *torch.autograd.grad(out.sin().sum(), inputs, allow_unused=True)])
    assert why_not(mine, q, k, v, masks.get("key_padding_mask"), False, masks.get("attn_mask"), False) is None
    for right, seen in zip(*results, strict=True):
        assert (right is None) == (seen is None)
        if right is not None:
            torch.testing.assert_close(seen, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["none", "padding", "causal"])
def test_unbatched_and_weights(kind: str) -> None:
    stock, mine = _pair(batch_first=True)
    x = torch.randn(7, 16)
    masks = _masks(kind, 3, 7, 7)
    if "key_padding_mask" in masks:
        masks["key_padding_mask"] = masks["key_padding_mask"][1]
    torch.testing.assert_close(mine(x, x, x, need_weights=False, **masks), stock(x, x, x, need_weights=False, **masks))
    for module in (stock.eval(), mine.eval()):
        _, weights = module(x, x, x, average_attn_weights=False)
        assert weights.shape == (4, 7, 7)
    torch.testing.assert_close(mine(x, x, x), stock(x, x, x))


@WITHOUT
def test_padding_runs_ours() -> None:
    _, mine = _pair(batch_first=True)
    x = torch.randn(3, 7, 16)
    with spied() as calls:
        mine(x, x, x, need_weights=False, **_masks("padding", 3, 7, 7))[0].sum().backward()
    assert calls == [("cpu", "forward"), ("cpu", "backward")]


def test_dropout_only_in_training() -> None:
    _, mine = _pair(dropout=0.5, batch_first=True)
    x = torch.randn(2, 7, 16)
    torch.manual_seed(0)
    one = mine(x, x, x, need_weights=False)[0]
    torch.manual_seed(0)
    assert torch.equal(one, mine(x, x, x, need_weights=False)[0])
    assert not torch.equal(one, mine(x, x, x, need_weights=False)[0])
    mine.eval()
    torch.testing.assert_close(mine(x, x, x, need_weights=False)[0], mine(x, x, x)[0])


def test_what_pytorch_refuses_is_refused_in_its_words() -> None:
    stock, mine = _pair(batch_first=True)
    x = torch.randn(2, 7, 16)
    for arguments in ({"attn_mask": torch.zeros(6, 7)}, {"is_causal": True}, {"attn_mask": torch.zeros(3, 7, 7)}):
        errors = []
        for module in (stock, mine):
            with pytest.raises(RuntimeError) as caught:
                module(x, x, x, need_weights=False, **arguments)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]


def test_attention_module() -> None:
    q, k, v = (torch.randn(2, 4, 6, 8) for _ in range(3))
    module = layers.Attention(dropout=0.5, is_causal=True, window=3, softcap=2.0, scale=0.3)
    torch.manual_seed(1)
    trained = module(q, k, v)
    torch.manual_seed(1)
    options: dict[str, Any] = {"is_causal": True, "window": 3, "softcap": 2.0, "scale": 0.3}
    torch.testing.assert_close(trained, functional.attention(q, k, v, dropout_p=0.5, **options))
    lengths = torch.tensor([6, 2])
    out, lse = module.eval()(q, k, v, key_lengths=lengths, return_lse=True)
    right = functional.attention(q, k, v, key_lengths=lengths, return_lse=True, **options)
    torch.testing.assert_close((out, lse), right)
    assert "window=3" in repr(module)
    wrong: list[dict[str, Any]] = [{"dropout": 1.0}, {"causal_alignment": "left"}, {"window": -1}, {"softcap": -2.0}]
    for changes in wrong:
        ((name, value),) = changes.items()
        with pytest.raises(ValueError, match=f"{name}: .* got {value!r}"):
            layers.Attention(**changes)
