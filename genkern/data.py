"""Data sets: five that come without a download, and what lies in a folder or file here.

import genkern.data

data = genkern.data.load("digits")               # scikit-learn's handwritten digits                 uint8 (N, 1, 8, 8)
data = genkern.data.load("digits32")             # up to four of them on an image, labels (N, 4)         uint8 (N, 1, 32, 32)
data = genkern.data.load("photos")               # 32 x 32 patches of its two photographs            uint8 (N, 3, 32, 32)
data = genkern.data.load("topics")               # the text of Python's documentation topics         uint8 (N, length)
data = genkern.data.load("plucks")               # two minutes of synthesised plucked strings       float (N, 1, length)
data = genkern.data.load("photos/")              # images; class subfolders give the labels          uint8 (N, C, H, W)
data = genkern.data.load("digits.npy")           # uint8 or float images, sequences, points          as stored
data = genkern.data.load("book.txt", window=256) # any file as bytes, in windows                     uint8 (N, length)
data = genkern.data.load("speech/")              # 16-bit .wav files, in windows                     float (N, C, length)
inputs, labels = data.train                      # also data.validation and data.test
"""

import dataclasses
import difflib
import os
import wave
from functools import partial
from pathlib import Path

import torch

from genkern import random
from genkern._extras import extra
from genkern.ops._common import check_choice, check_int

