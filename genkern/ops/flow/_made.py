"""masked_linear, and made_inverse: a masked network run input by input in the arithmetic of about one pass."""

import torch
import torch.nn.functional as F

from genkern.ops._common import check_choice, check_device, check_float, check_int, check_shape, check_tensor, promoted

LAYOUTS = ("blocks", "interleaved")
_BLOCK = 32  # inputs


def masked_linear(x, weight, mask, bias=None):
    """x (weight * mask)^T + bias: a layer of MADE (Germain et al., 2015, equation 7).

    x               (..., I)
    weight, mask    (O, I); mask is boolean, or of a floating-point type
    bias            (O,) or None

    Floating-point types as torch.nn.functional.linear, promoted, and as that under autocast. TypeError, ValueError on anything else.
    Differentiable to any order.
    """
    op = "masked_linear"
    check_float(op, "x", x)
    check_float(op, "weight", weight, 2)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{op}: x must be (..., {weight.shape[1]}) for weight {tuple(weight.shape)}, got {tuple(x.shape)}")
    if not isinstance(mask, torch.Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise TypeError(f"{op}: mask must be a boolean or floating-point tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    check_shape(op, "mask", mask, weight.shape, "(O, I)")
    check_device(op, "weight", weight, "x", x)
    check_device(op, "mask", mask, "x", x)
    if bias is not None:
        check_float(op, "bias", bias)
        check_shape(op, "bias", bias, weight.shape[:1], "(O,)")
        check_device(op, "bias", bias, "x", x)
    dtype = promoted(x, weight, bias)
    weight = (weight * mask).to(dtype)
    return F.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype))


def made_masks(degrees, per_input=1, layout="blocks"):
    """Boolean masks (O, I) of the layers of a MADE: a hidden unit sees what has at most its degree, an output what has less than that
    of its input (Germain et al., 2015, equations 8-9).

    degrees     of the inputs, a permutation of 1 ... D that says in which order they are generated; then one tensor of degrees for
                each hidden layer
    per_input   P numbers for each input, laid out as `layout` says: "blocks": all first ones, all second ones, ... (P D);
                "interleaved": those of one input together (D P)

    TypeError, ValueError on anything else.
    """
    check_choice("made_masks", "layout", layout, LAYOUTS)
    check_int("made_masks", "per_input", per_input)
    if not isinstance(degrees, (list, tuple)) or len(degrees) < 1:
        raise ValueError(f"made_masks: degrees must be a list of tensors, the first those of the inputs, got {degrees!r}")
    for degree in degrees:
        check_tensor("made_masks", "degrees", degree)
    inputs = degrees[0]
    outputs = inputs.repeat(per_input) if layout == "blocks" else inputs.repeat_interleave(per_input)
    hidden = [above[:, None] >= below[None, :] for below, above in zip(degrees, degrees[1:], strict=False)]
    return [*hidden, outputs[:, None] > degrees[-1][None, :]]


