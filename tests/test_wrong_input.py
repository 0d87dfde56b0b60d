"""Every public op and draw, given one wrong argument after another: TypeError, ValueError or IndexError in words, nothing written."""

from dataclasses import replace

import pytest
import torch

from genkern import data, metrics, models, nn, ops, plots, random, samplers
from genkern.random import key
from genkern.train import fit
from genkern.train import sample as draw


def r(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def i(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


MASK, KEY, TABLE, U8 = r(4, 3) > 0, key(3), torch.linspace(0.9, 0.1, 5), torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
COUPLING = dict(x=r(2, 4, 3), params=r(2, 8, 3), scale="exp", layout="shift_scale", mask=MASK, log_det=r(2))
PRIOR = dict(mu=r(2, 3), log_var=r(2, 3), prior_mu=r(2, 3), prior_log_var=r(2, 3), free_bits=0.1, reduction="sample")
GUIDANCE = dict(moments=ops.guidance_moments(r(4, 3)), rescale=0.5, parallel=0.5, max_norm=3.0)
STEP = dict(x=r(2, 3), model_output=r(4, 3), table=r(3, 15), step=1, **GUIDANCE)
PLU = dict(zip(("permutation", "lower", "upper", "sign", "log_diagonal"), ops.plu_factors(r(3, 3)), strict=True))
NORM = dict(weight=r(4), bias=r(4), pre_bias=r(2, 4), scale=r(2, 4), shift=r(2, 4), activation="silu")
DRAW = dict(key=KEY, shape=(3,), out=torch.zeros(3))
SPLINE = dict(x=r(5), widths=r(5, 4), heights=r(5, 4), derivatives=r(5, 3), tails="linear", tail_bound=1.0, min_bin_width=1e-3)

CALLS = [  # good arguments, of which one at a time is replaced
    (ops.actnorm, dict(x=r(2, 3, 4), log_scale=r(3), shift=r(3), log_det=r(2))),
    (ops.additive_coupling, dict(x=r(2, 4, 3), shift=r(2, 4, 3), mask=MASK)),
    (ops.affine_coupling, COUPLING),
    (ops.affine_coupling, dict(x=r(2, 4), params=r(2, 4), scale="tanh", limit=2.0)),
    (ops.affine_coupling_, COUPLING),
    (ops.bernoulli_nll, dict(logits=r(2, 3), x=r(2, 3))),
    (ops.causal_conv1d, dict(x=r(2, 3, 5), weight=r(3, 1, 4), bias=r(3), groups=3, initial_state=r(2, 3, 3), activation="silu")),
    (ops.causal_conv1d, dict(x=r(2, 3, 2), weight=r(3, 1, 4), groups=3, seq_idx=i([0, 0], [0, 1], dtype=torch.int32))),
    (ops.causal_conv1d_update, dict(x=r(2, 3), state=r(4, 3, 3), weight=r(3, 4), bias=r(3), state_indices=i(0, 2, dtype=torch.int32))),
    (ops.denoising_loss, dict(prediction=r(2, 3), x0=r(2, 3), timesteps=i(1, 2), table=TABLE, key=KEY, target="eps", weighting="p2")),
    (ops.denoising_loss, dict(prediction=r(2, 3), wanted=r(2, 3), timesteps=i(1, 2), table=TABLE, target="v", weighting="edm")),
    (ops.dequantize, dict(x=U8, levels=16, key=KEY, transform="logit", alpha=0.1)),
    (ops.discretized_logistic_nll, dict(mu=r(2, 3), log_scale=r(2, 3), x=r(2, 3), levels=256)),
    (ops.discretized_mix_logistic_cdf, dict(params=r(2, 20, 2), previous=r(2, 1, 2), levels=16)),
    (ops.discretized_mix_logistic_nll, dict(x=r(2, 3, 2), params=r(2, 20, 2), mode="exact", levels=16, min_log_scale=-7.0)),
    (ops.discretized_mix_logistic_sample, dict(params=r(2, 20, 2), temperature=0.9, uniforms=r(2, 5, 2).sigmoid())),
    (ops.discretized_mix_logistic_sample, dict(params=r(2, 20, 2), key=KEY)),
    (ops.dynamic_threshold, dict(STEP, quantile=0.9, maximum=1.5)),
    (ops.gated_activation, dict(x=r(2, 6, 4), condition=r(2, 6, 1), colors=3, layout="grouped")),
    (ops.gaussian_kl, PRIOR),
    (ops.gaussian_log_prob, dict(x=r(2, 3), mean=r(3), log_std=r(2, 3))),
    (ops.gaussian_mixture_nll, dict(x=r(2, 1, 5), params=r(2, 6, 5), min_log_scale=-7.0)),
    (ops.gaussian_mixture_sample, dict(params=r(2, 6, 5), temperature=0.9, uniforms=r(2, 3, 5).sigmoid())),
    (ops.gaussian_nll, dict(mu=r(2, 3), log_var=r(2, 3), x=r(2, 3))),
    (ops.group_norm_act, dict(x=r(2, 4, 3), groups=2, **NORM, out=torch.zeros(2, 4, 3))),
    (ops.guidance_moments, dict(model_output=r(4, 3))),
    (ops.invertible_conv1x1, dict(x=r(2, 3, 4), weight=r(3, 3), bias=r(3), log_abs_det=r(), log_det=r(2))),
    (ops.log_importance_weight, dict(nll=r(2), z=r(2, 3), mu=r(2, 3), log_var=r(2, 3), log_sum=r(2))),
    (ops.lu_linear, dict(x=r(2, 3), lower=r(3), upper=r(3), diagonal=r(3), bias=r(3))),
    (ops.made_masks, dict(degrees=[torch.arange(1, 4), i(1, 2)], per_input=2, layout="blocks")),
    (ops.masked_conv2d, dict(x=r(2, 3, 4, 4), weight=r(6, 3, 3, 3), bias=r(6), mask_type="A", colors=3, layout="grouped")),
    (ops.masked_linear, dict(x=r(2, 3), weight=r(4, 3), mask=MASK, bias=r(4))),
    (ops.mu_law_decode, dict(index=torch.arange(5), levels=256, dtype=torch.float32)),
    (ops.mu_law_encode, dict(x=r(5), levels=256, rounding="nearest")),
    (ops.plu_factors, dict(weight=r(3, 3))),
    (ops.plu_weight, dict(PLU, log_scale=r(3), shift=r(3))),
    (ops.q_sample, dict(x0=r(2, 3), timesteps=i(1, 2), table=TABLE, key=KEY, target="eps")),
    (ops.rational_quadratic_spline, dict(SPLINE, min_bin_height=1e-3, min_derivative=1e-3, log_det="element")),
    (
        ops.rational_quadratic_spline_coupling,
        dict(x=r(5, 3), params=r(5, 22), changed=i(0, 2), bins=4, tails="linear", tail_bound=1.0, min_bin_width=1e-3, logit_scale=0.5),
    ),
    (ops.reparameterize, dict(mu=r(2, 3), log_var=r(2, 3), key=KEY, clamp=(-1.0, 1.0))),
    (ops.reparameterize_kl, dict(PRIOR, key=KEY, clamp="soft5")),
    (ops.sample_tokens, dict(logits=r(2, 5), temperature=0.9, top_k=2, top_p=0.9, min_p=0.1, order="joint", uniforms=r(2).sigmoid())),
    (ops.sample_tokens, dict(logits=r(2, 5), repetition_penalty=1.2, previous=i([1], [2]), key=KEY)),
    (ops.sampler_step, dict(STEP, h1=r(2, 3), noise=r(2, 3), clip=1.0, out=torch.zeros(2, 3), history_out=torch.zeros(2, 3))),
    (ops.sampler_step, dict(x=r(2, 3), model_output=r(2, 3), table=r(3, 13), step=i(0, 1), bound=r(2).exp(), key=KEY)),
    (ops.squeeze, dict(x=r(2, 3, 4, 4), factor=2, order="channel")),
    (ops.timestep_embedding, dict(t=torch.arange(3), dim=8, max_period=1e4, order="cos_sin", shift=0.0, scale=1.0)),
    (ops.total_correlation, dict(z=r(2, 3), mu=r(2, 3), log_var=r(2, 3), dataset_size=10, sampling="stratified")),
    (ops.unsqueeze, dict(x=r(2, 4, 4, 4), factor=2, order="channel")),
    (random.bernoulli, dict(DRAW, p=0.5)),
    (random.bernoulli, dict(key=KEY, p=TABLE, out=torch.zeros(5))),
    (random.bits, dict(DRAW, out=torch.zeros(3, dtype=torch.int32))),
    (random.exponential, dict(DRAW, rate=1.0)),
    (random.fold_in, dict(key=KEY, data=3)),
    (random.gumbel, dict(DRAW, loc=0.0, scale=1.0)),
    (random.key, dict(seed=3)),
    (random.logistic, dict(DRAW, loc=0.0, scale=1.0)),
    (random.normal, dict(DRAW, mean=0.0, std=1.0)),
    (random.split, dict(key=KEY, n=3)),
    (random.truncated_normal, dict(DRAW, low=-1.0, high=1.0)),
    (random.uniform, dict(DRAW, low=0.0, high=1.0)),
]  # fmt: skip


MOVED = ("key", "timesteps", "table")  # to where they are needed


def wrong_values(name, value, alone):
    """(what it is, whether it must be refused, the value): the others may be right, as where a tensor broadcasts."""
    yield "text", not isinstance(value, str), "no such thing"
    if isinstance(value, torch.Tensor):
        yield "a list", True, value.tolist() or [1.0]
        yield "complex", True, value.to(torch.complex64)
        yield "on meta", not alone, value.to("meta")
        if value.is_floating_point():
            yield "integers", name not in ("t", "mask"), value.long()
            yield "with a gradient", name in ("out", "history_out"), value.clone().requires_grad_()
        else:
            yield "of another integer type", False, value.to(torch.int16)
            yield "reals", name not in ("t", "mask"), value.float()
            yield "too large", name in ("timesteps", "step", "state_indices", "previous"), value + 100
        yield "of one more dimension", False, value.unsqueeze(0)
        yield "a scalar", False, value.new_zeros(())
        if value.dim():
            yield "longer", False, torch.cat([value, value[..., :1]], -1)
            yield "of more rows", False, torch.cat([value, value[:1]])
            yield "empty", False, value[:0]
    elif isinstance(value, str):
        yield "a typo", True, value + "x"
        yield "a list of it", True, [value]
    elif isinstance(value, (int, float)):
        yield "two numbers", name not in ("p",), torch.ones(2)
        yield "of the other sign", False, -value - 1
        yield "no number", False, float("nan")
    elif isinstance(value, tuple):
        yield "text in a tuple", True, ("a", "b")
    elif isinstance(value, torch.dtype):
        yield "an integer type", True, torch.int32


@pytest.mark.parametrize(("function", "arguments"), CALLS, ids=[f"{f.__name__}-{n}" for n, (f, _) in enumerate(CALLS)])
def test_a_wrong_argument_is_refused_in_words_and_nothing_is_written(function, arguments):
    fresh = lambda: {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    function(**fresh())
    for name, value in arguments.items():
        others = [n for n, x in arguments.items() if isinstance(x, torch.Tensor) and n not in (name, *MOVED)]
        for what, must, wrong in wrong_values(name, value, alone=not others):
            given = fresh() | {name: wrong}
            where = f"{function.__name__}({name}: {what})"
            own = {n: x for n, x in given.items() if isinstance(x, torch.Tensor) and x.device.type == "cpu"}
            before = {n: x.detach().clone() for n, x in own.items()}
            try:
                function(**given)
            except (TypeError, ValueError, IndexError) as error:
                words = str(error)
                assert words.startswith((f"{function.__name__}: ", "key must be")) and len(words) < 300, f"{where}: {words}"
                for n, x in own.items():
                    assert torch.equal(x.detach(), before[n]), f"{where} was refused and wrote {n}"
            else:
                assert not must, f"{where} was taken"


def test_every_public_op_is_tried():
    missing = {name for name in ops.__all__} - {function.__name__ for function, _ in CALLS}
    assert missing == {"made_inverse"}  # which takes functions: tests/flow/test_made_inverse.py


def network(width):
    linear = torch.nn.Linear(2, width)
    return lambda kept, context: linear(kept)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.ActNorm(3)(r(2, 4)), r"ActNorm: x must be \(N, 3"),
        (lambda: nn.ActNorm(3)([1.0]), "ActNorm: x must be a tensor"),
        (lambda: nn.AffineCoupling(network(4), 4, scale="sigmiod"), "AffineCoupling: scale must be one of"),
        (lambda: nn.AffineCoupling(network(4), 4, changed=9), "changed must be in 1..4"),
        (lambda: nn.AffineCoupling(network(4), 4)(r(2, 5)), r"AffineCoupling: x must be \(N, 4"),
        (lambda: nn.CausalAttention2d(4)(r(2, 3, 2, 2)), "CausalAttention2d: x must have shape"),
        (lambda: nn.CausalConv1d(3, 3, 2).step(r(2, 1)), r"step: input must be \(N, 3\)"),
        (lambda: nn.GroupNormAct(2, 4, activation="sillu"), "activation must be one of"),
        (lambda: nn.GroupNormAct(0, 4), "num_groups must divide"),
        (lambda: nn.MADE(3, 0), "per_input must be an int of at least 1"),
        (lambda: nn.Permute([0, 0, 1]), "Permute: order must be"),
        (lambda: nn.Permute([1, 0])(r(2, 3)), r"Permute: x must be \(N, 2"),
        (lambda: nn.SplineCoupling(network(3), 4, bins=0), "bins must be an int of at least 1"),
        (lambda: nn.SplineCoupling(network(3), 4)(r(2, 4)), "needs 46 parameters"),
        (lambda: nn.Squeeze("chanel"), "Squeeze: order must be one of"),
    ],
)
def test_layers_refuse_in_words(make, words):
    with pytest.raises((TypeError, ValueError), match=words):
        make()