SPLITS = {"train": slice(0, 1437), "validation": slice(1437, 1617), "test": slice(1617, 1797)}
IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set in three fixed splits, each (inputs, labels): labels int64 (N,), or None where there are none.

    A label may also be a sequence (N, L) of classes, padded by the number of classes.
    """

    name: str  # what load() takes to give it again
    train: tuple
    validation: tuple
    test: tuple
    shape: tuple  # of one input: (C, H, W) images, (C, length) sound, (length,) bytes, (features,) points
    levels: int | None  # uint8 inputs hold 0..levels; None: float inputs
    class_names: tuple = ()  # label i is class_names[i]
    window: int | None = None  # length of the windows into which bytes and sound are cut
    rate: int | None = None  # sound: samples per second
    pictures: dict = dataclasses.field(default_factory=dict)  # {class name: the picture (C, H, W) its held-out patches are cut from}

    def __post_init__(self):
        for split in SPLITS:
            match getattr(self, split):
                case (torch.Tensor() as x, (None | torch.Tensor()) as labels) if labels is None or len(labels) == len(x):
                    continue
            raise ValueError(f"Data: {split} must be (inputs, labels), tensors of one length, or (inputs, None)")

    @property
    def classes(self):
        """The number of classes, 0 without labels."""
        return len(self.class_names)

    def split(self, name):
        """(inputs, labels) of "train", "validation" or "test"."""
        check_choice("data", "split", name, SPLITS)
        return getattr(self, name)

    def by_class(self):
        """{class name: the Data of its inputs alone}, labels as they were."""
        labels = self.train[1]
        if labels is None or labels.dim() != 1:
            raise ValueError(f"data: {self.name} has no label for each input")
        parts = {}
        for label, name in enumerate(self.class_names):
            splits = {split: tuple(x[self.split(split)[1] == label] for x in self.split(split)) for split in SPLITS}
            pictures = {name: self.pictures[name]} if name in self.pictures else {}
            parts[name] = dataclasses.replace(self, name=f"{self.name}: {name}", pictures=pictures, **splits)
        return parts


def check_data(name, data):
    if not isinstance(data, Data):
        raise TypeError(f"{name}: data must be a genkern.data.Data, such as genkern.data.load() gives, got {type(data).__name__}")


def load(source, *, window=None):
    """The Data of source, a built-in name or a path; the splits are the same on every machine.

    window: length of the windows into which a text or sound is cut (default 128 bytes, 1024 samples); the rest of a file is left out.
    Images and rows of a .npy are shuffled and split 80 : 10 : 10; text and sound are split in their order, so that no window
    of one split has its neighbours in another.
    """
    if window is not None:
        check_int("load", "window", window)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"load: source must be a name or a path, got {type(source).__name__}")
    read, length = BUILT_IN[source] if isinstance(source, str) and source in BUILT_IN else _reader(source)
    if length is not None:
        return read(window or length)
    if window is not None:
        raise ValueError(f"load: window is for text and sound; {source} is not cut into windows")
    return read()


def _reader(source):
    """(what reads a folder or file, the default length of its windows or None): the function takes the length, where there is one."""
    path = Path(os.path.abspath(source))  # the name of the data serves from other folders too
    kind = path.suffix.lower()
    if path.is_dir():
        shown = lambda p: not any(part.startswith(".") for part in p.relative_to(path).parts)
        files = sorted(p for p in path.rglob("*") if p.is_file() and shown(p))
        images, sounds = [p for p in files if p.suffix.lower() in IMAGES], [p for p in files if p.suffix.lower() == ".wav"]
        if images and sounds:
            raise ValueError(f"load: {path} holds images and .wav files: give a folder of one kind")
        if images:
            return partial(_images, path, images), None
        if sounds:
            return partial(_sound, path, sounds), 1024
        found = f"{len(files)} files, but none" if files else "no file"
        raise ValueError(f"load: {path} has {found} that ends in {', '.join(sorted(IMAGES))} or .wav")
    if path.is_file():
        if kind in IMAGES:
            raise ValueError(f"load: {path} is one image: give the folder of the images")
        if kind == ".npy":
            return partial(_npy, path), None
        return (partial(_sound, path, [path]), 1024) if kind == ".wav" else (partial(_file, path), 128)
    close = difflib.get_close_matches(str(source), BUILT_IN, 1)
    if not close and path.parent.is_dir():
        close = [str(path.parent / name) for name in difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], 1)]
    hint = f"; did you mean {close[0]!r}?" if close else f"; built in: {', '.join(BUILT_IN)}"
    raise FileNotFoundError(f"load: no data set and no file {source!r}{hint}")


def digits(split=None):
    """scikit-learn's handwritten digits: images uint8 (N, 1, 8, 8) with the 17 levels 0..16, labels int64 (N,).

    split "train" (1437 images), "validation" (180) or "test" (180), the same on every machine; None: all 1797, in the
    order of the source. The levels stay as they are counted, not stretched to 0..255: images / 16 is the ink of a pixel.
    """
    if split is not None:
        check_choice("digits", "split", split, SPLITS)
    source = extra("digits", "sklearn.datasets", "scikit-learn").load_digits()
    images = torch.from_numpy(source.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(source.target).to(torch.int64)
    if split is None:
        return images, labels
    # Neighbours in the source come from one writer: shuffle.
    order = _shuffled(len(images))[SPLITS[split]]
    return images[order], labels[order]


def _digits():
    parts = {split: digits(split) for split in SPLITS}
    return Data("digits", **parts, shape=(1, 8, 8), levels=16, class_names=tuple("0123456789"))


def _digits32():
    """Up to four of the digits on one 32 x 32 image, each doubled in size to a quarter of it, in reading order from the top left.

    The label is the sequence of the digits, padded by 10. Digits of one split are composed only with each other.
    """
    splits = {}
    for (split, (images, labels)), count in zip({name: digits(name) for name in SPLITS}.items(), (4000, 400, 400), strict=True):
        for_digit, for_length = random.split(random.fold_in(random.key(32), len(images)), 2)
        chosen = random.bits(for_digit, (count, 4), dtype=torch.int64).remainder(len(images))
        length = 1 + random.bits(for_length, (count, 1), dtype=torch.int64).remainder(4)
        absent = torch.arange(4) >= length
        large = torch.nn.functional.interpolate(images.float() * (255 / 16), scale_factor=2, mode="bilinear")  # (N, 1, 16, 16)
        tiles = large[chosen, 0].masked_fill(absent[:, :, None, None], 0).round().to(torch.uint8)  # (count, 4, 16, 16)
        pictures = tiles.view(count, 2, 2, 16, 16).permute(0, 1, 3, 2, 4).reshape(count, 1, 32, 32)
        splits[split] = (pictures, labels[chosen].masked_fill(absent, 10))
    return Data("digits32", **splits, shape=(1, 32, 32), levels=255, class_names=tuple("0123456789"))


def _photos():
    """Patches of scikit-learn's two photographs: of the left three quarters one every 8 pixels to train on, of the right quarter
    those that do not overlap, in turn for validation and test. The label says which photograph."""
    extra("photos", "PIL.Image", "Pillow")  # with which scikit-learn reads them
    photographs = extra("photos", "sklearn.datasets", "scikit-learn").load_sample_images().images
    parts, names, pictures = {split: [] for split in SPLITS}, ("china", "flower"), {}
    for name, picture in zip(names, photographs, strict=True):  # (427, 640, 3)
        pixels = torch.tensor(picture)
        cut = pixels.shape[1] * 3 // 4
        patches = lambda area, step: area.unfold(0, 32, step).unfold(1, 32, step).flatten(0, 1)  # (N, 3, 32, 32)
        kept = patches(pixels[:, cut:], 32)
        pictures[name] = pixels[:, cut:].permute(2, 0, 1).contiguous()
        for split, some in zip(SPLITS, (patches(pixels[:, :cut], 8), kept[0::2], kept[1::2]), strict=True):
            parts[split].append(some.contiguous())
    splits = {
        split: (torch.cat(pair), torch.repeat_interleave(torch.arange(2), torch.tensor([len(x) for x in pair])))
        for split, pair in parts.items()
    }
    return Data("photos", **splits, shape=(3, 32, 32), levels=255, class_names=names, pictures=pictures)


def _topics(length):
    """The text that Python's help() shows, of the Python that runs: about half a megabyte."""
    from pydoc_data.topics import topics

    return _text("topics", "\n".join(topics[name] for name in sorted(topics)).encode(), length)


