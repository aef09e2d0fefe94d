"""atrous: branches written into one map, the block by every backend, memory, semantics, errors, compile."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from atrous_cases import Case, block, check, plain
from batch_norm_act_cases import spied
from conftest import HAS_CUDA
from conv_bn_act_cases import Case as ConvCase
from conv_bn_act_cases import check as check_convolution
from guard import Guards
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dlkern
from dlkern import dispatch
from dlkern.bench import measure
from dlkern.functional import ConvNorm, aspp, atrous_conv2d
from dlkern.kernels import layout
from dlkern.kernels.activation import from_name
from dlkern.ops import atrous as op

DEVICE = "cuda" if HAS_CUDA else "cpu"
BACKENDS = ["torch", "reference"] if HAS_CUDA else ["torch", "reference", "cpu", "triton"]
OURS = [name for name in BACKENDS if name not in ("torch", "reference")]


# --------------------------------------------------------------------------- channels of a wider map
SHAPES = [(2, 6, 5, 7), (3, 5, 1, 1), (1, 33, 3, 4), (2, 64, 9, 2), (2, 1, 4, 4), (2, 3, 70, 65), (1, 4, 1, 9)]


@pytest.mark.skipif(HAS_CUDA, reason="the kernels of the CPU and of the interpreter")
@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_branch_is_batch_norm_act_bit_for_bit(
    shape: tuple[int, int, int, int], channels_last: bool, backend: str
) -> None:
    """What is written into channels of a wider map, and made of its gradient, and nothing beside them is touched."""
    if backend == "triton" and shape[2] > 9:
        shape = (2, 3, 9, 9)
    torch.manual_seed(0)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    dtypes: list[torch.dtype] = [torch.float32, torch.float64, torch.float16]
    ours, dense = dispatch.implementation("atrous", backend), dispatch.implementation("batch_norm_act", backend)
    for dtype, batch_stats, activation in zip(dtypes, (True, False, True), ("relu", "silu", "tanh"), strict=True):
        n, c, h, w = shape
        guards = Guards()
        x = torch.randn(shape, dtype=dtype).contiguous(memory_format=memory_format)
        wide = torch.randn(n, c + 7, h, w, dtype=dtype).contiguous(memory_format=memory_format)
        whole, grad = guards.place(wide), guards.place(wide)
        before = whole.clone()
        wider = torch.float64 if dtype == torch.float64 else torch.float32
        weight, bias, var = torch.randn(c, dtype=wider), torch.randn(c, dtype=wider), torch.rand(c, dtype=wider) + 0.5
        stats, others = ([bias.clone(), var.clone()] for _ in range(2))
        options: dict[str, Any] = {"batch_stats": batch_stats, "activation": from_name(activation)}
        if batch_stats and n * h * w == 1:
            continue
        mean, invstd = ours.forward(x, weight, bias, *stats, whole[:, 3 : 3 + c], momentum=0.1, eps=1e-5, **options)
        y, *like = dense.forward(x, weight, bias, None, *others, momentum=0.1, eps=1e-5, **options)
        assert torch.equal(whole[:, 3 : 3 + c], y)
        for a, b in zip((mean, invstd, *stats), (*like, *others), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(whole[:, :3], before[:, :3])
        assert torch.equal(whole[:, 3 + c :], before[:, 3 + c :])
        part = grad[:, 3 : 3 + c]
        needs = {"needs_x": True, "needs_params": True}
        found = ours.backward(part, x, weight, bias, mean, invstd, **options, **needs)
        same = dense.backward(
            part.clone(), x, weight, bias, None, None, mean, invstd, **options, **needs, needs_residual=False
        )
        for a, b in zip(found, same, strict=False):
            assert torch.equal(a, b)
        guards.check()


def test_the_cpu_reads_the_gradient_in_place() -> None:
    """Channels of a dense map of the same layout are told from everything else."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.empty(2, 4, 5, 6).contiguous(memory_format=memory_format)
        wide = torch.empty(2, 9, 5, 6).contiguous(memory_format=memory_format)
        view = layout.of(x)
        assert layout.is_part(wide[:, 3:7], view)
        assert layout.step(wide[:, 3:7], view) == (9 * 30 if memory_format == torch.contiguous_format else 9)
        assert layout.is_part(x, view)
        other = (
            wide[:, 3:7]
            .contiguous()
            .contiguous(
                memory_format=torch.channels_last
                if memory_format == torch.contiguous_format
                else torch.contiguous_format
            )
        )
        assert not layout.is_part(other, view)
        assert not layout.is_part(wide[:, ::2][:, :4], view)
        assert not layout.is_part(torch.empty(1, 1, 1, 1).expand(2, 4, 5, 6), view)
        assert not layout.is_part(torch.empty(2, 4, 5, 12)[..., ::2], view)


