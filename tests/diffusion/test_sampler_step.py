"""sampler_step: in place, indices on the device, noise of the stream, types, refusals."""

import pytest
import torch

import genkern
from genkern import ops, random
from genkern.ops.diffusion._sampler_step import _sampler_step
from genkern.testing import backends

each_backend = pytest.mark.parametrize("backend", ["reference", *backends(op="sampler_step")])


def arguments(shape=(3, 2, 5, 7), history=1, doubled=True):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.randn(*s, generator=generator)
    return {
        "x": draw(*shape), "model_output": draw(shape[0] * (1 + doubled), *shape[1:]), "table": draw(4, 13 + 2 * history),
        **{f"h{k + 1}": draw(*shape) for k in range(history)},
    }  # fmt: skip


@each_backend
def test_in_place_equals_new_tensors(backend):
    given = arguments(history=2)
    with genkern.backend(backend):
        expected = ops.sampler_step(**given, step=1, next_input=True)
        x, h2, model_input = given["x"].clone(), given["h2"].clone(), torch.empty_like(given["model_output"])
        got = ops.sampler_step(**given | {"x": x, "h2": h2}, step=1, out=x, history_out=h2, input_out=model_input)
    assert got[0] is x and got[1] is h2 and got[2] is model_input
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@each_backend
def test_x_in_half_of_the_model_input(backend):
    """Under guidance the next input is written once, beside x'; a last step keeps no history."""
    given = arguments()
    given["table"][:, -1] = 1.0
    with genkern.backend(backend):
        x, h1, expected = ops.sampler_step(**given, step=1, next_input=True)
        model_input, history = given["x"].repeat(2, 1, 1, 1), given["h1"].clone()
        first, second = model_input.chunk(2)
        ops.sampler_step(**given | {"x": first, "h1": history}, step=1, out=first, history_out=history, input_out=second)
        assert torch.equal(model_input, expected) and torch.equal(history, h1)
        _sampler_step(given["x"], given["model_output"], given["table"], 1, given["h1"], None, None, history, None, None)
    assert torch.equal(history, x)


@each_backend
def test_a_step_index_per_sample_is_a_loop_over_samples(backend):
    given, steps = arguments(), torch.tensor([3, 0, 2])
    u, c = given["model_output"].chunk(2)
    with genkern.backend(backend):
        together = ops.sampler_step(**given, step=steps)
        one = ops.sampler_step(**given, step=torch.tensor(2))
        for i, step in enumerate(steps.tolist()):
            alone = {"x": given["x"][i : i + 1], "model_output": torch.stack([u[i], c[i]]), "h1": given["h1"][i : i + 1]}
            separate = ops.sampler_step(**given | alone, step=step)
            assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, separate, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(one, ops.sampler_step(**given, step=2), strict=True))


@each_backend
def test_noise_is_that_of_the_stream(backend):
    given = arguments(history=0, doubled=False)
    for key in (random.key(3), random.split(random.key(3), 3)):
        with genkern.backend(backend):
            drawn = ops.sampler_step(**given, step=1, key=key)
            told = ops.sampler_step(**given, step=1, noise=random.normal(key, given["x"].shape))
        torch.testing.assert_close(drawn, told, rtol=1e-6, atol=1e-6)


def test_without_a_key_the_global_generator_rules():
    given, drawn = arguments(history=0), []
    for _ in range(2):
        torch.manual_seed(1)
        drawn.append(ops.sampler_step(**given, step=0, noise=True))
    assert torch.equal(*drawn) and not torch.equal(drawn[0], ops.sampler_step(**given, step=0, noise=True))


