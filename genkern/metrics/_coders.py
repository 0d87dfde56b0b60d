"""Simple coders beside which a held-out figure means something, computed from the data itself: bits per symbol."""

import io
import math

import torch

from genkern.ops._common import check_int, check_tensor


def ngram_bits(train, test, order, *, vocabulary=256):
    """Bits per symbol of test under the counts of train with contexts of order - 1 symbols: a float. order 2: bigrams.

    train, test: uint8 or int64 (N, T); contexts do not reach into the row before. Absolute discounting (Ney, Essen & Kneser, 1994):
    p(a | context) = (max(count(context a) - 3/4, 0) + 3/4 kinds(context) p(a | shorter context)) / count(context), where kinds counts
    the different symbols seen there; a context that was never seen is shortened, and below the empty one is the uniform distribution.
    """
    check_int("ngram_bits", "order", order)
    check_int("ngram_bits", "vocabulary", vocabulary)
    for name, x in (("train", train), ("test", test)):
        check_tensor("ngram_bits", name, x)
        whole = x.dim() == 2 and not x.is_floating_point() and x.numel() > 0
        if not whole or int(x.min()) < 0 or int(x.max()) >= vocabulary:
            got = f"{x.dtype} {tuple(x.shape)}"
            raise ValueError(f"ngram_bits: {name} must be integers (N, T) in 0..{vocabulary - 1}, N and T at least 1, got {got}")
    train, test = train.long(), test.long()
    discount, p = 0.75, torch.full(test.shape, 1 / vocabulary, dtype=torch.float64)
    for length in range(1, order + 1):  # of the context and its symbol
        if test.shape[1] < length:
            break
        context, context_test = _codes(train, length - 1, 1, vocabulary), _codes(test, length - 1, 1, vocabulary)
        full, full_test = _codes(train, length, 0, vocabulary), _codes(test, length, 0, vocabulary)
        seen, counts = full.unique(return_counts=True)
        contexts, totals = context.unique(return_counts=True)
        kinds = torch.zeros_like(totals).index_add_(0, torch.searchsorted(contexts, seen // vocabulary), torch.ones_like(counts))
        count, total, kind = _look(seen, counts, full_test), _look(contexts, totals, context_test), _look(contexts, kinds, context_test)
        shorter = p[:, length - 1 :].flatten()
        mixed = ((count - discount).clamp(min=0) + discount * kind * shorter) / total
        p[:, length - 1 :] = torch.where(total > 0, mixed, shorter).view(len(test), -1)
    return float(-p.log2().mean())


def png_bits(pictures):
    """Bits per value of pictures, uint8 (1 or 3, H, W) each, as PNG files of Pillow's best compression, headers included: a float."""
    from PIL import Image

    pictures, written = list(pictures), io.BytesIO()
    if not pictures:
        raise ValueError("png_bits: there are no pictures")
    for picture in pictures:
        check_tensor("png_bits", "each picture", picture, torch.uint8)
        if picture.dim() != 3 or len(picture) not in (1, 3) or picture.numel() == 0:
            raise ValueError(f"png_bits: each picture must be (1 or 3, H, W), got {tuple(picture.shape)}")
        pixels = picture[0] if len(picture) == 1 else picture.permute(1, 2, 0)
        Image.fromarray(pixels.contiguous().numpy()).save(written, "PNG", optimize=True)
    return 8 * written.tell() / sum(picture.numel() for picture in pictures)


def _codes(rows, length, spare, vocabulary):
    """One number for each run of `length` symbols that `spare` more follow in its row."""
    starts = rows.shape[1] - length - spare + 1
    code = torch.zeros(len(rows), starts, dtype=torch.int64)
    for i in range(length):
        code = code * vocabulary + rows[:, i : i + starts]
    return code.flatten()


def _look(keys, values, wanted):
    place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return torch.where(keys[place] == wanted, values[place], 0).double()


def lpc_bits(levels, amplitudes, *, orders=(0, 1, 2, 4, 8, 16, 32), coefficient_bits=12):
    """Bits per sample of a linear-prediction coder, as in lossless audio formats: a float.

    levels      int64 (N, L): the level of each sample, one row a block; amplitudes (levels,) ascending: what the levels stand for
    Of every block its predictor by least squares, rounded to coefficient_bits, is sent first (and 8 bits for order and scale), then
    each level by a Laplace distribution around the prediction, integrated over the level's bin: the ideal length of an arithmetic
    coder. Order and scale are the best of each block.
    """
    check_tensor("lpc_bits", "levels", levels)
    if levels.dim() != 2 or levels.is_floating_point() or levels.numel() == 0:
        raise ValueError(f"lpc_bits: levels must be integers (N, L), N and L at least 1, got {levels.dtype} {tuple(levels.shape)}")
    check_tensor("lpc_bits", "amplitudes", amplitudes)
    a = amplitudes.double()
    if a.dim() != 1 or len(a) < 2 or not (a[1:] > a[:-1]).all():
        raise ValueError(f"lpc_bits: amplitudes must ascend, at least 2 of them, got shape {tuple(a.shape)}")
    if levels.min() < 0 or levels.max() >= len(a):
        raise ValueError(f"lpc_bits: levels must be in 0..{len(a) - 1}, got {int(levels.min())}..{int(levels.max())}")
    edges = torch.cat([a.new_tensor([-math.inf]), (a[1:] + a[:-1]) / 2, a.new_tensor([math.inf])])
    x = a[levels]
    low, high = edges[levels], edges[levels + 1]
    step = float((a[1:] - a[:-1]).min())
    scales = [step * 2 ** (i / 2) for i in range(-2, 2 * math.ceil(math.log2(float(a[-1] - a[0]) / step)))]
    best = torch.full((len(x),), math.inf, dtype=torch.float64)
    for order in orders:
        if order:
            past = torch.nn.functional.pad(x, (order, 0))[:, :-1].unfold(1, order, 1)  # (N, L, order), the oldest first
            gram = past.mT @ past + 1e-9 * torch.eye(order, dtype=torch.float64)
            weights = torch.linalg.solve(gram, past.mT @ x[..., None])
            unit = 2.0 ** (2 - coefficient_bits)  # coefficients in about [-2, 2]
            guess = (past @ ((weights / unit).round() * unit))[..., 0]
        else:
            guess = torch.zeros_like(x)
        for scale in scales:
            probability = _laplace(high - guess, scale) - _laplace(low - guess, scale)
            far = torch.maximum(-(high - guess), low - guess).clamp(min=0) / scale  # where the difference of two ones is no number
            bits = torch.where(probability > 1e-12, -probability.clamp(min=1e-300).log2(), (far + 27.6) / math.log(2))
            best = torch.minimum(best, bits.sum(1) + order * coefficient_bits + 8)
    return float(best.sum() / x.numel())


def _laplace(x, scale):
    """Its distribution function."""
    tail = 0.5 * torch.exp(-x.abs() / scale)
    return torch.where(x < 0, tail, 1 - tail)
