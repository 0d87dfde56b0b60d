"""CausalConv1d: torch.nn.Conv1d that sees no future, and its step."""

import torch

from genkern import ops


class CausalConv1d(torch.nn.Conv1d):
    """torch.nn.Conv1d over (N, C, L) whose output at time t sees the inputs up to t: genkern.ops.causal_conv1d.

    Arguments and state_dict are those of torch.nn.Conv1d. stride must be 1, padding 0 and padding_mode "zeros": the past of
    (kernel_size - 1) dilation zeros is implied, so the length is kept. activation: None or "silu", fused where groups equals both
    channel numbers.
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
        if activation not in (None, "silu"):
            raise ValueError(f"CausalConv1d: activation must be None or 'silu', got {activation!r}")
        self.activation = activation

    def forward(self, input):
        return ops.causal_conv1d(input, self.weight, self.bias, **self._options())

    def step(self, input, state=None):
        """(output, state) for the next input (N, C), or inputs (N, C, T); state: that of the previous call, None at the start.

        Without gradients the state of a depthwise layer is shifted in place.
        """
        several = input if input.dim() == 3 else input[..., None]
        if state is None:
            past = (self.kernel_size[0] - 1) * self.dilation[0]
            state = input.new_zeros(input.shape[0], self.in_channels, past)
        if self.groups == self.in_channels == self.out_channels and not torch.is_grad_enabled():
            output = ops.causal_conv1d_update(
                several, state, self.weight, self.bias, dilation=self.dilation[0], activation=self.activation
            )
        else:
            output, state = ops.causal_conv1d(
                several, self.weight, self.bias, initial_state=state, return_final_state=True, **self._options()
            )
        return output if input.dim() == 3 else output[..., 0], state

    def _options(self):
        return {"dilation": self.dilation[0], "groups": self.groups, "activation": self.activation}