# -------------------------------------------------------------------------------------- the block
CASES = [
    Case((3, 6, 7, 8)),
    Case((3, 6, 7, 8), layout="channels_last", activation="tanh"),
    Case((2, 6, 9, 9), (1, 2, 3, 7), separable=True),
    Case((2, 6, 9, 9), (4,), separable=True, layout="channels_last", pooled=False),
    Case((1, 5, 6, 5), (2, 3), training=False),
    Case((3, 5, 6, 5), (2, 3), dtype=torch.float64),
    Case((3, 5, 6, 6), (2, 30), layout="transposed"),
    Case((4, 8, 6, 6), (2, 3), dtype=torch.float16, param_dtype=torch.float32),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_block(case: Case, backend: str) -> None:
    check(case, backend)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(2, 3), st.integers(2, 5), st.integers(2, 6), st.integers(2, 6)),
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from(("contiguous", "channels_last")),
)
def test_any_block(
    shape: tuple[int, int, int, int], rates: list[int], separable: bool, pooled: bool, training: bool, strides: str
) -> None:
    case = Case(
        shape, tuple(rates), 3, separable, pooled, training, dtype=torch.float64, activation="tanh", layout=strides
    )
    for backend in OURS[:1] or ["reference"]:
        check(case, backend)


def test_one_convolution_after_another_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of x that the branches make are added to the first of them, and nowhere else."""
    values, grad = block(Case((3, 6, 7, 8), (2, 3, 4)))
    b = values.mapped(lambda t: t.detach().clone())
    for t in b.differentiable:
        t.requires_grad_()
    with dlkern.backend(atrous="reference" if HAS_CUDA else "cpu"):
        y = aspp(*b)
    with torch.profiler.profile(record_shapes=True) as profile:
        torch.autograd.grad(y, b.differentiable, grad)
    shape = list(b.x.shape)
    added = [e.name for e in profile.events() if e.name.startswith("aten::add") and shape in e.input_shapes]
    assert added == ["aten::add_"] * 4  # 1 x 1, three rates, and what is pooled: five terms


@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_memory_kept_for_backward(separable: bool, channels_last: bool) -> None:
    """At most 0.8 of what PyTorch's own block keeps, x and all, at the width of DeepLabV3's."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    layer = dlkern.nn.ASPP(256, (6, 12, 18), separable=separable).to(DEVICE, memory_format=memory_format)
    x = torch.randn(2, 256, 9, 9, device=DEVICE).contiguous(memory_format=memory_format).requires_grad_()

    def stock() -> Tensor:
        return layer.project(torch.cat([conv(x) for conv in layer.convs], 1))

    ours, theirs = (measure.saved_bytes(f, layer.parameters()) for f in (lambda: layer(x), stock))
    assert ours <= 0.8 * theirs, f"{ours} of {theirs} bytes"


