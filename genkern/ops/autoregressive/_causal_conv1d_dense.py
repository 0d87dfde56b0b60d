"""The dense form of causal_conv1d: a product of matrices over channels and taps, for one group or a few wide ones, with WaveNet's gate
in the same pass where it is asked for."""

import torch
import torch.nn.functional as F

from genkern.core import Op, implements
from genkern.core._backends import forced
from genkern.ops._common import in_working_type, promoted, same_precision, working_type


def behind(x, state, past):
    """x behind its state, or behind zeros."""
    if past == 0:
        return x
    return F.pad(x, (past, 0)) if state is None else torch.cat([state.to(x.dtype), x], 2)


def takes_kernels(x, dtype):
    """Whether x goes to the dense kernels. On a GPU torch's convolution multiplies narrow types, and all inside autocast, on tensor
    cores: nothing else is the default there before it was timed."""
    if x.device.type == "cuda" and forced() in (None, "cpu", "emulated"):
        return dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cuda")
    return x.device.type in ("cpu", "cuda")


def for_kernel(op, x, state, weight, bias, *condition):
    """The tensors as the backend of the dense ops takes them: the CPU's kernels all in the type of the arithmetic."""
    tensors = x, state, weight.contiguous(), None if bias is None else bias.contiguous(), *condition
    return in_working_type(*tensors) if op.backend_of(x) == "cpu" else same_precision(tensors)


def pays_dense(weight, groups):
    """The dense kernel computes 16 outputs of a group at once: of many groups of a few outputs it would waste most."""
    return groups == 1 or weight.shape[0] >= 4 * groups


def pack_dense(weight, groups=1):
    """weight (C_out, C / groups, K) as the dense kernel reads it, for calls so short that packing would be most of the work."""
    outputs, channels, taps = weight.shape
    rows = F.pad(weight.detach().view(groups, -1, channels, taps), (0, 0, 0, 0, 0, -(outputs // groups) % 16))
    return rows.view(groups, -1, 16, channels, taps).permute(0, 1, 4, 3, 2).contiguous()


def _reference_dense(x, state, weight, bias, packed, dilation, groups):
    dtype = promoted(x, state, weight, bias)
    x, state, weight, bias = in_working_type(x, state, weight, bias)
    padded = behind(x, state, (weight.shape[2] - 1) * dilation)
    return F.conv1d(padded, weight, bias, dilation=dilation, groups=groups).to(dtype)


def _reference_dense_silu(*args):
    return F.silu(_reference_dense(*args))


def _reference_gated(x, state, weight, bias, packed, condition, dilation):
    dtype = promoted(x, state, weight, bias, condition)
    x, state, weight, bias, condition = in_working_type(x, state, weight, bias, condition)
    y = _reference_dense(x, state, weight, bias, None, dilation, 1)
    a, b = (y if condition is None else y + condition).chunk(2, 1)
    return (torch.tanh(a) * torch.sigmoid(b)).to(dtype)


def _dense_backward(grad, x, state, weight, bias, packed, dilation, groups):
    """torch's own, but for the CPU's kernels: two products of matrices that cuDNN computes at the machine's limit, with tensor cores,
    and unlike those of the forward pass their bits are promised to nobody: they need not be the same in pieces. As for
    torch.nn.Conv1d, torch.backends.cudnn says whether they may use TF32 and whether every run gives the same bits."""
    given = x, state, weight, bias
    dtype = promoted(*given) if x.is_cuda else working_type(*given)  # cuDNN adds narrow types up in float32
    x, state, weight, grad = (None if t is None else t.to(dtype) for t in (x, state, weight, grad))
    past = (weight.shape[2] - 1) * dilation
    sizes, wanted = None if bias is None else list(bias.shape), [True, True, bias is not None]
    padded = behind(x, state, past)
    of_x, of_weight, of_bias = torch.ops.aten.convolution_backward(
        grad.contiguous(), padded, weight, sizes, [1], [0], [dilation], False, [0], groups, wanted
    )
    got = of_x[..., past:], of_x[..., :past], of_weight, of_bias
    return [g.to(t.dtype).contiguous() for g, t in zip(got, given, strict=True) if t is not None]


for _backend in ("cuda", "triton", "emulated"):
    implements(_backend, "causal_conv1d_dense_backward")(_dense_backward)


def _fake_dense(x, state, weight, bias, packed, dilation, groups):
    return x.new_empty((x.shape[0], weight.shape[0], x.shape[2]), dtype=promoted(x, state, weight, bias))


dense = Op(
    "causal_conv1d_dense",
    "(Tensor x, Tensor? state, Tensor weight, Tensor? bias, Tensor? packed, int dilation, int groups) -> Tensor",
    reference=_reference_dense,
    fake=_fake_dense,
    differentiable=("x", "state", "weight", "bias"),
)


dense_silu = Op(  # SiLU in the same pass: on the CPU, where no gradient is asked for
    "causal_conv1d_dense_silu",
    "(Tensor x, Tensor? state, Tensor weight, Tensor? bias, Tensor? packed, int dilation, int groups) -> Tensor",
    reference=_reference_dense_silu,
    fake=_fake_dense,
)


gated = Op(
    "causal_conv1d_gated",
    "(Tensor x, Tensor? state, Tensor weight, Tensor? bias, Tensor? packed, Tensor? condition, int dilation) -> Tensor",
    reference=_reference_gated,
    fake=lambda x, state, weight, bias, packed, condition, dilation: x.new_empty(
        (x.shape[0], weight.shape[0] // 2, x.shape[2]), dtype=promoted(x, state, weight, bias, condition)
    ),
)
