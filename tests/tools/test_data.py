import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from genkern.data import Data, load

pytest.importorskip("PIL")
from PIL import Image  # noqa: E402


def save_image(path, size=(6, 4), color=(200, 10, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


def save_sound(path, frames, channels=1, width=2, rate=8000):
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(channels)
        sound.setsampwidth(width)
        sound.setframerate(rate)
        sound.writeframes(frames)


def everything(data):
    return torch.cat([data.train[0], data.validation[0], data.test[0]])


def test_digits_is_built_in():
    pytest.importorskip("sklearn")
    data = load("digits")
    assert data.shape == (1, 8, 8) and data.levels == 16 and data.classes == 10
    assert [len(data.split(s)[0]) for s in ("train", "validation", "test")] == [1437, 180, 180]
    with pytest.raises(ValueError, match="'validation', 'test', got 'dev'"):
        data.split("dev")


@pytest.mark.parametrize("wrong", [torch.zeros(5, 2), (torch.zeros(5, 2),), (torch.zeros(5, 2), torch.arange(4)), ([1.0], None)])
def test_splits_of_my_own(wrong):
    right = torch.zeros(5, 2), torch.arange(5)
    assert Data("mine", right, right, (right[0], None), shape=(2,), levels=None).classes == 0
    with pytest.raises(ValueError, match=r"Data: validation must be \(inputs, labels\)"):
        Data("mine", right, wrong, right, shape=(2,), levels=None)


def test_image_folder_with_classes(tmp_path):
    for i in range(12):
        save_image(tmp_path / ("cat" if i % 2 else "dog") / f"{i}.png", color=(i, 100 * (i % 2), 7))
    data = load(tmp_path)
    assert data.shape == (3, 4, 6) and data.levels == 255 and data.class_names == ("cat", "dog")
    x, labels = data.train
    assert x.dtype == torch.uint8 and labels.dtype == torch.int64 and len(x) == 10
    assert torch.equal(labels == 0, x[:, 1, 0, 0] == 100)  # the label went along with its image
    assert sorted(everything(data)[:, 0, 0, 0].tolist()) == list(range(12))
    assert torch.equal(load(str(tmp_path)).train[0], x)


def test_grey_images_have_one_channel(tmp_path):
    for i in range(3):
        save_image(tmp_path / f"{i}.png", color=i, mode="L")
    data = load(tmp_path)
    assert data.shape == (1, 4, 6) and data.train[1] is None and data.classes == 0


def refused(words, source, error=ValueError, **settings):
    with pytest.raises(error, match=words):
        load(source, **settings)


def test_image_folders_refused_in_words(tmp_path):
    refused("has no file", tmp_path)
    (tmp_path / "readme.md").write_text("x")
    refused("1 files, but none that ends in .bmp", tmp_path)
    save_image(tmp_path / "a" / "0.png")
    save_image(tmp_path / "a" / "1.png", size=(5, 4))
    refused(r"0\.png is 6 x 4 and .*1\.png is 5 x 4", tmp_path)
    (tmp_path / "a" / "1.png").write_bytes((tmp_path / "a" / "0.png").read_bytes()[:40])
    refused(r"1\.png cannot be read as an image", tmp_path)
    (tmp_path / "a" / "1.png").write_text("not an image")
    refused(r"1\.png cannot be read as an image", tmp_path)
    (tmp_path / "a" / "1.png").unlink()
    refused("gives 1 items; three splits", tmp_path)
    (tmp_path / "b").mkdir()
    refused("class folder .*b holds no image", tmp_path)
    save_image(tmp_path / "loose.png")
    refused(r"beside them, the image loose\.png", tmp_path)
    save_image(tmp_path / "parts" / "train" / "0.png")
    save_image(tmp_path / "parts" / "test" / "0.png")
    refused("is split into test, train already", tmp_path / "parts")
    save_image(tmp_path / "deep" / "0.png", color=40000, mode="I;16")
    refused("more than 8 bits", tmp_path / "deep")
    refused("one image: give the folder", tmp_path / "deep" / "0.png")


def test_npy(tmp_path):
    file = tmp_path / "x.npy"
    np.save(file, np.arange(20 * 12, dtype=np.uint8).reshape(20, 3, 4))
    data = load(file)
    assert data.shape == (1, 3, 4) and data.levels == 255 and len(data.train[0]) == 16 and len(data.test[0]) == 2
    np.save(file, np.random.default_rng(0).normal(size=(10, 2)))
    assert load(file).shape == (2,) and load(file).levels is None and load(file).train[0].dtype == torch.float32
    for array, words in (
        (np.full((9, 1, 2, 2), 255.0), r"\[-1, 1\], found \[255, 255\]"),
        (np.full((9, 1, 2, 2), np.nan), "not finite"),
        (np.zeros((9, 2, 2, 3)), "transpose"),
        (np.zeros((9, 2, 2), np.int64), "int64"),
        (np.zeros(9), r"got \(9,\)"),
        (np.array([[{}]], dtype=object), "cannot be read"),  # would need a pickle
    ):
        np.save(file, array)
        refused(words, file)
    file.write_bytes(file.read_bytes()[:50])
    refused(r"x\.npy cannot be read", file)
    file.write_bytes(b"")
    refused(r"x\.npy cannot be read", file)


def test_text_is_split_in_its_order(tmp_path):
    file = tmp_path / "book.txt"
    file.write_bytes(bytes(i % 256 for i in range(1003)))
    data = load(file, window=10)
    assert data.shape == (10,) and data.levels == 255 and data.window == 10 and len(data.train[0]) == 80
    assert torch.equal(everything(data).flatten().long(), torch.arange(1000) % 256)
    refused("1003 bytes, less than one window of 2000", file, window=2000)
    refused("1 windows of 1000 bytes; three", file, window=1000)
    refused("window must be an int of at least 1, got 0", file, window=0)
    refused("window is for text", "digits", window=3)


def test_sound(tmp_path):
    frames = np.arange(-600, 600, dtype="<i2")
    for name in "ab":
        save_sound(tmp_path / f"{name}.wav", frames.tobytes(), channels=2)
    data = load(tmp_path, window=50)
    assert data.shape == (2, 50) and data.rate == 8000 and data.levels is None and len(everything(data)) == 24
    assert torch.equal(data.train[0][0, 0] * 32768, torch.arange(-600, -500, 2.0))  # the left channel
    save_sound(tmp_path / "c.wav", frames.tobytes())
    refused(r"a\.wav has 8000 Hz, 2 channels and .*c\.wav has 8000 Hz, 1 channels", tmp_path)
    save_sound(tmp_path / "c.wav", frames.tobytes(), width=1)
    refused(r"c\.wav must be 16-bit .* got 8-bit", tmp_path)
    (tmp_path / "c.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:200])
    refused(r"c\.wav cannot be read as a \.wav file", tmp_path)
    (tmp_path / "c.wav").write_bytes(b"RIFF")
    refused(r"c\.wav cannot be read as a \.wav file", tmp_path)


def test_unknown_names_get_a_suggestion(tmp_path):
    refused("did you mean 'digits'", "digit", FileNotFoundError)
    refused("built in: digits", "cifar10", FileNotFoundError)
    refused("file .*Path.*; did you mean 'digits'", Path("digits"), FileNotFoundError)  # a Path is a path, no name
    (tmp_path / "photos").mkdir()
    refused("did you mean .*photos'", tmp_path / "photo", FileNotFoundError)


def test_photos_hold_out_a_quarter():
    pytest.importorskip("sklearn")
    data = load("photos")
    assert data.shape == (3, 32, 32) and data.levels == 255 and data.class_names == ("china", "flower")
    from sklearn.datasets import load_sample_images

    china = torch.tensor(load_sample_images().images[0])
    (train, labels), (held, held_labels), (test, _) = data.train, data.validation, data.test
    assert torch.equal(train[0], china[:32, :32].permute(2, 0, 1)) and torch.equal(train[1], china[:32, 8:40].permute(2, 0, 1))
    assert torch.equal(held[0], china[:32, 480:512].permute(2, 0, 1)) and torch.equal(test[0], china[:32, 512:544].permute(2, 0, 1))
    assert [len(train), len(held), len(test)] == [2 * 50 * 57, 66, 64] and labels.bincount().tolist() == [2850, 2850]
    assert held_labels.bincount().tolist() == [33, 33]


def test_topics_are_in_order_and_plucks_are_made():
    text, sound = load("topics", window=64), load("plucks", window=500)
    assert text.shape == (64,) and len(text.train[0]) > 1000
    assert b"assert" in bytes(text.train[0][:4].flatten().tolist())  # the first topic of all
    assert sound.shape == (1, 500) and sound.rate == 8000 and [len(sound.split(s)[0]) for s in ("train", "test")] == [1536, 192]
    x = torch.cat([sound.train[0], sound.validation[0]]).flatten()
    assert x.abs().max() <= 1 and 0.03 < x.std() < 0.3 and x.mean().abs() < 0.01
    assert torch.equal(load("plucks", window=500).test[0], sound.test[0])
    refused("gives 0 windows of 10000000 samples", "plucks", window=10**7)