def test_pooled_branch_is_never_written_out() -> None:
    """No kernel makes a map of as many channels as the concatenation with the pooled branch has."""
    values, _ = block(Case((3, 6, 7, 8)))
    with torch.profiler.profile(record_shapes=True) as profile, torch.no_grad():
        aspp(*values.mapped(lambda t: t.detach().clone()))
    shapes = [s for event in profile.events() for s in event.input_shapes]
    assert [3, 16, 7, 8] in shapes  # four branches of four channels
    assert [3, 20, 7, 8] not in shapes
    assert not any(event.name in ("aten::cat", "aten::upsample_bilinear2d") for event in profile.events())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(training: bool, backend: str) -> None:
    case = Case((2, 2, 3, 3), (2,), 2, training=training, dtype=torch.float64, activation="tanh")
    values, _ = block(case)
    b = values.mapped(lambda t: t.detach().clone())
    inputs = [t.requires_grad_() for t in b.differentiable]

    def run(*tensors: Tensor) -> Tensor:
        replaced = dict(zip(map(id, inputs), tensors, strict=True))
        statistics = {id(t): t.clone() for t in b.statistics}
        with dlkern.backend(atrous=backend):
            return aspp(*b.mapped(lambda t: replaced.get(id(t), statistics.get(id(t), t))))

    with spied() as calls:
        assert torch.autograd.gradcheck(run, inputs, fast_mode=backend == "triton")
        if backend == "reference":
            assert torch.autograd.gradgradcheck(run, inputs, atol=1e-4, fast_mode=True)
    assert backend == "torch" or {(backend, "forward"), (backend, "backward")} <= set(calls)


def _norms(channels: tuple[int, ...]) -> list[tuple[Tensor, ...]]:
    made = [tuple(torch.rand(c, device=DEVICE) + 0.5 for _ in range(4)) for c in channels]
    for weight, bias, *_ in made:
        weight.requires_grad_(), bias.requires_grad_()
    return made


