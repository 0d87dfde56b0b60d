"""CausalConv1d: torch.nn.Conv1d that sees no future, and its step."""

import torch

from genkern import ops
from genkern.ops.autoregressive._causal_conv1d_dense import dense, dense_silu, pack_dense, pays_dense


class CausalConv1d(torch.nn.Conv1d):
    """torch.nn.Conv1d over (N, C, L) whose output at time t sees the inputs up to t: genkern.ops.causal_conv1d.

    Arguments and state_dict are those of torch.nn.Conv1d. stride must be 1, padding 0 and padding_mode "zeros": the past of
    (kernel_size - 1) dilation zeros is implied, so the length is kept. activation: None, "silu" or "gated", which halves
    the out_channels and takes a condition; where they are part of the same pass says genkern.ops.causal_conv1d.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bias=True,
        padding_mode="zeros",
        device=None,
        dtype=None,
        *,
        activation=None,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        if self.stride != (1,) or self.padding != (0,) or padding_mode != "zeros":
            raise ValueError(
                f'CausalConv1d: stride must be 1, padding 0 and padding_mode "zeros", got {stride}, {padding} and {padding_mode!r}'
            )
        if activation not in (None, "silu", "gated"):
            raise ValueError(f"CausalConv1d: activation must be None, 'silu' or 'gated', got {activation!r}")
        self.activation = activation

    def forward(self, input, condition=None):
        return ops.causal_conv1d(input, self.weight, self.bias, condition=condition, **self._options())

    def step(self, input, state=None, condition=None):
        """(output, state) for the next input (N, C), or inputs (N, C, T); state: that of the previous call, None at the start.
        condition: of these inputs, (N, C_out), or (N, C_out, T or 1).

        Without gradients a state is used up by the step that takes it, and may hold the weights as they were at the start. In float32
        on the CPU the output has the bits of forward(), for any T and any batch.
        """
        if input.dim() not in (2, 3) or input.shape[1] != self.in_channels:
            raise ValueError(f"CausalConv1d: step: input must be (N, {self.in_channels}) or with T behind, got {tuple(input.shape)}")
        several = input if input.dim() == 3 else input[..., None]
        condition = condition[..., None] if condition is not None and condition.dim() == 2 else condition
        quick = not torch.is_grad_enabled() and input.device.type == "cpu" and input.dtype == self.weight.dtype == torch.float32
        depthwise = self.groups == self.in_channels == self.out_channels
        if quick and not depthwise and pays_dense(self.weight, self.groups):
            state = state if isinstance(state, DenseState) else DenseState(self, several, state)
            output = state.step(several)
            output = ops.gated_activation(output, condition) if self.activation == "gated" else output
        else:
            if isinstance(state, DenseState):
                state = state.past()
            if state is None:
                past = (self.kernel_size[0] - 1) * self.dilation[0]
                state = input.new_zeros(input.shape[0], self.in_channels, past)
            if depthwise and self.activation != "gated" and not torch.is_grad_enabled():
                output = ops.causal_conv1d_update(
                    several, state, self.weight, self.bias, dilation=self.dilation[0], activation=self.activation
                )
            else:
                output, state = ops.causal_conv1d(
                    several,
                    self.weight,
                    self.bias,
                    initial_state=state,
                    return_final_state=True,
                    condition=condition,
                    **self._options(),
                )
        return output if input.dim() == 3 else output[..., 0], state

    def _options(self):
        return {"dilation": self.dilation[0], "groups": self.groups, "activation": self.activation}


class DenseState:
    """The inputs of a dense CausalConv1d so far, and its weights as the kernel reads them.

    The inputs stand one behind the other in a buffer (N, time, C), each a row; when it is full the last ones move to its beginning,
    so that a step costs no copy of the past.
    """

    def __init__(self, layer, x, past=None):
        self.size, self.at = (layer.kernel_size[0] - 1) * layer.dilation[0], 0
        self.weight, self.bias, self.options = layer.weight.detach().contiguous(), layer.bias, (layer.dilation[0], layer.groups)
        self.packed = pack_dense(self.weight, layer.groups)
        self.op = dense_silu if layer.activation == "silu" else dense
        self.buffer = x.new_zeros(x.shape[0], 2 * self.size + 64, x.shape[1]) if self.size else None
        if past is not None and self.size:
            self.buffer[:, : self.size] = past.transpose(1, 2)

    def past(self):
        return self.buffer[:, self.at : self.at + self.size].transpose(1, 2) if self.size else None

    def step(self, x):
        state = None
        if self.size:
            if len(x) != len(self.buffer):
                raise ValueError(f"CausalConv1d: step: input must have the {len(self.buffer)} samples of its state, got {len(x)}")
            end = self.at + self.size + x.shape[2]
            if end > self.buffer.shape[1]:
                end -= self.at
                room = self.buffer if end <= self.buffer.shape[1] else self.buffer.new_empty(len(x), end + self.size + 64, x.shape[1])
                room[:, : self.size] = self.buffer[:, self.at : self.at + self.size].clone()
                self.buffer, self.at = room, 0
            self.buffer[:, self.at + self.size : end] = x.transpose(1, 2)
            state = self.past()
            self.at = end - self.size
        return self.op(x, state, self.weight, self.bias, self.packed, *self.options)
