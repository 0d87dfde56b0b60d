"""Data sets that come without a download."""

import torch

from genkern import random

SPLITS = {"train": slice(0, 1437), "validation": slice(1437, 1617), "test": slice(1617, 1797)}


def digits(split=None):
    """scikit-learn's handwritten digits: images uint8 (N, 1, 8, 8) with the 17 levels 0..16, labels int64 (N,).

    split "train" (1437 images), "validation" (180) or "test" (180), the same on every machine; None: all 1797, in the
    order of the source. The levels stay as they are counted, not stretched to 0..255: images / 16 is the ink of a pixel.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"digits: split must be None or one of {', '.join(SPLITS)}, got {split!r}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('digits: needs scikit-learn, of the extra "models": pip install "genkern[models]"') from error
    source = load_digits()
    images = torch.from_numpy(source.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(source.target).to(torch.int64)
    if split is None:
        return images, labels
    # Neighbours in the source come from one writer: shuffle, by the library's own stream, which no version changes.
    order = torch.argsort(random.bits(random.key(1797), (len(images),), dtype=torch.int64))[SPLITS[split]]
    return images[order], labels[order]
