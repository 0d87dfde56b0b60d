import itertools
import json
import math

import pytest
import torch

import genkern
import genkern.data
from genkern import core, models, random
from genkern.cli import main
from genkern.metrics import baselines
from genkern.models import GatedPixelCNN, PixelCNN, PixelCNNpp, PixelRNN
from genkern.testing import assert_autoregressive

SMALL = {
    "pixel-cnn": lambda **s: PixelCNN(PixelCNN.Config(**{"width": 6, "blocks": 2, **s})),
    "gated": lambda **s: GatedPixelCNN(GatedPixelCNN.Config(**{"width": 6, "layers": 3, "first_kernel": 5, **s})),
    "row": lambda **s: PixelRNN(PixelRNN.Config(**{"width": 6, "kind": "row", "first_kernel": 3, **s})),
    "diagonal": lambda **s: PixelRNN(PixelRNN.Config(**{"width": 6, "first_kernel": 3, **s})),
    "snail": lambda **s: PixelCNNpp(PixelCNNpp.Config(**{"width": 6, "blocks": 1, "mixtures": 2, "attention_heads": 2, **s})),
    "pp": lambda **s: PixelCNNpp(PixelCNNpp.Config(**{"width": 6, "blocks": 1, "mixtures": 2, **s})),
}
each_model = pytest.mark.parametrize("name", SMALL)
each_kind = pytest.mark.parametrize("name, channels", [*itertools.product(SMALL, (1, 3))])


def small(name, **settings):
    torch.manual_seed(0)
    return SMALL[name](**{"channels": 1, "size": 8, "levels": 7, **settings}).eval()