@torch.no_grad()
def made_inverse(element, batch, layers, degrees, *, activation=F.relu, layout="blocks", bias_of_sample=None):
    """(x, params): x of a masked autoregressive model, input by input: x_d = element(d, params_d), where params_d is what the network
    says about input d given the inputs before it. Sampling from a MADE, and the inverse of a masked autoregressive flow
    (Papamakarios et al., 2017, section 3), usually one pass of the network for each of D inputs.

    A hidden unit is final once the inputs up to its degree are, so with each input just the units of its degree are computed and
    their contributions added to what comes after them: all in all the multiplications of about one pass.

    element         (d, params_d) -> x_d (batch,); params_d is a view (batch, P). d is the position in x
    batch           N
    layers          ((weight, bias), ...) of the network, first to last, masked by `made_masks` or not: what lies under the masks is
                    never read. weight (O, I), bias (O,) or None. The last one has P D outputs
    degrees         of the inputs and of each hidden layer, as for `made_masks`. Fastest with the degrees of hidden layers sorted
    activation      between the layers, elementwise
    layout          of the outputs, as for `made_masks`
    bias_of_sample  None, or (N, O) added to the first layer's sums: a condition's part

    Returns x (N, D) and the network's outputs (N, P D) for that x, without a graph: for gradients pass x through the network once.
    Floating-point types of the weights. TypeError, ValueError on bad arguments.
    """
    weights, biases = [w for w, _ in layers], [b for _, b in layers]
    inputs = _check_made(batch, weights, biases, degrees, layout, bias_of_sample)
    order = degrees[0].argsort()  # of generation
    weights, biases, bias_of_sample, ends = _sorted(weights, biases, degrees, order, layout, bias_of_sample)
    per_input = weights[-1].shape[0] // inputs
    states = [w.new_zeros(batch, w.shape[1]) for w in weights]  # the inputs, then the hidden layers
    sums = [w.new_zeros(batch, len(w)) if b is None else b.expand(batch, -1).clone() for w, b in zip(weights, biases, strict=True)]
    if bias_of_sample is not None:
        sums[0] += bias_of_sample
    params = sums[-1].view(batch, inputs, per_input)

    layers_hidden = range(len(weights) - 1)
    sizes = [
        [e[0], *(b - a for a, b in zip(e, e[1:], strict=False)), len(d) - e[-1]] for e, d in zip(ends[1:], degrees[1:], strict=True)
    ]
    sizes.append([per_input] * inputs)
    # views by degree (outputs: by input), made at once: a step is a few small calls, whose cost is that of making views
    columns, outputs = states[0].unbind(1), params.unbind(1)
    sums_of = [total.split(size, 1) for total, size in zip(sums, sizes, strict=True)]
    weights_of = [w.t().split(size, 1) for w, size in zip(weights, sizes, strict=True)]
    units_of = [state.split(size, 1) for state, size in zip(states[1:], sizes, strict=False)]

    def add(total, state, weight, first, last):
        """To the sums of some units what units [first, last) of the layer before contribute; weight (I, O)."""
        if first < last and total.shape[1]:
            total.addmm_(state.narrow(1, first, last - first), weight.narrow(0, first, last - first))

    def complete(known, done):
        """The hidden units of degree `done`; what the first `known` units of the layer before contribute is in their sums."""
        for i in layers_hidden:
            add(sums_of[i][done], states[i], weights_of[i][done], known[i], ends[i][done])
            units_of[i][done].copy_(activation(sums_of[i][done]))

    complete([0] * len(weights), 0)
    for done, d in enumerate(order.tolist()):
        if done % _BLOCK == 0:  # one product of a layer for all units of the next block: a step then adds what is new in the block
            known, stop = [e[done] for e in ends], min(done + _BLOCK, inputs)
            for i, (total, weight) in enumerate(zip(sums, weights, strict=True)):
                rows = slice(ends[i + 1][done], ends[i + 1][stop]) if i in layers_hidden else slice(done * per_input, stop * per_input)
                add(total[:, rows], states[i], weight[rows].t(), 0, known[i])
        add(sums_of[-1][done], states[-1], weights_of[-1][done], known[-1], ends[-1][done])
        columns[done].copy_(element(d, outputs[done]))
        complete(known, done + 1)
    back = order.argsort()
    params = params[:, back]
    return states[0][:, back], (params.transpose(1, 2) if layout == "blocks" else params).flatten(1)


def _sorted(weights, biases, degrees, order, layout, bias_of_sample):
    """Weights and biases with inputs in the order of generation, hidden units by degree and the outputs of one input together; and for
    each layer a list: how many of its units have at most degree 0, 1, ..."""
    inputs = len(order)
    places = [order]
    for degree in degrees[1:]:
        places.append(None if bool((degree[1:] >= degree[:-1]).all()) else degree.argsort(stable=True))
    outputs = torch.arange(weights[-1].shape[0], device=order.device)
    outputs = (outputs.view(-1, inputs)[:, order].t() if layout == "blocks" else outputs.view(inputs, -1)[order]).flatten()
    places.append(outputs)
    places = [None if p is None or torch.equal(p, torch.arange(len(p), device=p.device)) else p for p in places]
    for i, (rows, columns) in enumerate(zip(places[1:], places, strict=False)):
        weights[i] = weights[i] if columns is None else weights[i][:, columns]
        weights[i] = weights[i] if rows is None else weights[i][rows]
        biases[i] = biases[i] if rows is None or biases[i] is None else biases[i][rows]
    if bias_of_sample is not None and places[1] is not None:
        bias_of_sample = bias_of_sample[:, places[1]]
    counts = torch.arange(inputs + 1, device=order.device)
    ends = [torch.searchsorted(degree.sort().values.contiguous(), counts, right=True).tolist() for degree in degrees]
    return weights, biases, bias_of_sample, ends


def _check_made(batch, weights, biases, degrees, layout, bias_of_sample):
    op = "made_inverse"
    check_choice(op, "layout", layout, LAYOUTS)
    check_int(op, "batch", batch, 0)
    if len(degrees) != len(weights) or not weights:
        raise ValueError(f"{op}: degrees must be of the inputs and of each hidden layer, got {len(degrees)} for {len(weights)} layers")
    inputs = len(degrees[0])
    if not torch.equal(degrees[0].sort().values, torch.arange(1, inputs + 1, device=degrees[0].device)):
        raise ValueError(f"{op}: the degrees of the inputs must be a permutation of 1 ... {inputs}")
    below = inputs
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        check_float(op, "weight", weight, 2)
        rows = len(degrees[i + 1]) if i + 1 < len(degrees) else max(1, weight.shape[0] // max(inputs, 1)) * inputs
        check_shape(op, f"weight {i}", weight, (rows, below), "(O, I)")
        if bias is not None:
            check_shape(op, f"bias {i}", bias, (rows,), "(O,)")
        below = rows
    if bias_of_sample is not None:
        check_shape(op, "bias_of_sample", bias_of_sample, (batch, weights[0].shape[0]), "(N, O)")
    return inputs