@pytest.mark.parametrize("strides", ["expanded", "channels_last", "sliced"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_any_strides(strides: str, backend: str) -> None:
    torch.manual_seed(0)
    maps = [torch.randn(2, c, 4, 5, device=DEVICE, requires_grad=True) for c in (3, 4)]
    options = [op.Options(True, 0.1, 1e-5, from_name("silu"))] * 2
    parameters = _norms((3, 4))
    with dlkern.backend(atrous=backend):
        y = op.apply(maps, parameters, options)
    grad = torch.randn_like(y)
    if strides == "expanded":
        grad = grad[:1, :1, :1, :1].expand_as(y)
    strided = grad
    if strides == "channels_last":
        strided = grad.contiguous(memory_format=torch.channels_last)
    elif strides == "sliced":
        strided = torch.stack([grad, grad], -1).flatten(-2)[..., ::2]
    inputs = [*maps, *(p for four in parameters for p in four[:2])]
    like = torch.autograd.grad(y, inputs, grad.contiguous(), retain_graph=True)
    for ours, theirs in zip(torch.autograd.grad(y, inputs, strided), like, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_branches_may_differ() -> None:
    """In mode, activation, affine parameters, running statistics and memory format."""
    torch.manual_seed(0)
    maps = [torch.randn(2, c, 4, 5) for c in (3, 1, 4)]
    maps[2] = maps[2].contiguous(memory_format=torch.channels_last)
    names = ("relu", "identity", "silu")
    options = [op.Options(i != 1, 0.1 * (i + 1), 1e-5, from_name(name)) for i, name in enumerate(names)]
    parameters: list[tuple[Tensor | None, ...]] = [
        (None, None, None, None),
        (torch.randn(1), None, torch.randn(1), torch.rand(1) + 0.5),
        (torch.randn(4), torch.randn(4), torch.randn(4), torch.rand(4) + 0.5),
    ]
    for order in itertools.permutations(range(3)):
        ours = copy.deepcopy(parameters)
        theirs = copy.deepcopy(parameters)
        made = []
        for i in order:
            w, b, mean, var = theirs[i]
            batch, momentum, eps, _ = options[i]
            z = F.batch_norm(maps[i], mean, var, w, b, batch, momentum, eps)
            made.append({"relu": F.relu, "identity": lambda z: z, "silu": F.silu}[names[i]](z))
        y = op.apply([maps[i] for i in order], [ours[i] for i in order], [options[i] for i in order])
        torch.testing.assert_close(y, torch.cat(made, 1))
        torch.testing.assert_close(ours[2][3], theirs[2][3])


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
def test_opcheck(backend: str) -> None:
    torch.manual_seed(0)
    x, whole = torch.randn(2, 4, 5, 6, device=DEVICE), torch.zeros(2, 9, 5, 6, device=DEVICE)
    ((weight, bias, mean, var),) = _norms((4,))
    inputs = (
        x, weight.detach(), bias.detach(), mean, var, whole[:, 2:6], True, 0.1, 1e-5, "relu", 0.0, backend
    )  # fmt: skip
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.dlkern.atrous_branch.default, inputs, test_utils=tests)
    kept = torch.ops.dlkern.atrous_branch(*inputs)
    grad = torch.randn_like(whole)[:, 2:6]
    backward = (grad, x, weight.detach(), bias.detach(), *kept, True, "relu", 0.0, True, True, backend)
    torch.library.opcheck(torch.ops.dlkern.atrous_branch_backward.default, backward, test_utils=tests)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_compile_fullgraph(mode: str) -> None:
    torch.manual_seed(0)
    layer = dlkern.nn.ASPP(6, (2, 3), 4, dropout=0.0).to(DEVICE).train(mode == "train")
    x = torch.randn(3, 6, 8, 8, device=DEVICE)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(mode == "train"):
        ours, theirs = compiled(x), layer(x)
        torch.testing.assert_close(ours, theirs)
        if mode == "train":
            found = [torch.autograd.grad(y.square().sum(), list(m.parameters())) for y, m in
                     ((ours, compiled), (theirs, layer))]  # fmt: skip
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(HAS_CUDA, reason="the CPU's autocast")
def test_autocast() -> None:
    values, _ = block(Case((3, 6, 7, 8), (2, 3)))
    ours, theirs = (values.mapped(lambda t: t.detach().clone()) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, like = aspp(*ours), plain(theirs)
    assert y.dtype == like.dtype == torch.bfloat16
    torch.testing.assert_close(y, like, rtol=5e-2, atol=5e-2)


def test_transforms_are_pytorchs() -> None:
    values, _ = block(Case((3, 4, 5, 5), (2,), training=False))
    b = values.mapped(lambda t: t.detach().clone())

    def f(x: Tensor) -> Tensor:
        return aspp(x, *b[1:])

    with torch.no_grad(), dlkern.backend(batch_norm_act="torch"):
        _, tangent = torch.func.jvp(f, (b.x,), (torch.ones_like(b.x),))
    assert tangent.shape == (3, 4, 5, 5)
    with (
        dlkern.backend(atrous="reference"),
        pytest.raises(RuntimeError, match=r"no torch\.func|implement the jvp"),
    ):
        torch.func.jvp(f, (b.x,), (torch.ones_like(b.x),))


def _wrong() -> list[tuple[str, Any, type[Exception], str]]:
    values, _ = block(Case((2, 6, 5, 5), (2,)))
    one = values.branches[1]
    return [
        ("x", values.x[0], ValueError, r"x: expected \(N, C, H, W\), got shape \(6, 5, 5\)"),
        ("x", values.x.long(), TypeError, "x: expected float32"),
        ("x", values.x[:, :5], ValueError, r"branches\[0\]: expected a weight of 5 input channels"),
        ("x", values.x[:1], ValueError, "pooled: expected more than 1 value per channel in training, got one image"),
        ("branches", [], ValueError, "branches: expected at least one, got none"),
        ("branches", [one], ValueError, r"projection: expected a weight of 8 input channels"),
        ("branches", [one, one._replace(dilation=0)], ValueError, r"branches\[1\]: dilation: expected .* at least 1"),
        ("branches", [one, one._replace(weight=one.weight[..., :2])], ValueError, "expected a kernel of odd size"),
        ("branches", [one, one._replace(weight=one.weight.double())], TypeError, r"weight of torch\.float32 like x"),
        ("branches", [one, one._replace(bn_bias=torch.zeros(3))], ValueError, r"bn_bias: expected shape \(4,\)"),
        ("branches", [one, one._replace(running_var=None)], ValueError, "expected both of running_mean"),
        ("branches", [one, one._replace(activation="swishy")], ValueError, "unknown activation 'swishy'"),
        ("branches", [one, one._replace(depthwise_weight=torch.zeros(5, 1, 3, 3))], ValueError,
         r"depthwise_weight of shape \(6, 1, R, S\)"),
        ("branches", [one, one._replace(depthwise_weight=torch.zeros(6, 1, 3, 3))], ValueError, r"\(K, C, 1, 1\)"),
        ("projection", values.projection._replace(bn_weight=torch.zeros(4).half()), TypeError,
         "projection: expected a bn_weight of"),
    ]  # fmt: skip


@pytest.mark.parametrize("index", range(len(_wrong())))
def test_errors_come_before_anything_runs(index: int) -> None:
    name, value, error, message = _wrong()[index]
    values, _ = block(Case((2, 6, 5, 5), (2,)))
    b = values.mapped(lambda t: t.detach().clone())
    before = [t.clone() for t in b.statistics]
    with spied() as calls, pytest.raises(error, match=message):
        aspp(*b._replace(**{name: value}))
    assert not calls
    assert all(torch.equal(a, c) for a, c in zip(b.statistics, before, strict=True))


# --------------------------------------------------------------------- dense atrous convolutions
@pytest.mark.parametrize("rate", [1, 2, 5, 9, 40])
def test_atrous_convolution_of_every_rate(rate: int) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(5, 4, 3, 3), torch.randn(5)
    for x in (torch.randn(2, 4, 7, 9), torch.randn(4, 7, 9)):
        y = atrous_conv2d(x, weight, bias, dilation=rate, padding=rate, activation="relu")
        torch.testing.assert_close(y, F.relu(F.conv2d(x, weight, bias, padding=rate, dilation=rate)))
    with pytest.raises(ValueError, match="dilation: expected an int of at least 1"):
        atrous_conv2d(x, weight, dilation=0)


ATROUS = [
    ConvCase((2, 19, 9, 8), 18, padding=(r, r), dilation=(r, r), layout="channels_last", activation="silu", stride=s)
    for r, s in ((3, (1, 1)), (6, (1, 1)), (8, (2, 1)), (40, (1, 1)))
] + [
    ConvCase((1, 17, 12, 7), 18, (5, 3), (1, 2), (4, 9), (3, 8), bias=True, norm="running", activation="silu"),
    ConvCase((1, 34, 6, 6), 36, padding=(5, 0), dilation=(5, 1), groups=2, norm="none", activation="silu"),
]  # fmt: skip


@pytest.mark.skipif(HAS_CUDA, reason="see test_conv_bn_act_triton")
@pytest.mark.parametrize("case", ATROUS, ids=str)
def test_taps_outside_of_the_image_are_left_out(case: ConvCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and both gradients, at rates within the image and beyond it; every product is told to skip."""
    from dlkern.kernels.triton import gemm_plan

    skipped = []
    original = gemm_plan.skips
    monkeypatch.setattr(gemm_plan, "skips", lambda *a: skipped.append(original(*a)) or skipped[-1])
    check_convolution(case, ("cpu", "triton"))
    assert skipped[0]
    assert len(skipped) == 3


def test_which_products_look_for_taps_to_skip() -> None:
    from dlkern.kernels.reference.conv_bn_act import Convolution
    from dlkern.kernels.triton import gemm_plan
    from dlkern.kernels.triton import implicit_gemm as gemm

    weight = torch.empty(8, 32, 3, 3, device="meta")

    def skips(rate: int, size: int, mode: int = gemm.TAPS.value) -> bool:
        return gemm_plan.skips(weight, Convolution((1, 1), (rate, rate), (rate, rate)), mode, size, size)

    assert [skips(rate, 33) for rate in (1, 2, 6, 12, 18, 100)] == [False, False, True, True, True, True]
    assert not skips(1, 2)  # without a dilation there is nothing to gain
    assert skips(18, 33, gemm.TAP_LOOP.value)
    assert not skips(18, 33, gemm.FLAT.value)


# ------------------------------------------------------------------------------------- layers
def test_atrous_conv2d_is_torchs() -> None:
    torch.manual_seed(0)
    for options in ({"padding": 6, "dilation": 6}, {"padding": "same", "dilation": (2, 3), "bias": False},
                    {"dilation": 2, "stride": 2, "groups": 2, "padding": 3, "padding_mode": "circular"}):  # fmt: skip
        layer = dlkern.nn.AtrousConv2d(4, 6, 3, **options)
        theirs = nn.Conv2d(4, 6, 3, **options)
        theirs.load_state_dict(layer.state_dict())
        x = torch.randn(2, 4, 9, 9)
        torch.testing.assert_close(layer(x), theirs(x))
    assert isinstance(layer, nn.Conv2d)
    with pytest.raises(ValueError, match=r"dilation: expected at least 1, got \(0, 0\)"):
        dlkern.nn.AtrousConv2d(4, 6, 3, dilation=0)


def test_atrous_separable_conv2d() -> None:
    torch.manual_seed(0)
    layer = dlkern.nn.AtrousSeparableConv2d(6, 8, 12, norm_layer=nn.BatchNorm2d, activation_layer=nn.ReLU)
    plain = nn.Sequential(
        nn.Conv2d(6, 6, 3, padding=12, dilation=12, groups=6), nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8)
    )
    plain[0].load_state_dict(layer.depthwise.state_dict())
    plain[1].load_state_dict(layer.pointwise.state_dict())
    x = torch.randn(2, 6, 17, 15)
    torch.testing.assert_close(layer(x), F.relu(plain(x)))


@pytest.mark.parametrize("separable", [False, True])
def test_layer_against_its_children_one_by_one(separable: bool) -> None:
    torch.manual_seed(0)
    layer = dlkern.nn.ASPP(6, (2, 3, 20, 5), 4, separable=separable)
    with torch.no_grad():
        for m in layer.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.5, 1.5), m.bias.normal_(), m.running_var.uniform_(0.5, 1.5)
    stock = copy.deepcopy(layer)
    seen = []
    stock.project.register_forward_hook(lambda *a: seen.append(1))  # with a hook the children are called
    x = torch.randn(3, 6, 9, 8)
    for training in (True, False):
        layer.train(training), stock.train(training)
        torch.manual_seed(1)
        ours = layer(x)
        torch.manual_seed(1)
        torch.testing.assert_close(ours, stock(x))
    assert seen == [1, 1]
    for a, b in zip(layer.buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        frozen = dlkern.freeze(copy.deepcopy(layer))
        torch.testing.assert_close(frozen(x), layer(x))
    with pytest.raises(RuntimeError, match="frozen"):
        frozen.train()


def test_a_refused_call_does_not_count() -> None:
    layer = dlkern.nn.ASPP(6, (2,), 4)
    with pytest.raises(ValueError, match="got one image"):
        layer(torch.randn(1, 6, 5, 5))
    with pytest.raises(ValueError, match="expected a weight of 5 input channels"):
        layer(torch.randn(2, 5, 5, 5))
    assert all(m.num_batches_tracked == 0 for m in layer.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ((), "atrous_rates: expected at least one rate, got none"),
        ((6, 0), "at least 1, got 0"),
        ((1.5,), "got 1.5"),
        (6, "got 6"),
    ],
)
def test_wrong_rates(rates: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dlkern.nn.ASPP(6, rates)


def test_a_separable_block_of_one_channel() -> None:
    layer, x = dlkern.nn.ASPP(1, (2, 3), 4, separable=True), torch.randn(2, 1, 7, 8)
    assert layer.convs[1][0][0].weight.shape == (1, 1, 3, 3)
    convs = torch.cat([conv(x) for conv in layer.eval().convs], 1)
    torch.testing.assert_close(layer(x), layer.project(convs))


def test_parts_that_do_not_belong_together() -> None:
    layer = dlkern.nn.ASPP(6, (2,), 4)
    layer.convs[1][1] = nn.GroupNorm(2, 4)
    y = layer(torch.randn(2, 6, 5, 5))  # the children, one by one
    assert y.shape == (2, 4, 5, 5)
    assert isinstance(ConvNorm(torch.zeros(1, 1, 1, 1), None, None).batch_stats, bool)
