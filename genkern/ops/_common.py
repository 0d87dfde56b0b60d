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
        result = torch.promote_types(result, dtype)
    return result


def same_precision(tensors):
    """The tensors (or None), all float64 where one is: kernels mix narrower types, not float64."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype is torch.float64:
            return [None if t is None else t.double() for t in tensors]
    return tensors


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
    if tuple(x.shape) != tuple(shape):
        expected = f"{meaning} = {tuple(shape)}" if meaning else tuple(shape)
        raise ValueError(f"{op}: {name} must have shape {expected}, got {tuple(x.shape)}")


def check_like(op, name, x, other_name, other):
    """x is a floating-point tensor of the shape and on the device of another one."""
    check_float(op, name, x)
    if x.shape != other.shape:
        raise ValueError(f"{op}: {name} must have the shape of {other_name}, got {tuple(other.shape)} and {tuple(x.shape)}")
    check_device(op, name, x, other_name, other)


def check_device(op, name, x, other_name, other):
    if x.device != other.device:
        raise ValueError(f"{op}: {name} must be on the device of {other_name}, got {other.device} and {x.device}")


def check_number(op, name, value):
    """value is an int or a float (also numpy's), no text and no tensor; its range is the caller's to check."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat, numbers.Real)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")


def check_choice(op, name, value, choices):
    if value not in tuple(choices):
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