VAE, CLASSES = models.VAEConfig(levels=16, width=4, hidden=8, latent=2), dict(classes=3, levels=16, width=4, hidden=8, latent=2)
POINTS = data.Data("points", *[(r(20, 2), None)] * 3, shape=(2,), levels=None)
IMAGES, DDIM = torch.zeros(2, 1, 8, 8, dtype=torch.uint8), samplers.by_name("ddim", samplers.Schedule.cosine(), 2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: random.normal(KEY, (-3,)), "shape must not be negative"),
        (lambda: random.draw_key(42), "generator must be a torch.Generator, got 42"),
        (lambda: samplers.by_name("ddim", 20), "schedule must be a Schedule"),
        (lambda: samplers.DDIM(20), "DDIM: schedule must be a Schedule"),
        (lambda: samplers.Schedule.linear(-5), "timesteps must be an int of at least 2, got -5"),
        (lambda: DDIM.sample(lambda x, t: None, (2, 3), key=KEY), "the model must return a tensor"),
        (lambda: DDIM.sample(lambda x, t: x, "23", key=KEY), "DDIM.sample: shape must be integers"),
        (lambda: models.VAE(VAE).decode(r(2, 3)), r"VAE: latents must be \(N, 2\), got \(2, 3\)"),
        (lambda: models.ConditionalVAE(models.ConditionalVAEConfig(**CLASSES))(IMAGES), "3 classes needs labels"),
        (lambda: models.ConditionalVAE(models.ConditionalVAEConfig(**CLASSES)).sample(2, labels=3), r"must be in 0\.\.2"),
        (lambda: models.VAE(VAE).sample(2, labels=1), "unexpected keyword argument 'labels'"),
        (lambda: models.NICE(models.NICEConfig(shape=(2,))).sample(2, temperature="hot"), "temperature must be a number"),
        (lambda: models.NICE(models.NICEConfig(shape=(2,))).sample(2, temperature=-1), "temperature must not be negative"),
        (lambda: models.ConditionalGAN(models.ConditionalGANConfig(classes=3)).sample(2, labels=3), r"must be in 0\.\.2"),
        (lambda: models.GAN(models.GANConfig(r1=-1.0)), "gradient_penalty and r1 must be at least 0"),
        (lambda: models.VAE.config_for(IMAGES), "VAE: needs a genkern.data set, got Tensor"),
        (lambda: models.VAE(VAE).decode(3), r"VAE: latents must be \(N, 2\), got int"),
        (lambda: models.VAE(VAE).traverse(r(3)), r"VAE: z must be one latent \(2,\), got \(3,\)"),
        (lambda: models.VAE(VAE).interpolate(IMAGES, IMAGES[:1]), "as many images in a as in b, got 2 and 1"),
        (lambda: models.VAE(VAE).evaluate("images", key=KEY), "VAE: inputs must be a tensor, got str"),
        (lambda: models.VAE(replace(VAE, beta=-1.0)), "VAE: beta must be at least 0, got -1.0"),
        (lambda: models.ConditionalVAE(models.ConditionalVAEConfig(**CLASSES)).evaluate(IMAGES, key=KEY), "labels of the 2 inputs"),
        (lambda: models.ConditionalVAE(models.ConditionalVAEConfig(**CLASSES)).traverse(labels=3), r"must be in 0\.\.2"),
        (lambda: metrics.report(1, 2), "report: data must be a genkern.data.Data"),
        (lambda: metrics.report(1, POINTS), "report: samples must be a tensor, got int"),
        (lambda: metrics.report(IMAGES, POINTS, classifier=3), "report: classifier must be a Classifier, got int"),
        (lambda: metrics.Classifier.of(IMAGES), "Classifier: data must be a genkern.data.Data"),
        (lambda: metrics.baselines(IMAGES), "baselines: data must be a genkern.data.Data"),
        (lambda: metrics.Gaussian(IMAGES), "Gaussian: data must be a genkern.data.Data"),
        (lambda: metrics.Gaussian(POINTS).log_prob(r(4, 3)), r"Gaussian: inputs must be \(N, ...\) of 2 numbers each, got \(4, 3\)"),
        (lambda: metrics.histogram_log_prob(POINTS, r(2, 2)), "needs uint8 data, and points is float"),
        (lambda: metrics.frechet_distance({}, r(3, 2)), "frechet_distance: a must be a tensor or an array of numbers, got dict"),
        (lambda: metrics.class_shares(None, 3), "class_shares: labels must be a tensor or an array of numbers, got NoneType"),
        (lambda: metrics.ngram_bits(IMAGES, IMAGES, 2), r"ngram_bits: train must be integers \(N, T\)"),
        (lambda: metrics.lpc_bits(i(1, 2)[None], r(1)), "lpc_bits: amplitudes must ascend"),
        (lambda: metrics.lpc_bits(i(1, 5)[None], TABLE.flip(0)), r"lpc_bits: levels must be in 0\.\.4, got 1\.\.5"),
        (lambda: metrics.png_bits([]), "png_bits: there are no pictures"),
        (lambda: metrics.png_bits([r(3, 4, 4)]), "png_bits: each picture must be uint8"),
        (lambda: plots.grid(IMAGES, columns=0), "grid: columns must be an int of at least 1, got 0"),
        (lambda: plots.spectrograms(r(1, 1, 99), size=1.5), "spectrograms: size must be an int"),
        (lambda: plots.curves(3), "curves: history must be the list that fit"),
        (lambda: plots.density(3), "density: model must have a log_prob, got int"),
        (lambda: draw(3, 2, key=KEY), "sample: model must be one of genkern.models, got int"),
        (lambda: fit(models.VAE(VAE), POINTS, seed="one"), "seed must be an int, got str"),
        (lambda: data.load(None), "source must be a name or a path, got NoneType"),
        (lambda: fit(torch.nn.Linear(2, 2), None), "model must be one of genkern.models, got Linear"),
        (lambda: fit(models.VAE(VAE), IMAGES), "data must be a genkern.data.Data"),
    ],
)
def test_models_samplers_metrics_and_training_refuse_in_words(make, words):
    with pytest.raises((TypeError, ValueError), match=words):
        make()


