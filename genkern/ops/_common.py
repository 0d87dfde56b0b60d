"""What ops of every family share: data types, and argument checks in words a user understands."""

import numbers

import torch

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# ---- data types


def working_type(*tensors):
    """The type of the arithmetic, and of sums: float64 where a tensor is, else float32. None counts as absent."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def in_working_type(*tensors):
    dtype = working_type(*tensors)
    return [None if t is None else t.to(dtype) for t in tensors]


def promoted(*tensors):
    """The type torch would promote the tensors to; None counts as absent."""
    dtypes = [t.dtype for t in tensors if t is not None]
    result = dtypes[0]
    for dtype in dtypes[1:]:
        if dtype is not result:
            result = torch.promote_types(result, dtype)
    return result


def same_precision(tensors):
    """The tensors (or None), all float64 where one is: kernels mix narrower types, not float64."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype is torch.float64:
            return [None if t is None else t.double() for t in tensors]
    return tensors


def sum_per_sample(x):
    """(N, ...) -> (N,); of numbers (N,) themselves."""
    return x.flatten(1).sum(1) if x.dim() > 1 else x


# ---- argument checks: "op: what must hold, got what"


def check_tensor(op, name, x, dtype=None):
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if dtype is not None and x.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {str(dtype).removeprefix('torch.')}, got {x.dtype}")


def check_float(op, name, x, dims=None):
    """x is a floating-point tensor, of `dims` dimensions if given (an int, or a tuple of the possible numbers)."""
    check_tensor(op, name, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be floating point (float32, float64, bfloat16, float16), got {x.dtype}")
    if dims is not None and x.dim() not in (dims if isinstance(dims, tuple) else (dims,)):
        expected = " or ".join(map(str, dims if isinstance(dims, tuple) else (dims,)))
        raise ValueError(f"{op}: {name} must have {expected} dimensions, got shape {tuple(x.shape)}")


def check_shape(op, name, x, shape, meaning=""):
    """x has exactly this shape; meaning: the shape in the caller's words, such as "(N, C, H, W)"."""
    if x.shape != tuple(shape):
        expected = f"{meaning} = {tuple(shape)}" if meaning else tuple(shape)
        raise ValueError(f"{op}: {name} must have shape {expected}, got {tuple(x.shape)}")


def expanded(op, name, x, other_name, shape):
    """x, which must broadcast to the shape, of that shape; no copy."""
    try:
        return x if x.shape == shape else x.expand(shape)
    except RuntimeError:
        raise ValueError(f"{op}: {name} must broadcast to the shape of {other_name}, got {tuple(shape)} and {tuple(x.shape)}") from None


def check_like(op, name, x, other_name, other):
    """x is a floating-point tensor of the shape and on the device of another one."""
    check_float(op, name, x)
    if x.shape != other.shape:
        raise ValueError(f"{op}: {name} must have the shape of {other_name}, got {tuple(other.shape)} and {tuple(x.shape)}")
    check_device(op, name, x, other_name, other)


def check_device(op, name, x, other_name, other):
    if x.device != other.device:
        raise ValueError(f"{op}: {name} must be on the device of {other_name}, got {other.device} and {x.device}")


def check_written(op, written, read=()):
    """Of the tensors that an op writes, {name: tensor}, none has an element twice in memory and no two share memory; and none shares
    it with one that is read, unless both are the same tensor."""
    names = list(written)
    for i, (name, out) in enumerate(written.items()):
        if any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)):
            raise ValueError(f"{op}: {name} must not be expanded: its elements would share memory")
        for other in names[:i]:
            if share_memory(out, written[other]):
                raise ValueError(f"{op}: {name} and {other} must not share memory")
        for x in read:
            if x is not None and share_memory(out, x) and not _same(out, x):
                raise ValueError(f"{op}: {name} must not overlap in memory with an input, unless it is that input")


def share_memory(a, b):
    """Whether two tensors may have an element in common; exact where both lie sample by sample at one distance. No under compile."""
    if torch.compiler.is_compiling() or a.device.type == "meta" or not (a.numel() and b.numel()):
        return False
    (first, length), (second, other) = (_span(t) for t in (a, b))
    if first + length <= second or second + other <= first:
        return False
    step = a.stride(0) * a.element_size() if a.dim() else 0
    if b.dim() and step and step == b.stride(0) * b.element_size():  # as columns of one tensor
        inside, width, other_width = (second - first) % step, *(_span(t[0])[1] for t in (a, b))
        if max(width, other_width) <= step:
            return inside < width or step - inside < other_width
    return True


def _span(t):
    """(address, bytes) from the first to the last element."""
    return t.data_ptr(), (1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))) * t.element_size()


def _same(a, b):
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def check_number(op, name, value):
    """value is an int or a float (also numpy's), no text and no tensor; its range is the caller's to check."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat, numbers.Real)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")


def check_int(op, name, value, least=1):
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{op}: {name} must be an int of at least {least}, got {value!r}")


def check_choice(op, name, value, choices):
    if value not in tuple(choices):
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
