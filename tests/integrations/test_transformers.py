"""The fused sampler against transformers' own warpers, and Mamba with genkern's convolution."""

import sys

import pytest
import torch

import genkern

transformers = pytest.importorskip("transformers")
from genkern.integrations.transformers import FusedSampler, fuse_causal_conv, unfuse_causal_conv  # noqa: E402


@pytest.mark.parametrize("filters", [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 8, "top_p": 0.6, "temperature": 0.7}])
def test_distribution_is_that_of_the_warpers(filters):
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = {"temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(0)) * 2
    expected = logits
    for name, warper in warpers.items():
        if name in filters:
            expected = warper(filters[name])(None, expected)
    sampler = FusedSampler(key=genkern.random.key(0), **filters)
    scores = sampler(None, logits.expand(20000, -1))
    assert torch.equal(scores == 0, scores > -torch.inf) and ((scores == 0).sum(1) == 1).all()
    shares = (scores == 0).float().mean(0)
    assert not shares[expected[0] == -torch.inf].any()
    assert (shares - expected[0].softmax(0)).abs().max() < 0.015


def test_generate():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=61, n_positions=32, n_embd=24, n_layer=1, n_head=2, eos_token_id=None, bos_token_id=0)
    model, prompt = transformers.GPT2LMHeadModel(config).eval(), torch.randint(0, 61, (2, 4))
    model.generation_config.top_k = 7
    draws = []
    for seed in (1, 1, 2):
        sampler = FusedSampler.of(model.generation_config, key=genkern.random.key(seed))
        assert sampler.filters["top_k"] == 7
        draws.append(model.generate(prompt, do_sample=False, max_new_tokens=9, pad_token_id=0, logits_processor=[sampler]))
    assert draws[0].shape == (2, 13) and torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_mamba():
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=31, hidden_size=16, state_size=4, num_hidden_layers=2, expand=2)
    model, x = transformers.MambaForCausalLM(config).eval(), torch.randint(0, 31, (2, 9))
    with torch.no_grad():
        expected = model(x).logits
        generated = model.generate(x, max_new_tokens=6, do_sample=False, pad_token_id=0)
    module = sys.modules[type(model).__module__]
    original = module.causal_conv1d_fn
    try:
        assert fuse_causal_conv(fuse_causal_conv(model)) is model
        genkern.reset_stats()
        with torch.no_grad():
            torch.testing.assert_close(model(x).logits, expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(model.generate(x, max_new_tokens=6, do_sample=False, pad_token_id=0), generated)
        assert {op for op, _ in genkern.stats()} == {"causal_conv1d", "causal_conv1d_update"}
    finally:
        unfuse_causal_conv(model)
    assert module.causal_conv1d_fn is original
    with pytest.raises(ValueError, match="Mamba"):
        fuse_causal_conv(torch.nn.Linear(2, 2))