def _plucks(length):
    """Two minutes at 8 kHz of two strings, plucked every 250 ms with random pitch and loudness (Karplus & Strong, 1983).

    A string is a delay line of one period: soft noise first, then y[t] = d (y[t-p] + y[t-p-1]) / 2, which dulls and dies away.
    A faint noise and 16 bits make it no easier than a recording.
    """
    rate, seconds, beat = 8000, 120, 2000
    count, length_of_tone = rate * seconds // beat, 4 * beat
    sound = torch.zeros(2, rate * seconds + length_of_tone, dtype=torch.float64)
    scale = (0, 2, 4, 7, 9, 12, 14, 16, 19, 21)  # semitones of a pentatonic scale
    for string, lowest in enumerate((110.0, 164.8)):  # Hz
        pitch_key, loud_key, pluck_key = random.split(random.fold_in(random.key(1983), string), 3)
        notes = random.bits(pitch_key, (count,), dtype=torch.int64).remainder(len(scale))
        loudness = random.uniform(loud_key, (count, 1), dtype=torch.float64) * 0.5 + 0.1
        for note, semitones in enumerate(scale):
            beats = (notes == note).nonzero()[:, 0]
            period = round(rate / (lowest * 2 ** (semitones / 12)))
            noise = random.uniform(random.split(pluck_key, count)[beats], (len(beats), period + 5), dtype=torch.float64) * 2 - 1
            turns = [noise.unfold(1, 6, 1).mean(-1)]  # (notes, period)
            last = torch.zeros(len(beats), 1, dtype=torch.float64)  # y[t-p-1] of the first sample
            for _ in range(length_of_tone // period):
                turns.append(0.499 * (turns[-1] + torch.cat([last, turns[-1][:, :-1]], 1)))
                last = turns[-2][:, -1:]
            tones = loudness[beats] * torch.cat(turns, 1)[:, :length_of_tone]
            for i, tone in zip(beats.tolist(), tones, strict=True):
                sound[string, i * beat : i * beat + length_of_tone] += tone
    hiss = random.normal(random.key(8000), (rate * seconds,), dtype=torch.float32) * 1e-3
    mixed = sound.sum(0)[: rate * seconds].float() + hiss
    mixed = (mixed.clamp(-1, 1) * 32767).round() / 32768
    count = len(mixed) // length
    windows = mixed[: count * length].view(count, 1, length)
    return _split("plucks", windows, None, f"windows of {length} samples", levels=None, window=length, rate=rate)


BUILT_IN = {  # (what makes it, the default length of its windows)
    "digits": (_digits, None),
    "digits32": (_digits32, None),
    "photos": (_photos, None),
    "topics": (_topics, 128),
    "plucks": (_plucks, 1024),
}


def _images(path, files):
    Image, ImageOps = (extra("load: images", f"PIL.{name}", "Pillow") for name in ("Image", "ImageOps"))
    import numpy as np

    inside = [p.relative_to(path).parts for p in files]
    classes = tuple(sorted({parts[0] for parts in inside if len(parts) > 1}))
    if classes and any(len(parts) == 1 for parts in inside):
        loose = next(p for p, parts in zip(files, inside, strict=True) if len(parts) == 1)
        raise ValueError(f"load: {path} has class folders such as {classes[0]} and, beside them, the image {loose.name}")
    if "train" in classes and {"test", "val", "valid", "validation"} & set(classes):
        raise ValueError(f"load: {path} is split into {', '.join(classes)} already: give one of these folders")
    empty = [p.name for p in sorted(path.iterdir()) if p.is_dir() and not p.name.startswith(".") and p.name not in classes]
    if classes and empty:
        raise ValueError(f"load: the class folder {path / empty[0]} holds no image")
    pictures, grey = [], True
    for file in files:
        try:
            with Image.open(file) as picture:
                picture = ImageOps.exif_transpose(picture)
                if picture.mode.startswith(("I", "F")):
                    raise ValueError(f"load: {file} has more than 8 bits per pixel (mode {picture.mode}): convert it first")
                grey = grey and picture.mode in ("1", "L", "LA")
                pictures.append(picture.convert("RGB"))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"load: {file} cannot be read as an image: {error}") from error
        if pictures[-1].size != pictures[0].size:
            (w0, h0), (w, h) = pictures[0].size, pictures[-1].size
            raise ValueError(f"load: images must have one size, but {files[0]} is {w0} x {h0} and {file} is {w} x {h} (width x height)")
    pixels = [np.array(picture.convert("L") if grey else picture) for picture in pictures]
    x = torch.from_numpy(np.stack(pixels))  # (N, H, W) or (N, H, W, 3)
    x = x.unsqueeze(1) if grey else x.permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor([classes.index(parts[0]) for parts in inside]) if classes else None
    return _shuffle_and_split(str(path), x, labels, levels=255, class_names=classes)


