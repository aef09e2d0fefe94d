"""The swap of attention: MultiheadAttention, shifted windows, direct calls of SDPA, transformers."""

from __future__ import annotations

import copy
import functools
import importlib.util
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batch_norm_act_cases import spied
from torch import Tensor, nn

import dlkern

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
HAS_EXTENSION = dlkern.dispatch.unavailable("cpu") is None


def _missing(name: str) -> Any:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


def rows(model: nn.Module) -> list[tuple[str, str]]:
    return [(row.path, row.label) for row in dlkern.report(model).swapped]


def check(model: nn.Module, sample: Any, *, fused: int, training: bool = True) -> nn.Module:
    """A swapped copy computes what the model does; ``fused`` calls of ours in one forward, and no other."""
    model.train(training)
    swapped = dlkern.swap(copy.deepcopy(model))
    before = {n: type(m) for n, m in model.named_modules()}
    assert list(swapped.state_dict()) == list(model.state_dict())
    report = dlkern.verify(model, swapped, sample, variants=("threads", "ulp"))
    assert report.ok, str(report)
    dlkern.swap(swapped)  # counters at zero
    with torch.no_grad():
        swapped(**sample) if isinstance(sample, dict) else swapped(
            *(sample if isinstance(sample, tuple) else (sample,))
        )
    calls = dlkern.report(swapped).calls
    assert (calls.fused, calls.fallback) == (fused, 0)
    for other in (copy.deepcopy(swapped), pickle.loads(pickle.dumps(swapped))):
        assert rows(other) == rows(swapped)
    dlkern.unswap(swapped)
    assert {n: type(m) for n, m in swapped.named_modules()} == before
    return swapped


# ------------------------------------------------------------------------------------------- models
@_missing("torchvision")
def test_vit_b_16() -> None:
    from torchvision.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    # vit_b_16's twelve layers and patches, narrower, and on a small image
    model = VisionTransformer(64, 16, 12, 4, 64, 128, num_classes=10)
    check(model, torch.randn(2, 3, 64, 64), fused=12)


@_missing("torchvision")
@pytest.mark.parametrize("name", ["swin_t", "swin_v2_t"])
@pytest.mark.parametrize("training", [True, False])
def test_swin(name: str, training: bool) -> None:
    from torchvision.models import swin_transformer as swin

    torch.manual_seed(0)
    second = name == "swin_v2_t"
    options = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2} if second else {}
    # the stages, windows and shifts of swin_t and swin_v2_t, narrower; the image is padded to whole windows
    window = [8, 8] if second else [7, 7]
    model = swin.SwinTransformer(
        [4, 4], 24, [2, 2, 2], [2, 4, 4], window, dropout=0.1, attention_dropout=0.1 if training else 0.0,
        stochastic_depth_prob=0.1, num_classes=10, **options,
    )  # fmt: skip
    for m in model.modules():
        if hasattr(m, "relative_position_bias_table"):
            nn.init.normal_(m.relative_position_bias_table)
        if isinstance(getattr(m, "attention_dropout", None), float):
            m.attention_dropout = 0.0  # ours drops other elements
    check(model, torch.randn(2, 3, 72, 60), fused=6, training=training)
    if HAS_EXTENSION and training:
        dlkern.swap(model)
        with spied() as calls:
            model(torch.randn(1, 3, 64, 64)).sum().backward()
        assert [c for c in calls if c[0] == "cpu"] == [("cpu", "forward")] * 6 + [("cpu", "backward")] * 6


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer(batch_first: bool) -> None:
    torch.manual_seed(0)
    model = nn.Transformer(32, 4, 2, 2, 48, dropout=0.0, batch_first=batch_first)
    source, target = torch.randn(3, 9, 32), torch.randn(3, 7, 32)
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    padding = torch.arange(9) >= torch.tensor([9, 4, 6])[:, None]
    sample = {
        "src": source, "tgt": target, "src_key_padding_mask": padding, "memory_key_padding_mask": padding,
        "tgt_mask": torch.ones(7, 7, dtype=torch.bool).triu(1), "tgt_is_causal": True,
    }  # fmt: skip
    check(model, sample, fused=6)


def test_the_fast_path_is_explained() -> None:
    model = dlkern.swap(nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2).eval())
    reasons = [row.reason for row in dlkern.report(model).swapped]
    assert len(reasons) == 2
    assert all("the fast path of the TransformerEncoderLayer" in reason for reason in reasons)
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        fast = model(x)
        assert dlkern.report(model).calls.fused == 0  # as it says
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            torch.testing.assert_close(model(x), fast)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    assert dlkern.report(model).calls.fused == 2