@each_backend
def test_float32_sample_with_bfloat16_model(backend):
    given = arguments()
    given["model_output"] = given["model_output"].bfloat16()
    with genkern.backend(backend):
        x, history, model_input = ops.sampler_step(**given, step=1, next_input=True)
    assert (x.dtype, history.dtype, model_input.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    scaled = (given["table"][1, -1] * x).bfloat16()
    torch.testing.assert_close(model_input, torch.cat([scaled, scaled]), rtol=1e-2, atol=1e-6)


@each_backend
def test_nan_passes_the_clip(backend):
    given = arguments(history=0)
    given["x"][0, 0, 0, 0] = float("nan")
    with genkern.backend(backend):
        x = ops.sampler_step(**given, step=0, clip=1.0)
    assert x.isnan().sum() == 1


def test_in_place_compiles_whole():
    given = arguments()
    expected = ops.sampler_step(**given, step=1)
    x, h1 = given["x"].clone(), given["h1"].clone()

    def step(x, h1):
        return ops.sampler_step(**given | {"x": x, "h1": h1}, step=1, out=x, history_out=h1)

    torch.compile(step, fullgraph=True, backend="aot_eager")(x, h1)
    assert torch.equal(x, expected[0]) and torch.equal(h1, expected[1])


def test_inputs_that_require_gradients_give_outputs_that_do_not():
    given = arguments()
    given["model_output"].requires_grad_()
    for backend in ("reference", *backends(op="sampler_step")):
        with genkern.backend(backend):
            assert not any(o.requires_grad for o in ops.sampler_step(**given, step=1))
            assert not ops.guidance_moments(given["model_output"]).requires_grad


def test_moments_give_the_deviation():
    raw = 3.0 + torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    u, c = raw.chunk(2)
    sums = ops.guidance_moments(raw)
    torch.testing.assert_close(sums[:, 1], (c - u).sum(dim=(1, 2, 3)))
    mean = sums[:, 0] / c[0].numel()
    deviation = ((sums[:, 4] - c[0].numel() * mean**2) / (c[0].numel() - 1)).sqrt()
    torch.testing.assert_close(deviation, c.std(dim=(1, 2, 3)), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="guidance_moments: "):
        ops.guidance_moments(raw[:3])


def test_thresholds_are_quantiles():
    """By the leading bits or at once: the interpolated quantile of |a x + b m|, in [1, maximum]."""
    generator = torch.Generator().manual_seed(0)
    x, m = torch.randn(2, 3, 5, 700, generator=generator) * torch.tensor([0.3, 1.0, 4.0])[:, None, None]
    table = torch.zeros(1, 13)
    table[0, 2:4] = torch.tensor([0.6, -0.8])
    size = (0.6 * x - 0.8 * m).flatten(1).abs()
    for q in (0.0, 0.31, 0.5, 0.9, 0.995, 1.0):
        expected = size.quantile(q, 1).clamp(1, 3.0)
        for backend in ("reference", *backends(op="dynamic_threshold")):
            with genkern.backend(backend):
                got = ops.dynamic_threshold(x, m, table, 0, quantile=q, maximum=3.0)
                torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
                assert ops.dynamic_threshold(x * torch.nan, m, table, 0).shape == (3,)
    with pytest.raises(ValueError, match="dynamic_threshold: "):
        ops.dynamic_threshold(x, m, table, 0, quantile=1.5)


def test_refusals():
    given = arguments()
    for error, change in [
        (TypeError, {"x": given["x"].long()}),
        (ValueError, {"model_output": given["x"][:2]}),
        (ValueError, {"table": given["table"][:, 1:]}),
        (TypeError, {"step": 1.0}),
        (ValueError, {"step": 4}),
        (ValueError, {"step": torch.tensor([0, 1, 4])}),
        (ValueError, {"step": torch.tensor([0, 1])}),
        (ValueError, {"h1": None, "h2": given["h1"]}),
        (ValueError, {"clip": 0.0}),
        (ValueError, {"noise": given["x"], "key": random.key(0)}),
        (ValueError, {"key": random.split(random.key(0), 2)}),
        (ValueError, {"out": given["x"].double()}),
        (ValueError, {"out": given["x"][1:]}),
    ]:
        with pytest.raises(error, match="sampler_step: "):
            ops.sampler_step(**{"step": 0, **given, **change})


@pytest.mark.skipif("cpu" not in backends(op="sampler_step"), reason="no CPU library")
@pytest.mark.parametrize("forms", [{}, {"history": 3}, {"noise": True}, {"key": True}, {"float64": True}], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 7), (3, 300000)], ids=str)  # all samples in the cache at once; one after the other
def test_a_step_that_takes_the_moments_itself(forms, shape):
    """What samplers ask of the CPU's kernel: the same numbers as with moments from a pass of their own."""
    history = forms.get("history", 1)
    given = arguments(shape, history)
    if forms.get("float64"):
        given = {name: t.double() for name, t in given.items()}
    x, m, table = given["x"], given["model_output"], given["table"]
    past = [given.get(f"h{k}") for k in (1, 2, 3)]
    noise, key = x.flip(0) if forms.get("noise") else None, random.key(3) if forms.get("key") else None
    results = []
    for moments in (ops.guidance_moments(m), None):
        outputs = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
        _sampler_step(x, m, table, 1, *past, *outputs, None, noise, key, moments, None, None, 0.7, 0.2, 3.0, False)
        results.append(outputs)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
