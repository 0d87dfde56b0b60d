"""Pictures of samples and of training, for files and notebooks alike: grid(images) is shown by a notebook as it is."""

import math

import torch

from genkern._extras import extra
from genkern.ops._common import check_int, check_tensor


def grid(images, *, levels=None, columns=None, scale=None):
    """A PIL image of the tiles of images (N, C, H, W), or (rows, columns, C, H, W), C 1 or 3.

    uint8 0..levels (default 255), or float in [-1, 1]. scale: whole pixels per pixel; by default small tiles grow to 32.
    """
    Image = extra("grid", "PIL.Image", "Pillow")
    if not isinstance(images, torch.Tensor) or images.dim() not in (4, 5) or images.shape[-3] not in (1, 3) or images.numel() == 0:
        found = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(f"grid: images must be (N, C, H, W) with C 1 or 3 and N at least 1, got {found}")
    for name, value in (("levels", levels), ("columns", columns), ("scale", scale)):
        if value is not None:
            check_int("grid", name, value)
    if images.dim() == 5:
        columns, images = images.shape[1], images.flatten(0, 1)
    x = images.detach().cpu()
    if x.dtype == torch.uint8:
        top = 255 if levels is None else levels
        if x.max() > top:
            raise ValueError(f"grid: uint8 images must be in [0, {top}], found {x.max()}")
        x = x.float() / top
    elif x.is_floating_point():
        x = x.float()
        if not (x.min() >= -1 and x.max() <= 1):
            raise ValueError(f"grid: float images must be in [-1, 1], found [{x.min():g}, {x.max():g}]")
        x = (x + 1) / 2
    else:
        raise TypeError(f"grid: images must be uint8 or float, got {images.dtype}")
    n, c, h, w = x.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    scale = scale or max(1, 32 // max(h, w))
    canvas = torch.full((rows * columns, c, h + 1, w + 1), 0.5)  # a grey line around each tile
    canvas[:n, :, 1:, 1:] = x
    canvas = canvas.view(rows, columns, c, h + 1, w + 1).permute(0, 3, 1, 4, 2).reshape(rows * (h + 1), columns * (w + 1), c)
    pixels = (canvas * 255).round().to(torch.uint8).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    return Image.fromarray(pixels.squeeze(-1).numpy() if c == 1 else pixels.numpy())


def spectrograms(sounds, *, size=256, floor=80):
    """A PIL image of sounds (N, 1, L), one below the other: time to the right, frequency upwards, white the loudest.

    size: samples per window, which overlap by three quarters; floor: decibels below the loudest that are black.
    """
    Image = extra("spectrograms", "PIL.Image", "Pillow")
    if not isinstance(sounds, torch.Tensor) or sounds.dim() != 3 or sounds.shape[1] != 1 or sounds.numel() == 0:
        found = tuple(sounds.shape) if isinstance(sounds, torch.Tensor) else type(sounds).__name__
        raise ValueError(f"spectrograms: sounds must be (N, 1, L) with N and L at least 1, got {found}")
    check_int("spectrograms", "size", size, 4)
    x = torch.nn.functional.pad(sounds[:, 0].detach().cpu().float(), (size // 2, size // 2))
    power = torch.stft(x, size, size // 4, window=torch.hann_window(size), center=False, return_complex=True).abs() ** 2  # (N, F, T)
    decibels = 10 * torch.log10(power / power.max().clamp(min=1e-12) + 1e-12)
    pixels = ((decibels / floor + 1).clamp(0, 1) * 255).round().to(torch.uint8).flip(1)
    pixels = torch.nn.functional.pad(pixels, (0, 0, 0, 1), value=128).flatten(0, 1).repeat_interleave(4, 1)
    return Image.fromarray(pixels.numpy())


def curves(history):
    """A matplotlib figure of a history that fit() returned (or history.json): the losses in training and validation per epoch."""
    Figure = extra("curves", "matplotlib.figure", "matplotlib").Figure  # without pyplot: no window, no global state
    if not isinstance(history, list) or not history:
        got = "an empty list" if history == [] else type(history).__name__
        raise ValueError(f"curves: history must be the list that fit() returned, one dict per epoch, got {got}")
    names = [name for name in history[-1] if name not in ("epoch", "seconds") and not name.startswith("validation_")]
    figure = Figure(figsize=(4 * len(names), 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for key, label in ((name, "training"), (f"validation_{name}", "validation")):
            if key in history[-1]:
                axes.plot(
                    [row["epoch"] for row in history], [row.get(key) for row in history], label=label, marker="." * (len(history) < 30)
                )
        axes.set(xlabel="epoch", title=name)
        axes.legend()
    return figure


def density(model, points=None, *, bounds=None, steps=200, **conditions):
    """A matplotlib figure of the density of a model of points in the plane, exp(log_prob), with some points on top.

    bounds: (left, right, bottom, top), by default those of the points and a fifth more. conditions: of log_prob, such as labels=3.
    """
    Figure = extra("density", "matplotlib.figure", "matplotlib").Figure
    if not hasattr(model, "log_prob"):
        raise TypeError(f"density: model must have a log_prob, got {type(model).__name__}")
    if points is not None:
        check_tensor("density", "points", points)
        if points.dim() != 2 or points.shape[1] != 2 or len(points) == 0:
            raise ValueError(f"density: points must be (N, 2), got {tuple(points.shape)}")
    if bounds is None:
        if points is None:
            raise ValueError("density: give points or bounds")
        low, high = points.amin(0), points.amax(0)
        low, high = low - 0.2 * (high - low), high + 0.2 * (high - low)
        bounds = (float(low[0]), float(high[0]), float(low[1]), float(high[1]))
    x, y = torch.linspace(*bounds[:2], steps), torch.linspace(*bounds[2:], steps)
    plane = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1).view(-1, 2)  # rows of the picture go up
    with torch.no_grad():
        values = model.log_prob(plane.to(next(model.parameters()).device), **conditions).exp().view(steps, steps).cpu()
    figure = Figure(figsize=(5, 4.2), layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow(values.numpy(), origin="lower", extent=bounds, aspect="auto"), label="density")
    if points is not None:
        some = points[:500].cpu()
        axes.plot(some[:, 0].numpy(), some[:, 1].numpy(), ".", color="white", markersize=1.5, alpha=0.6)
    return figure


def table(rows, width=80):
    """Text of dicts with one row each, no wider than `width`: the columns that do not fit are left out, as the last line says.

    One row alone that does not fit is a line for each column.
    """
    cell = lambda x: f"{x:.4g}" if isinstance(x, float) else str(x)
    names, widths, left = list(rows[0]), [], []
    for name in names:
        widths.append(max(len(name), *(len(cell(row.get(name, ""))) for row in rows)))
    if len(rows) == 1 and sum(widths) + 2 * (len(names) - 1) > width:
        return "\n".join(f"{name:{max(map(len, names))}}  {cell(rows[0][name])}" for name in names)
    while len(names) > 1 and sum(widths) + 2 * (len(names) - 1) > width:
        left.append(names.pop())
        widths.pop()
    lines = ["  ".join(name.rjust(w) for name, w in zip(names, widths, strict=True))]
    lines += ["  ".join(cell(row.get(name, "")).rjust(w) for name, w in zip(names, widths, strict=True)) for row in rows]
    return "\n".join(lines + ([f"(not shown: {', '.join(reversed(left))})"] if left else []))
