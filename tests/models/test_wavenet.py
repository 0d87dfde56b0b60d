"""WaveNet: its step against the parallel pass bit for bit, probabilities, continuation, conditions, checkpoints of r9y9's layout."""

import math
import wave

import pytest
import torch
import torch.nn.functional as F

import genkern
from genkern import random
from genkern.models import WaveNet, WaveNetConfig, load
from genkern.testing import assert_autoregressive

TINY = {"layers": 4, "stacks": 2, "residual": 20, "gate": 24, "skip": 17, "levels": 32}
each_head = pytest.mark.parametrize("head", ["softmax", "logistic", "gaussian"])


def tiny(head="softmax", **settings):
    torch.manual_seed(0)
    model = WaveNet(WaveNetConfig(**{"head": head, **TINY, **settings})).eval()
    torch.nn.init.normal_(model.last_conv_layers[-1].weight, std=0.3)
    return model


def sound(n=2, length=70):
    t = torch.arange(length) / 5
    return (0.8 * torch.sin(t + torch.arange(n)[:, None])).unsqueeze(1)


@each_head
@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("batch", [1, 32])
def test_step_has_the_bits_of_the_parallel_pass(head, chunk, batch):
    model = tiny(head, classes=3, condition=2, kernel_size=3)
    labels, condition = torch.arange(32) % 3, torch.randn(32, 2, 131)
    x = model.quantized(sound(32, 130))
    with torch.no_grad():
        parallel = model.network(x, labels=labels, condition=condition)[0][:batch]
    x, labels, condition = x[:batch], labels[:batch], condition[:batch]
    out, state = model.step(x[..., :0], labels=labels, condition=condition[..., :1])
    outputs = [out]
    for begin in range(0, 130, chunk):
        end = min(130, begin + chunk)
        out, state = model.step(x[..., begin:end], state, labels=labels, condition=condition[..., begin + 1 : end + 1])
        outputs.append(out)
    assert torch.equal(torch.cat(outputs, 2), parallel)


def test_chunks_and_single_samples_hand_on_their_state():
    model = tiny(classes=3, condition=2, kernel_size=3)
    labels, condition, x = torch.arange(3), torch.randn(3, 2, 91), model.quantized(sound(3, 90))
    with torch.no_grad():
        parallel = model.network(x, labels=labels, condition=condition)[0]
    out, state = model.step(x[..., :0], labels=labels, condition=condition[..., :1])
    outputs, at = [out], 0
    for size in (1, 1, 30, 1, 1, 1, 7, 40, *[1] * 8):
        out, state = model.step(x[..., at : at + size], state, labels=labels, condition=condition[..., at + 1 : at + size + 1])
        outputs.append(out)
        at += size
    assert at == 90 and torch.equal(torch.cat(outputs, 2), parallel)


def test_threads_do_not_change_a_bit():
    model, x, threads = tiny(), sound(3, 400), torch.get_num_threads()
    try:
        outputs = []
        for n in (1, 2):
            torch.set_num_threads(n)
            outputs.append(model.log_prob(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*outputs)


@each_head
def test_no_output_sees_its_future(head):
    model = tiny(head)
    changed = model.quantized(sound())
    before = model.network(changed)[0]
    changed[..., 30:] = model.quantized(-changed[..., 30:])
    after = model.network(changed)[0]
    assert torch.equal(before[..., :31], after[..., :31]) and not torch.equal(before[..., 31], after[..., 31])


def test_no_output_of_a_layer_sees_its_future():
    layer = tiny("logistic").conv_layers[1]
    through, joined = (lambda one, *x: one(*x)), (lambda a, b, x: (a(x), b(x)))
    assert_autoregressive(lambda x: layer(x, None, None, through, joined)[0], torch.randn(2, 20, 15), strict=False)


@pytest.mark.parametrize("head", ["softmax", "logistic"])
def test_probabilities_of_all_sounds_sum_to_one(head):
    model = tiny(head, levels=3)
    every = model.quantized(torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 4)[:, None])
    assert len(every.unique(dim=0)) == 81
    assert abs(model.log_prob(every).double().logsumexp(0)) < 1e-5
    bits = model.bits_per_dim(every)
    torch.testing.assert_close(bits, -model.log_prob(every) / (4 * math.log(2)))


@each_head
def test_sampling_is_the_naive_loop_and_continues_what_is_known(head):
    model, known, key = tiny(head), sound(2, 5), random.key(3)
    got = model.sample(2, length=12, known=known, key=key, temperature=0.9)
    naive, keys = model.quantized(known), random.split(key, 2)
    with torch.no_grad():
        for t in range(5, 12):
            params = model.network(naive)[0][..., -1]
            naive = torch.cat([naive, model.draw(params, random.fold_in(keys, t), 0.9)], 2)
    assert torch.equal(got, naive)
    assert torch.equal(model.sample(2, length=12, known=known, key=key, temperature=0.9, batch_size=1), got)
    assert got.abs().max() <= 1 and torch.equal(got[..., :5], model.quantized(known))


