"""masked_conv2d and MaskedConv2d: equal to the masked weight, blind to what is ahead, in both colour layouts."""

import pytest
import torch
import torch.nn.functional as F

import genkern
from genkern import nn, ops
from genkern.core import BACKENDS
from genkern.testing import assert_autoregressive, backends


def mask_of(weight, mask_type, colors, layout):
    """The mask tap by tap, from its definition."""
    out, channels, height, width = weight.shape
    color = lambda i, n: i * colors // n if layout == "grouped" else i % colors
    mask = torch.zeros(weight.shape, dtype=weight.dtype)
    mask[:, :, : height // 2] = 1
    mask[:, :, height // 2, : width // 2] = 1
    for o in range(out):
        for i in range(channels):
            before, own = color(i, channels) < color(o, out), color(i, channels) == color(o, out)
            mask[o, i, height // 2, width // 2] = before or (own and mask_type == "B")
    return mask


each_mask = pytest.mark.parametrize(
    "mask_type, colors, layout",
    [(m, *c) for m in "AB" for c in ((1, "grouped"), (3, "grouped"), (3, "interleaved"))],
)


each_backend = pytest.mark.parametrize("backend", ("reference", *backends(op="masked_conv2d")))


@each_backend
@each_mask
@pytest.mark.parametrize(
    "kernel, size", [((3, 3), (5, 6)), ((7, 5), (4, 3)), ((1, 3), (2, 5)), ((3, 1), (3, 2)), ((1, 1), (2, 2)), ((3, 3), (1, 1))]
)
def test_equals_the_masked_weight(mask_type, colors, layout, kernel, size, backend):
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 6, *kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    with genkern.backend(backend):
        y = ops.masked_conv2d(x, weight, bias, mask_type=mask_type, colors=colors, layout=layout)
    mask = mask_of(weight, mask_type, colors, layout)
    expected = F.conv2d(x, weight * mask, bias, padding=(kernel[0] // 2, kernel[1] // 2))
    torch.testing.assert_close(y, expected)
    leaves, upstream = (x, weight, bias), torch.randn_like(y)
    # a 1x1 kernel of type A with one colour has no live tap, hence no gradient but that of the bias
    got = torch.autograd.grad(y, leaves, upstream, allow_unused=True, materialize_grads=True)
    for a, b in zip(got, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(a, b)


@each_backend
@pytest.mark.parametrize(
    "size, outputs", [((0, 6, 2, 3), 3), ((2, 0, 2, 3), 3), ((2, 6, 0, 3), 3), ((2, 6, 2, 0), 3), ((2, 6, 2, 3), 0)]
)
def test_empty_sizes_are_sums_of_nothing(size, outputs, backend):
    leaves = [torch.randn(shape, requires_grad=True) for shape in (size, (outputs, size[1], 3, 3), (outputs,))]
    with genkern.backend(backend):
        y = ops.masked_conv2d(*leaves, mask_type="B", colors=3)
        y.sum().backward()
    assert y.shape == (size[0], outputs, *size[2:]) and not any(leaf.grad.any() for leaf in leaves[:2])
    assert torch.equal(y, leaves[2][:, None, None].expand(y.shape))


@pytest.mark.parametrize("backend", [b for b in backends(op="masked_conv2d") if b != "cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_gpu_kernels_of_narrow_types(backend, dtype):
    """They read them as they are and round once; the public function widens what lies on a CPU."""
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((1, 6, 5, 7), (210, 6, 3, 3), (210,)))
    raw = getattr(torch.ops, BACKENDS[backend].namespace)
    y = raw._masked_conv2d(x, weight, bias, True, 3, True)
    grad = torch.randn(y.shape).to(dtype)
    got = [y, *raw._masked_conv2d_backward(grad, x, weight, bias, True, 3, True)]
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = ops.masked_conv2d(*leaves, mask_type="B", colors=3)
    expected = [expected.detach(), *torch.autograd.grad(expected, leaves, grad.double())]
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        torch.testing.assert_close(a.double(), b, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", [b for b in backends(op="masked_conv2d") if b != "cpu"])
@pytest.mark.parametrize("mask_type, layout", [("A", "grouped"), ("B", "interleaved")])
def test_gpu_kernels_never_read_the_future(mask_type, layout, backend):
    """Nor does a gradient reach it."""
    torch.manual_seed(0)
    options = {"mask_type": mask_type, "colors": 3, "layout": layout}
    weight = torch.randn(6, 3, 3, 3)
    with genkern.backend(backend):
        layer = lambda x: ops.masked_conv2d(x, weight, **options)
        assert_autoregressive(layer, torch.randn(1, 3, 3, 4), order="raster", colors=3, layout=layout, strict=mask_type == "A", cuts=6)
        x = torch.randn(1, 3, 3, 4, requires_grad=True)
        upstream = torch.zeros(1, 6, 3, 4)
        upstream[:, :, 1, 2] = float("nan")
        (got,) = torch.autograd.grad(layer(x), x, upstream)
    assert got[:, :, 0, 1:].isnan().all() and got[:, :, 1, 1].isnan().all()
    assert not got[:, :, 1, 3].isnan().any() and not got[:, :, 2].isnan().any()


def test_autocast_is_followed_away_from_the_cpu(monkeypatch):
    """As by torch.nn.Conv2d. Tensors of the meta device stand for those of a GPU."""
    x, weight = (torch.empty(shape, device="meta") for shape in ((1, 3, 4, 4), (6, 3, 3, 3)))
    layer = lambda x: ops.masked_conv2d(x, weight, mask_type="A", colors=3)
    assert layer(x).dtype == torch.float32
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda device: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    assert layer(x.double()).dtype == torch.float64


@each_mask
def test_the_future_does_not_reach_the_past(mask_type, colors, layout):
    torch.manual_seed(0)
    layer = nn.MaskedConv2d(3, 9, 5, mask_type=mask_type, colors=colors, layout=layout)
    options = {"order": "raster", "colors": colors, "layout": layout, "strict": mask_type == "A"}
    assert_autoregressive(layer, torch.randn(1, 3, 5, 6), **options)


@each_mask
def test_many_outputs(mask_type, colors, layout):
    """More than fill a kernel's vectors, and some beyond, on a width of several tiles: values, gradients, bits, the future."""
    torch.manual_seed(0)
    outputs = 3 * 51 if colors == 3 else 61  # 32 + 16 + 2 + 1 a colour; 32 + 16 + 8 + 4 + 1
    shapes, options = ((2, 6, 4, 31), (outputs, 6, 5, 3), (outputs,)), {"mask_type": mask_type, "colors": colors, "layout": layout}
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    y = ops.masked_conv2d(*leaves, **options)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = F.conv2d(wide[0], wide[1] * mask_of(wide[1], mask_type, colors, layout), wide[2], padding=(2, 1))
    upstream = torch.randn(y.shape)
    got = [y.detach(), *torch.autograd.grad(y, leaves, upstream)]
    for a, b in zip(got, [expected, *torch.autograd.grad(expected, wide, upstream.double())], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=3e-5)
    x, weight, bias = (t.detach() for t in leaves)
    few = slice(0, None, outputs // colors) if layout == "grouped" else slice(0, colors)  # outputs alone take another kernel
    assert torch.equal(ops.masked_conv2d(x, weight[few], bias[few], **options), got[0][:, few])
    layer = lambda x: ops.masked_conv2d(x, weight, bias, **options)
    assert torch.equal(layer(x[1:, :, :3]), got[0][1:, :, :3])
    one = torch.randn(1, 6, 2, 17)
    assert_autoregressive(layer, one, order="raster", colors=colors, layout=layout, strict=mask_type == "A", cuts=5)


def test_a_stack_with_gates_is_autoregressive():
    torch.manual_seed(0)
    for layout in ("grouped", "interleaved"):
        options = {"colors": 3, "layout": layout}
        first = nn.MaskedConv2d(3, 12, 5, mask_type="A", **options)
        second = nn.MaskedConv2d(6, 9, 3, mask_type="B", **options)
        model = lambda x, f=first, s=second, o=options: s(ops.gated_activation(f(x), **o))
        assert_autoregressive(model, torch.randn(1, 3, 4, 4), order="raster", **options)


def test_layer_loads_the_weights_of_torch():
    twin = torch.nn.Conv2d(3, 6, 3, padding=1)
    layer = nn.MaskedConv2d(3, 6, 3, mask_type="B", colors=3)
    layer.load_state_dict(twin.state_dict())
    x = torch.randn(2, 3, 4, 5)
    with torch.no_grad():
        twin.weight *= mask_of(twin.weight, "B", 3, "grouped")
        torch.testing.assert_close(layer(x), twin(x))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"mask_type": "C"}, "mask_type must be"),
        ({"layout": "thirds"}, "layout must be"),
        ({"colors": 2}, "divisible by colors"),
        ({"weight": torch.zeros(3, 3, 2, 3)}, "must be odd"),
        ({"weight": torch.zeros(3, 1, 3, 3)}, "weight must have shape"),
        ({"bias": torch.zeros(2)}, "bias must have shape"),
    ],
)
def test_bad_arguments(change, words):
    arguments = {"x": torch.zeros(1, 3, 4, 4), "weight": torch.zeros(3, 3, 3, 3), "mask_type": "A"} | change
    with pytest.raises(ValueError, match=words):
        ops.masked_conv2d(**arguments)
    with pytest.raises(ValueError, match="must be one of"):
        nn.MaskedConv2d(3, 3, 3, mask_type="C")
    with pytest.raises(ValueError, match="must be odd"):
        nn.MaskedConv2d(3, 3, 4, mask_type="A")