def images(n=2, channels=1, size=8, levels=7):
    return torch.randint(0, levels + 1, (n, channels, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@each_kind
def test_no_pixel_and_no_colour_ahead_is_seen(name, channels):
    model, x = small(name, channels=channels), images(channels=channels)
    colors = channels if model.head.steps > 1 else 1
    assert_autoregressive(model.predict, x / 3.5 - 1, order="raster", colors=colors, cuts=7)  # a cut in every column


def test_everything_before_is_seen_but_by_the_blind_spot():
    """The gradient of the last row's middle pixel: GatedPixelCNN and PixelCNN++ see all before it, PixelCNN not."""
    for name, settings in {
        "pixel-cnn": {"first_kernel": 3, "blocks": 4},
        "gated": {"first_kernel": 3, "layers": 4},
        "diagonal": {},
        "pp": {},
    }.items():
        x = (images(1) / 3.5 - 1).requires_grad_()
        small(name, **settings).predict(x)[0, :, 7, 4].abs().sum().backward()
        seen = x.grad[0, 0] != 0
        before = torch.arange(64).view(8, 8) < 7 * 8 + 4
        assert not seen[~before].any()
        assert seen[6, 5] and (seen[5, :7].all() and seen[6, :7].all() or name == "pixel-cnn")


@each_kind
def test_steps_equal_the_parallel_pass(name, channels):
    model, x = small(name, channels=channels), images(3, channels)
    parallel, state, values = model.predict(x / 3.5 - 1), model.start(3), None
    for t in range(64 * model.head.steps):
        output, state = model.step(values, state)
        (row, column), colors = model._position(t)
        torch.testing.assert_close(output, model.head.of_step(parallel[:, :, row, column], t), rtol=1e-5, atol=1e-5)
        values = x[:, colors, row, column]


@each_kind
def test_samples_are_those_of_the_naive_loop(name, channels):
    """Equal levels; the parameters differ by the rounding of matrix products, which moves no value of these over an edge."""
    model, key = small(name, channels=channels), random.key(5)
    got = model.sample(3, key=key)
    assert got.dtype == torch.uint8 and got.shape == (3, channels, 8, 8) and 0 < got.max() <= 7
    assert torch.equal(got, model.sample(3, key=key, cached=False))
    assert torch.equal(model.sample(2, key=key, batch_size=1), got[:2])
    assert not torch.equal(model.sample(3, key=random.key(6)), got)
    assert model.sample(0, key=key).shape == (0, channels, 8, 8)


@pytest.mark.parametrize("name, channels", [*((name, 1) for name in SMALL), ("gated", 3), ("pp", 3)])
def test_completion_keeps_what_is_known(name, channels):
    model, key, known = small(name, channels=channels), random.key(5), images(1, channels)
    mask = torch.zeros(1, channels, 8, 8, dtype=torch.bool)
    mask[:, :, :4] = True
    mask[:, 0, 6, 2] = True
    got = model.sample(3, key=key, known=known, mask=mask)
    assert torch.equal(got[mask.expand_as(got)], known.expand_as(got)[mask.expand_as(got)])
    assert torch.equal(got, model.sample(3, key=key, known=known, mask=mask, cached=False))
    assert not torch.equal(got[0], got[1])
    for wrong, error, words in (
        ({"known": known}, ValueError, "go together"),
        ({"known": known, "mask": mask.float()}, TypeError, "mask must be a bool tensor, got torch.float32"),
        ({"known": known.tolist(), "mask": mask}, TypeError, "images must be a tensor"),
        ({"known": known.repeat(2, 1, 1, 1), "mask": mask}, ValueError, "known and mask must broadcast"),
        ({"known": known, "mask": mask[..., 1:]}, ValueError, "known and mask must broadcast"),
    ):
        with pytest.raises(error, match=words):
            model.sample(3, **wrong)


@pytest.mark.parametrize("name", ["pixel-cnn", "gated", "row", "diagonal"])
def test_the_probabilities_of_all_images_sum_to_one(name):
    for channels, size in ((1, 3), (3, 1)):
        model = small(name, channels=channels, size=size, levels=1, first_kernel=3)
        n = channels * size**2
        every = torch.cartesian_prod(*[torch.arange(2)] * n).view(-1, channels, size, size).to(torch.uint8)
        assert abs(model.log_prob(every).double().logsumexp(0)) < 1e-5


def test_the_probabilities_of_all_colours_sum_to_one():
    model = small("pp", channels=3, size=1, levels=3, resolutions=1)
    every = torch.cartesian_prod(*[torch.arange(4)] * 3).view(-1, 3, 1, 1).to(torch.uint8)
    assert abs(model.log_prob(every).double().logsumexp(0)) < 1e-5


@each_model
def test_classes_change_what_is_drawn(name):
    model, key, x = small(name, classes=3), random.key(5), images(3)
    with torch.no_grad():
        model.label.weight.mul_(3)
    labels = torch.tensor([0, 1, 2])
    assert model.conditions == ("labels",)
    drawn = [model.sample(2, key=key, labels=label) for label in labels]
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[1], model.sample(2, key=key, labels=1, cached=False))
    one, other = model.log_prob(x, labels=labels), model.log_prob(x, labels=labels.flip(0))
    assert one[1] == other[1] and one[0] != other[0]
    with pytest.raises(ValueError, match="needs labels"):
        model(x)
    with pytest.raises(ValueError, match=r"0..2, got 1..3"):
        model(x, labels=labels + 1)
    with pytest.raises(ValueError, match="takes no labels"):
        small(name)(x, labels=labels)


@each_model
def test_training_lowers_the_loss_on_native_kernels(name):
    model, x = small(name, levels=7), images(8)
    model.train()
    x[:, :, ::2] = 0
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    genkern.reset_stats()
    losses = []
    for _ in range(25):
        out = model(x)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.8 * losses[0]
    torch.testing.assert_close(out.parts["nll"], 64 * out.loss.detach())
    model.eval().sample(2, key=random.key(0))
    mixture = ["discretized_mix_logistic_nll"]
    used = {"gated": ["gated_activation", "sample_tokens"], "pp": mixture, "snail": mixture}
    for op in used.get(name, ["sample_tokens"]):
        backend = "cpu" if core.OPS[op].available("cpu")["cpu"] is None else "reference"
        assert genkern.stats()[op, backend] > 0 and {b for n, b in genkern.stats() if n == op} == {backend}


@each_model
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_types_take_images_of_every_type(name, dtype):
    model, x = small(name, channels=3, levels=255), images(channels=3, levels=255)
    expected = model.log_prob(x)
    torch.testing.assert_close(model.log_prob((x / 127.5 - 1).half()), expected)
    model.to(dtype)
    assert model.sample(1, key=random.key(1)).dtype == torch.uint8
    if name in ("pp", "snail"):  # of the image's levels, none is lost to a narrow type
        with torch.no_grad():
            model.out.weight.zero_()
            model.out.bias.copy_(torch.arange(20) % 7 / 4 - 4)
        wide = small(name, channels=3, levels=255)
        wide.load_state_dict({n: w.float() for n, w in model.state_dict().items()})
        expected = wide.log_prob(x)
    torch.testing.assert_close(model.log_prob(x).float(), expected, rtol=1e-5 if name in ("pp", "snail") else 1e-2, atol=0)


@each_model
def test_save_and_load(name, tmp_path):
    model, x = small(name, channels=3), images(channels=3)
    model.save_pretrained(tmp_path)
    loaded = models.load(tmp_path)
    assert type(loaded) is type(model) and torch.equal(loaded.log_prob(x), model.log_prob(x))
    torch.testing.assert_close(model.bits_per_dim(x), -model.log_prob(x) / (192 * math.log(2)))
    torch.testing.assert_close(model.log_prob(x / 3.5 - 1), model.log_prob(x))


@pytest.mark.parametrize(
    "name, settings, words",
    [
        ("pixel-cnn", {"channels": 3, "width": 8}, "multiple of channels"),
        ("gated", {"kernel": 2}, "odd"),
        ("row", {"kind": "spiral"}, "row, diagonal"),
        ("pp", {"channels": 2}, "1 or 3"),
        ("pp", {"size": 6}, "multiple of 4"),
        ("gated", {"levels": 256}, "levels in 1..255"),
    ],
)
def test_wrong_settings_are_refused_in_words(name, settings, words):
    with pytest.raises(ValueError, match=words):
        small(name, **settings)
    with pytest.raises(ValueError, match=r"\(N, 1, 8, 8\)"):
        small(name)(images(size=4))


def test_the_command_line_trains_below_the_histogram(tmp_path, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    run = str(tmp_path / "run")
    settings = ["--epochs", "3", "--width", "16", "--blocks", "2", "--ema", "none", "--dropout", "0"]
    assert main(["train", "pixel-cnn", "--data", "digits", "--out", run, *settings]) == 0
    assert (tmp_path / "run" / "samples.png").exists()
    capsys.readouterr()
    assert main(["eval", run, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["bits_per_dim"]
    assert found < baselines(genkern.data.load("digits"))["per-pixel histogram"]
