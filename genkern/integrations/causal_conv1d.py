"""The functions of the causal-conv1d package, on genkern's ops: any width, on the CPU as well.

    from genkern.integrations.causal_conv1d import causal_conv1d_fn, causal_conv1d_update

Their names, arguments and layouts are those of that package, whose results have the type of x.
"""

import torch

from genkern import ops


def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None, activation=None
):
    """x (batch, dim, seqlen), weight (dim, width), bias (dim,), seq_idx (batch, seqlen), initial_states (batch, dim, width - 1).

    Returns out (batch, dim, seqlen), and with return_final_states also (batch, dim, width - 1), in final_states_out if given.
    activation: None, "silu" or "swish". seq_idx below zero marks padding, whose outputs are zero.
    """
    result = ops.causal_conv1d(
        x,
        weight[:, None],
        bias,
        groups=x.shape[1],
        activation=_activation(activation),
        initial_state=initial_states,
        return_final_state=return_final_states,
        seq_idx=None if seq_idx is None else seq_idx.to(torch.int32),
    )
    if not return_final_states:
        return result.to(x.dtype)
    out, final = result
    final = final.to(x.dtype) if final_states_out is None else final_states_out.copy_(final)
    return out.to(x.dtype), final


def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None):
    """x (batch, dim) or (batch, dim, seqlen), conv_state (slots, dim, state_len >= width - 1), updated in place; weight (dim, width).

    conv_state_indices (batch,): the slot of each request, -1 an empty one. cache_seqlens (batch,): conv_state is a ring, into which
    input i of a request goes at (cache_seqlens + i) % state_len; None: it is shifted.
    """
    indices = None if conv_state_indices is None else conv_state_indices.to(torch.int32)
    options = {"activation": _activation(activation)}
    with torch.no_grad():
        if cache_seqlens is None:
            return ops.causal_conv1d_update(x, conv_state, weight, bias, state_indices=indices, **options).to(x.dtype)
        slots = torch.arange(x.shape[0], device=x.device) if indices is None else indices.long()
        return _update_ring(x, conv_state, weight, bias, cache_seqlens.long(), slots, options).to(x.dtype)


def _update_ring(x, rings, weight, bias, lengths, slots, options):
    several = x if x.dim() == 3 else x[..., None]
    size, past, steps = rings.shape[2], weight.shape[1] - 1, several.shape[2]
    ring = rings[slots.clamp(min=0)]
    at = lambda offsets: ((lengths[:, None] + offsets) % size)[:, None].expand(-1, ring.shape[1], -1)
    state = ring.gather(2, at(torch.arange(-past, 0, device=x.device)))
    out = ops.causal_conv1d_update(several, state, weight, bias, **options)
    kept = torch.arange(max(0, steps - size), steps, device=x.device)  # of more inputs than the ring holds, the last
    ring.scatter_(2, at(kept), several[..., kept].to(ring.dtype))
    live = slots >= 0
    rings[slots[live]] = ring[live]
    out = torch.where(live[:, None, None], out, 0)
    return out if x.dim() == 3 else out[..., 0]


def _activation(name):
    if name not in (None, "silu", "swish"):
        raise NotImplementedError(f"causal_conv1d: activation must be None, 'silu' or 'swish', got {name!r}")
    return "silu" if name == "swish" else name