def _npy(path):
    import numpy as np

    try:
        array = np.load(path, allow_pickle=False)  # a pickle could run code
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"load: {path} cannot be read as a .npy array: {error}") from error
    shape = tuple(array.shape)
    if array.ndim not in (2, 3, 4):
        raise ValueError(f"load: {path} must be (N, C, H, W) or (N, H, W) images or (N, features), got {shape}")
    if array.ndim == 4 and shape[1] not in (1, 3, 4) and shape[3] in (1, 3, 4):
        raise ValueError(f"load: {path} must be (N, C, H, W), got {shape}, which looks like (N, H, W, C): transpose(0, 3, 1, 2)")
    if array.dtype == np.uint8:
        levels = 255
    elif np.issubdtype(array.dtype, np.floating):
        levels, array = None, array.astype(np.float32)
        low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
        if not np.isfinite(array).all():
            raise ValueError(f"load: {path} holds numbers that are not finite")
        if array.ndim > 2 and not -1 <= low <= high <= 1:
            raise ValueError(
                f"load: float images in {path} must be in [-1, 1], found [{low:g}, {high:g}]; whole levels 0..255 go as uint8"
            )
    else:
        raise ValueError(f"load: {path} must be uint8, or float in [-1, 1], got {array.dtype}")
    x = torch.from_numpy(array)
    return _shuffle_and_split(str(path), x.unsqueeze(1) if x.dim() == 3 else x, None, levels=levels)


def _file(path, length):
    try:
        return _text(str(path), path.read_bytes(), length)
    except OSError as error:
        raise ValueError(f"load: {path} cannot be read: {error}") from error


def _text(name, content, length):
    count = len(content) // length
    if count == 0:
        raise ValueError(f"load: {name} has {len(content)} bytes, less than one window of {length}")
    windows = torch.frombuffer(bytearray(content[: count * length]), dtype=torch.uint8)
    return _split(name, windows.view(count, length), None, f"windows of {length} bytes", levels=255, window=length)


def _sound(path, files, length):
    import numpy as np

    windows, first = [], None
    for file in files:
        try:
            with wave.open(str(file), "rb") as sound:
                form = sound.getframerate(), sound.getnchannels()
                bits, content = 8 * sound.getsampwidth(), sound.readframes(sound.getnframes())
                whole = len(content) == sound.getnframes() * sound.getnchannels() * sound.getsampwidth()
        except (OSError, EOFError, wave.Error) as error:
            raise ValueError(f"load: {file} cannot be read as a .wav file: {error or 'it ends too early'}") from error
        if bits != 16 or form[1] not in (1, 2):
            raise ValueError(f"load: {file} must be 16-bit with 1 or 2 channels, got {bits}-bit with {form[1]}")
        if not whole:
            raise ValueError(f"load: {file} cannot be read as a .wav file: it ends too early")
        first = first or form
        if form != first:
            words = " and ".join(f"{f} has {rate} Hz, {n} channels" for f, (rate, n) in ((files[0], first), (file, form)))
            raise ValueError(f"load: sounds must have one rate and number of channels, but {words}")
        frames = torch.from_numpy(np.frombuffer(content, "<i2").astype(np.float32) / 32768).view(-1, form[1])
        count = len(frames) // length
        windows.append(frames[: count * length].view(count, length, form[1]).transpose(1, 2))  # (count, channels, length)
    x = torch.cat(windows).contiguous()
    return _split(str(path), x, None, f"windows of {length} samples", levels=None, window=length, rate=first[0])


def _shuffled(n):
    """A fixed order of n things, by the library's own stream, which no version changes."""
    return torch.argsort(random.bits(random.key(1797), (n,), dtype=torch.int64))


def _shuffle_and_split(name, x, labels, **facts):
    order = _shuffled(len(x))
    return _split(name, x[order], None if labels is None else labels[order], "items", **facts)


def _split(name, x, labels, unit, **facts):
    n = len(x)
    if n < 3:
        raise ValueError(f"load: {name} gives {n} {unit}; three splits need at least 3")
    tenth = max(1, n // 10)
    parts = [slice(0, n - 2 * tenth), slice(n - 2 * tenth, n - tenth), slice(n - tenth, n)]
    splits = {split: (x[s], None if labels is None else labels[s]) for split, s in zip(SPLITS, parts, strict=True)}
    return Data(name, **splits, shape=tuple(x.shape[1:]), **facts)
