"""A whole pipeline of diffusers, tiny and random, before and after fuse()."""

import copy
import json

import numpy as np
import pytest
import torch

import genkern
from genkern.models import StableDiffusion

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
from genkern.integrations.diffusers import fuse, unfuse  # noqa: E402

LATENT = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def tokenizer(folder):
    """A vocabulary of single letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16), len(tokens)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    words, vocabulary = tokenizer(folder)
    text = transformers.CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=4, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=8,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=transformers.CLIPTextModel(text), tokenizer=words, unet=unet,
        scheduler=diffusers.DPMSolverMultistepScheduler(**LATENT), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder / "saved")
    return folder / "saved"


def load(folder):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, **arguments):
    generator = torch.Generator().manual_seed(3)
    return pipe(["ab c", "de"], num_inference_steps=4, generator=generator, output_type="np", **arguments).images


def kinds(pipe):
    return [type(m) for c in pipe.components.values() if isinstance(c, torch.nn.Module) for m in c.modules()]


@pytest.mark.parametrize("scheduler", ["DPMSolverMultistep", "EulerAncestralDiscrete", "PNDM"])
def test_same_images(folder, scheduler):
    pipe = load(folder)
    pipe.scheduler = getattr(diffusers, scheduler + "Scheduler").from_config(pipe.scheduler.config, skip_prk_steps=True)
    expected, original = images(pipe), kinds(pipe)
    assert fuse(pipe) is pipe and kinds(pipe) != original
    genkern.reset_stats()
    got = images(pipe)
    calls = {name: n for (name, backend), n in genkern.stats().items() if backend != "reference"}
    assert calls["sampler_step"] == len(pipe.scheduler.timesteps) and calls["group_norm_act"] + calls["group_norm_act_out"] > 4 * 10
    np.testing.assert_allclose(got, expected, atol=1e-4)
    unfuse(pipe)
    assert kinds(pipe) == original
    np.testing.assert_array_equal(images(pipe), expected)


def test_from_pretrained_saves_and_loads(folder, tmp_path):
    pipe = StableDiffusion.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is diffusers.StableDiffusionPipeline
    expected = images(pipe)
    pipe.save_pretrained(tmp_path / "fused")
    load(folder).save_pretrained(tmp_path / "plain")
    for name in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        assert (tmp_path / "fused" / name).read_text() == (tmp_path / "plain" / name).read_text()
    np.testing.assert_allclose(images(load(tmp_path / "fused")), expected, atol=1e-4)  # the plain pipeline
    other = copy.deepcopy(pipe.unet)
    assert type(other) is type(pipe.unet)


@pytest.mark.parametrize("kind", ["default", "scale_shift"])
@pytest.mark.parametrize("resample", [{}, {"up": True}, {"down": True}], ids=str)
def test_residual_blocks(kind, resample):
    torch.manual_seed(0)
    block = diffusers.models.resnet.ResnetBlock2D(
        in_channels=8, out_channels=16, temb_channels=6, groups=4, groups_out=8, time_embedding_norm=kind, **resample
    )
    x, temb = torch.randn(2, 8, 6, 6, requires_grad=True), torch.randn(2, 6)
    grads = []
    for model in (block, fuse(copy.deepcopy(block))):
        y = model(x, temb)
        grads.append((y.detach(), *torch.autograd.grad(y.square().sum(), (x, *model.parameters()))))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_channels_last(folder):
    """All norms read and write the layout that the convolutions work in."""
    pipe = load(folder)
    unet = pipe.unet.to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = unet(x, 5, torch.zeros(2, 16, 32)).sample
        fuse(unet)
        genkern.reset_stats()
        got = unet(x, 5, torch.zeros(2, 16, 32)).sample
    counts = {name for name, backend in genkern.stats() if name.startswith("group_norm_act")}
    assert counts == {"group_norm_act_channels_last"}
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_refusals():
    with pytest.raises(TypeError, match="fuse: "):
        fuse(3)