@torch.no_grad()
def test_a_step_with_the_state_of_other_samples_is_refused():
    layer = nn.CausalConv1d(3, 3, 4)
    state = layer.step(r(3, 3))[1]
    with pytest.raises(ValueError, match="the 3 samples of its state, got 1"):
        layer.step(r(1, 3), state)


def test_memory_that_overlaps_is_refused():
    table, history = r(3, 13), r(3, 15)
    buffer, m = r(5, 8), r(4, 8)
    x, shifted = buffer[:4], buffer[1:]
    before = buffer.clone()
    for call, words in (
        (lambda: ops.sampler_step(x, m, table, 1, out=shifted), "out must not overlap"),
        (lambda: ops.sampler_step(m, m, history, 1, m, out=x, history_out=x), "history_out and out must not share"),
        (lambda: ops.sampler_step(x, m, table, 1, out=r(1, 8).expand(4, 8)), "out must not be expanded"),
        (lambda: ops.group_norm_act(x, 2, out=shifted), "out must not overlap"),
        (lambda: ops.affine_coupling_(x, x[:, :4]), "x and params must not share"),
        (lambda: ops.affine_coupling_(r(1, 4).expand(3, 4), r(3, 4)), "x must not be expanded"),
        (lambda: ops.causal_conv1d_update(r(3, 2), r(1, 2, 3).expand(3, 2, 3), r(2, 4)), "state must not be expanded"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert torch.equal(buffer, before)
    expected = ops.sampler_step(x, m, table, 1)
    assert torch.equal(ops.sampler_step(x, m, table, 1, out=x), expected)  # in place
    ops.affine_coupling_(buffer[:, :4], buffer[:, 4:])  # columns of one tensor