# ---------------------------------------------------------------------------------- calls of SDPA
class SelfAttention(nn.Module):
    """A forward that decides by itself, with the function under several names."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.causal = causal

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float | None = 0.3) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).transpose(1, 3).unbind(2)
        if mask is not None:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=scale)
        return out.transpose(1, 2).flatten(-2)


class Sub(SelfAttention):
    """Calls through super(), whose cell has to survive."""

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float | None = 0.3) -> Tensor:
        out = super().forward(x, mask, scale=scale)
        return (
            out + F.scaled_dot_product_attention(out[:, None], out[:, None], out[:, None])[:, 0]
            if mask is None
            else out
        )


@pytest.mark.parametrize(("cls", "fused"), [(SelfAttention, 1), (Sub, 1)])
def test_calls_of_sdpa(cls: type[SelfAttention], fused: int) -> None:
    torch.manual_seed(0)
    model = cls()
    x = torch.randn(3, 7, 16)
    swapped = check(model, x, fused=fused)
    mask = torch.rand(3, 1, 7, 7) < 0.7
    right = model(x, mask)
    dlkern.swap(swapped)
    torch.testing.assert_close(swapped(x, mask), right)
    swapped.causal = False  # read at the call, as it stands in the source
    model.causal = False
    torch.testing.assert_close(swapped(x), model(x))


def test_what_sdpa_alone_can_run_is_its_own() -> None:
    model = dlkern.swap(SelfAttention())
    x = torch.randn(3, 7, 16)
    right = SelfAttention.forward(model, x, torch.zeros(7, 7, dtype=torch.float32))
    torch.testing.assert_close(model(x, torch.zeros(7, 7)), right)
    with pytest.raises(RuntimeError):
        model(x, torch.zeros(5, 5))  # in PyTorch's words
    report = dlkern.report(model)
    assert report.calls.fallback == 1
    with dlkern.no_fallback(), pytest.raises(RuntimeError, match="does not broadcast"):
        model(x, torch.zeros(5, 5))


def test_compile() -> None:
    model = SelfAttention()
    x = torch.randn(3, 7, 16)
    right = model(x)
    dlkern.swap(model)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), right)
    block = nn.MultiheadAttention(16, 4, batch_first=True)
    run = functools.partial(block, need_weights=False, key_padding_mask=torch.zeros(3, 7, dtype=torch.bool))
    right = run(x, x, x)[0]
    dlkern.swap(block)
    compiled = torch.compile(lambda t: run(t, t, t)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), right)


def test_what_swap_leaves() -> None:
    class Mine(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict({"mine": Mine(16, 4), "kept": nn.MultiheadAttention(16, 4), "own": SelfAttention()})
    model["own"].forward = model["own"].forward  # type: ignore[method-assign]
    dlkern.swap(model, filter_fn=lambda module, path: path != "kept")
    report = dlkern.report(model)
    assert not report.swapped
    reasons = {row.path: row.reason for row in report.skipped}
    assert "a Mine is a class of its own" in reasons["mine"]
    assert reasons["kept"] == "left out by filter_fn"
    assert reasons["own"] == "its forward is an instance attribute"


def test_weights_are_pytorchs() -> None:
    block = nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(3, 7, 16)
    right = block(x, x, x)
    dlkern.swap(block)
    torch.testing.assert_close(block(x, x, x), right)
    assert dlkern.report(block).calls.fallback == 1


# ----------------------------------------------------------------------------------- transformers
def _bert() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    kept = (torch.arange(11) < torch.tensor([11, 4, 7])[:, None]).long()
    return BertModel(config, add_pooling_layer=False), {"inputs_embeds": torch.randn(3, 11, 32), "attention_mask": kept}


def _t5() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import T5Config, T5Model

    config = T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, use_cache=False,
        decoder_start_token_id=0,
    )  # fmt: skip
    kept = (torch.arange(11) < torch.tensor([11, 4, 7])[:, None]).long()
    return T5Model(config), {
        "inputs_embeds": torch.randn(3, 11, 32), "attention_mask": kept, "decoder_inputs_embeds": torch.randn(3, 6, 32),
    }  # fmt: skip


class _Hidden(nn.Module):
    """The last hidden state alone, where tokens are: what padding hides is nobody's to compare."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **sample: Tensor) -> Tensor:
        out = self.model(**sample).last_hidden_state
        return out if "decoder_inputs_embeds" in sample else out * sample["attention_mask"][..., None]


@_missing("transformers")
@pytest.mark.parametrize("make", [_bert, _t5], ids=["bert", "t5"])
def test_transformers(make: Callable[[], tuple[nn.Module, dict[str, Tensor]]]) -> None:
    torch.manual_seed(0)
    made, sample = make()
    model = _Hidden(made).train()
    swapped = dlkern.swap(copy.deepcopy(model))
    assert swapped.model.config._attn_implementation == "dlkern"
    assert ("model", "transformers") in rows(swapped)
    assert model.model.config._attn_implementation == "sdpa"
    report = dlkern.verify(model, swapped, sample, variants=("threads", "ulp"))
    assert report.ok, str(report)
    if HAS_EXTENSION:
        with spied() as calls:
            swapped(**sample).sum().backward()
        layers = 2 if make is _bert else 6
        assert calls == [("cpu", "forward")] * layers + [("cpu", "backward")] * layers
    dlkern.unswap(swapped)
    assert swapped.model.config._attn_implementation == "sdpa"
    assert not rows(swapped)


@_missing("transformers")
def test_register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    from dlkern.integrations import transformers as door

    assert door.register() == door.register() == "dlkern"
    assert "dlkern" in AttentionInterface().valid_keys()
    assert "dlkern" in AttentionMaskInterface().valid_keys()  # without it a model would be given no mask