def test_native_kernels_run_and_train(tmp_path):
    model = tiny("logistic", classes=2)
    genkern.reset_stats()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(15):
        out = model(sound(), labels=torch.tensor([0, 1]))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0] - 0.3 and all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.sample(1, length=3, labels=torch.tensor([1]))
    ran = genkern.stats()
    for op in (
        "causal_conv1d_dense",
        "causal_conv1d_dense_backward",
        "gated_activation",
        "discretized_mix_logistic_nll",
        "wavenet_step",
    ):
        assert ran[op, "cpu"] and not ran.get((op, "reference"))
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(
        again.log_prob(sound(), labels=torch.tensor([0, 1])), model.eval().log_prob(sound(), labels=torch.tensor([0, 1]))
    )


def r9y9(weights, x, c, g, layers):
    """The forward pass of wavenet_vocoder on its own state dict, in plain torch: x (N, C, T), c (N, channels, T), g (N,)."""

    def conv(name, x, dilation=1):
        v, scale = weights[name + ".weight_v"], weights[name + ".weight_g"]
        w = v * scale / v.norm(dim=(1, 2), keepdim=True)
        return F.conv1d(F.pad(x, ((w.shape[2] - 1) * dilation, 0)), w, weights.get(name + ".bias"), dilation=dilation)

    g = weights["embed_speakers.weight"][g][..., None]
    x, skips = conv("first_conv", x), 0
    for i in range(layers):
        name = f"conv_layers.{i}."
        a, b = (conv(name + "conv", x, 2 ** (i % 2)) + conv(name + "conv1x1c", c) + conv(name + "conv1x1g", g)).chunk(2, 1)
        z = torch.tanh(a) * torch.sigmoid(b)
        skips = skips + conv(name + "conv1x1_skip", z)
        x = (conv(name + "conv1x1_out", z) + x) * math.sqrt(0.5)
    x = conv("last_conv_layers.1", F.relu(skips * math.sqrt(1 / layers)))
    return conv("last_conv_layers.3", F.relu(x))


@pytest.mark.parametrize("head", ["softmax", "logistic"])
def test_checkpoints_of_r9y9(head):
    inside = tiny(head, classes=3, condition=2)
    weights = {}
    for name, x in inside.state_dict().items():
        if x.dim() == 3:
            weights[name + "_v"], weights[name + "_g"] = x, torch.rand(len(x), 1, 1) + 0.5
        else:
            weights[name] = x
    weights["upsample_net.conv_in.weight"] = torch.ones(1)
    settings = {"levels": 32} if head == "logistic" else {}
    model = WaveNet.from_r9y9(weights, head=head, stacks=2, **settings)
    assert model.config.rounding == "floor" and (model.config.layers, model.config.condition, model.config.classes) == (4, 2, 3)
    x, c, g = model.quantized(sound(2, 20)), torch.randn(2, 2, 21), torch.tensor([2, 0])
    before = F.pad(x, (1, 0), value=0.0)
    if head == "softmax":  # r9y9 begins with level 127 of 256: here 15 of 32
        index = model._index(x)[:, 0]
        before = F.one_hot(F.pad(index, (1, 0), value=15), 32).transpose(1, 2).float()
    expected = r9y9(weights, before, c, g, 4)
    torch.testing.assert_close(model.network(x, labels=g, condition=c)[0], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="state dict"):
        WaveNet.from_r9y9({}, head=head, stacks=2)


def test_refusals():
    model = tiny()
    for bad, kind, words in (
        (torch.zeros(2, 1, 4, dtype=torch.uint8), TypeError, "float"),
        (torch.zeros(2, 2, 4), ValueError, r"\(N, 1, L\)"),
        (torch.full((1, 1, 4), 1.5), ValueError, "found"),
    ):
        with pytest.raises(kind, match=words):
            model.log_prob(bad)
    with pytest.raises(ValueError, match="condition"):
        model.log_prob(sound(), condition=torch.zeros(2, 1, 70))
    with pytest.raises(ValueError, match="known"):
        model.sample(1, length=3, known=sound(1, 4))
    for change in ({"head": "cubic"}, {"layers": 5}, {"gate": 7}):
        with pytest.raises(ValueError):
            tiny(**change)


def test_commands(tmp_path, monkeypatch):
    from genkern.cli import main

    monkeypatch.chdir(tmp_path)
    with wave.open("tone.wav", "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(4000)
        file.writeframes((sound(1, 1280)[0, 0] * 32767).to(torch.int16).numpy().tobytes())
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    assert main(["train", "wavenet", "--data", "tone.wav", "--window", "64", "--epochs", "1", "--out", "run", *settings]) == 0
    assert load("run").config.rate == 4000
    assert main(["eval", "run"]) == 0
    assert main(["sample", "run", "--n", "2", "--out", "two.wav"]) == 0
    with wave.open("two.wav") as file:
        assert (file.getframerate(), file.getnframes()) == (4000, 2 * (1024 + 500))
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")
