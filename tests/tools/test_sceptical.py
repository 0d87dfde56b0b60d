"""What people do with a model of ours outside the shared loop, and what they get wrong."""

import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toys import ToyAdversary, ToyConfig, ToyDenoiser, ToyImages, points, toy

import genkern
from genkern.models import VAE, VAEConfig
from genkern.train import fit, sample


def vae(**settings):
    torch.manual_seed(0)
    return VAE(VAEConfig(**{"levels": 16, "width": 4, "hidden": 32, "latent": 4, **settings}))


def images(n=32):
    return torch.randint(0, 17, (n, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_my_own_loop_under_bfloat16_autocast():
    model, x = vae(), images(8) // 4
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    losses = []
    for key in genkern.random.split(genkern.random.key(0), 10):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x, key=key).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert loss.dtype == torch.float32 and losses[-1] < losses[0] - 3
    with torch.autocast("cpu", torch.bfloat16):
        near = model(x, key=key).loss.item()
    assert near == pytest.approx(model(x, key=key).loss.item(), rel=1e-2)


def test_a_compiled_model_trains_in_the_shared_loop(tmp_path):
    compiled = torch.compile(toy(), backend="aot_eager")
    history = fit(compiled, points(), tmp_path, epochs=2, progress=False)
    wanted = fit(toy(), points(), epochs=2, progress=False)
    assert [row["loss"] for row in history] == pytest.approx([row["loss"] for row in wanted], rel=1e-5)
    key = genkern.random.key(1)
    assert torch.equal(sample(compiled, 3, key=key), compiled.sample(3, key=key))
    loaded = genkern.load(tmp_path)  # its names carry no trace of the compiler
    assert type(loaded) is ToyDenoiser and loaded.state_dict().keys() == toy().state_dict().keys()


def test_a_batch_on_another_device_is_an_error():
    with pytest.raises((RuntimeError, ValueError), match="device|meta"):
        vae()(images().to("meta"), key=genkern.random.key(0)).loss.backward()


def test_float_images_up_to_255_are_refused_with_their_range():
    with pytest.raises(ValueError, match=r"must be in \[-1, 1\], found \[0, 255\]"):
        x = images().float() * 255 / 16
        x[0], x[1] = 0, 255
        vae()(x, key=genkern.random.key(0))


def test_saved_here_and_loaded_in_another_process(tmp_path):
    model, key = vae(), genkern.random.key(3)
    model.save_pretrained(tmp_path)
    program = "import sys, genkern; print(genkern.load(sys.argv[1]).sample(4, key=genkern.random.key(3)).flatten().tolist())"
    environment = {**os.environ, "PYTHONPATH": str(Path(genkern.__file__).parent.parent)}
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str(model.sample(4, key=key).flatten().tolist()), done.stderr


@pytest.mark.parametrize(
    "settings, error, words",
    [
        ({"epoch": 3}, TypeError, "no setting epoch; Training has batch_size"),
        ({"batch_size": 0}, ValueError, "batch_size must be an int of at least 1, got 0"),
        ({"ema": 1.0}, ValueError, "ema must be at least 0 and below 1, got 1.0"),
        ({"precision": "float16"}, ValueError, "precision must be one of .float32., .bfloat16., got .float16."),
        ({"resume": True}, ValueError, "needs the folder"),
        ({"save_every": 0}, ValueError, "save_every must be an int of at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused_in_words(settings, error, words):
    with pytest.raises(error, match=words):
        fit(toy(), points(), progress=False, **settings)


def test_a_loss_that_explodes_is_told_and_the_last_good_checkpoint_stays(tmp_path):
    class Explodes(ToyDenoiser):
        def forward(self, batch, *, key=None):
            loss, parts = super().forward(batch, key=key)
            return genkern.models.Output(loss * (float("nan") if self.bad else 1), parts)

    model = Explodes(ToyConfig())
    model.bad = False
    fit(model, points(), tmp_path, epochs=1, progress=False)
    before = (tmp_path / "last.safetensors").read_bytes()
    model.bad = True
    with pytest.raises(FloatingPointError, match="loss is nan in epoch 2"):
        fit(model, points(), tmp_path, resume=True, epochs=3, progress=False)
    assert (tmp_path / "last.safetensors").read_bytes() == before


def test_a_run_is_resumed_only_as_what_it_was(tmp_path):
    fit(toy(), points(), tmp_path, epochs=1, progress=False)
    with pytest.raises(FileExistsError, match="holds a run"):
        fit(toy(), points(), tmp_path, epochs=1, progress=False)
    for changed, words in (
        ({"seed": 1}, "seed 0, got 1"),
        ({"ema": 0.5}, "ema None, got 0.5"),
        ({"batch_size": 8}, "batch_size 16, got 8"),
    ):
        with pytest.raises(ValueError, match=words):
            fit(toy(), points(), tmp_path, resume=True, epochs=2, progress=False, **changed)
    with pytest.raises(ValueError, match="class 'ToyDenoiser', got 'ToyAdversary'"):
        fit(toy(ToyAdversary), points(), tmp_path, resume=True, epochs=2, progress=False)
    with pytest.raises(ValueError, match="hidden 8, got 4"):
        fit(ToyDenoiser(ToyConfig(hidden=4)), points(), tmp_path, resume=True, epochs=2, progress=False)
    assert len(fit(toy(), points(), tmp_path, resume=True, epochs=3, progress=False)) == 3


def test_a_validation_loss_without_a_number_is_no_best_one(tmp_path):
    class Broken(ToyDenoiser):
        def evaluate(self, *args, **kwargs):
            return {"loss": float("inf"), "other": 1.0}

    history = fit(Broken(ToyConfig()), points(), tmp_path, epochs=2)
    assert [row["validation_loss"] for row in history] == [None, None] and not (tmp_path / "model.safetensors").exists()
    assert len(fit(Broken(ToyConfig()), points(), tmp_path, resume=True, epochs=3)) == 3


def test_the_progress_bar_on_a_terminal(monkeypatch):
    pytest.importorskip("tqdm")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    fit(toy(), points(), epochs=2)
    assert "10/10" in terminal.getvalue() and "epoch    2/2  loss" in terminal.getvalue()


def test_a_config_keeps_its_tuples(tmp_path):
    @dataclasses.dataclass
    class Config:
        widths: tuple = (1, 2)

    class ToyTuples(genkern.models.Model):
        def __init__(self, config):
            super().__init__(config)
            self.x = torch.nn.Parameter(torch.zeros(1))

    ToyTuples.Config = Config
    ToyTuples(Config((3, (4, 5)))).save_pretrained(tmp_path)
    assert genkern.load(tmp_path).config == Config((3, (4, 5)))


def test_damaged_models_are_refused_by_name(tmp_path):
    toy().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:50], whole[:-1], b""):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors cannot be used"):
            genkern.load(tmp_path)
    ToyDenoiser(ToyConfig(hidden=3)).save_pretrained(tmp_path / "other")
    weights.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be used.*size mismatch"):
        genkern.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be used"):
        genkern.load(tmp_path)


def test_evaluate_counts_every_input_once():
    model, x = ToyImages(ToyImages.Config(classes=10)), images(10)
    labels = torch.arange(10)
    whole = model.evaluate(x, labels, key=genkern.random.key(0), likelihood=True)
    parts = model.evaluate(x, labels, key=genkern.random.key(0), batch_size=3, likelihood=True)
    assert whole == pytest.approx(parts) and whole["loss"] == pytest.approx(-model.log_prob(x, labels=labels).mean().item())
    noisy = vae(likelihood="discretized_logistic")
    whole, parts = (noisy.evaluate(x, key=genkern.random.key(0), batch_size=n, likelihood=True) for n in (10, 3))
    assert whole == pytest.approx(parts, rel=1e-5) and whole["bits_per_dim"] > 0  # each input has its noise


def test_a_grid_in_a_notebook():
    pytest.importorskip("PIL")
    from genkern import plots

    x = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    x[2] = 16
    picture = plots.grid(x, levels=16, columns=2, scale=1)
    assert picture.size == (18, 18) and picture.getpixel((1, 10)) == 255 and picture.getpixel((1, 1)) == 0
    assert hasattr(picture, "_repr_png_")
    assert plots.grid(torch.zeros(2, 3, 4, 4)).mode == "RGB"
    for wrong, words in ((torch.zeros(2, 2, 4, 4), "C 1 or 3"), (torch.full((1, 1, 2, 2), 7.0), r"found \[7, 7\]"), (x, "found 16")):
        with pytest.raises(ValueError, match=words):
            plots.grid(wrong, levels=3)


def test_curves_and_table():
    pytest.importorskip("matplotlib")
    from genkern import plots

    history = fit(toy(), points(), epochs=2, progress=False)
    figure = plots.curves(history)
    assert [axes.get_title() for axes in figure.axes] == ["loss", "size"] and len(figure.axes[0].lines) == 2
    row = {"a": 1.23456789, "long name": 2, "more": 3}
    text = plots.table([row, row], width=16)
    assert text.splitlines() == ["    a  long name", "1.235          2", "1.235          2", "(not shown: more)"]
    assert plots.table([row], width=16).splitlines() == ["a          1.235", "long name  2", "more       3"]
