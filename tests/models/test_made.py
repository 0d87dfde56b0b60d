"""MADE: exact probabilities, masks, samples of its own distribution equal to the naive loop."""

import pytest
import torch

from genkern import random
from genkern.models import MADE, MADEConfig


def tiny(**settings):
    torch.manual_seed(0)
    model = MADE(MADEConfig(**{"shape": (1, 2, 3), "levels": 1, "hidden": (14, 11), "orderings": 3, **settings})).eval()
    torch.nn.init.normal_(model.layers[-1].weight, std=0.8)
    return model


def test_probabilities_of_all_images_sum_to_one_and_are_those_of_samples():
    model = tiny()
    every = torch.cartesian_prod(*[torch.arange(2, dtype=torch.uint8)] * 6).view(-1, 1, 2, 3)
    p = model.log_prob(every).double()
    assert abs(p.logsumexp(0)) < 1e-5
    draws = model.sample(20000, key=random.key(1), batch_size=5000).flatten(1).long()
    shares = torch.bincount(draws @ (2 ** torch.arange(5, -1, -1)), minlength=64) / 20000
    assert (shares - p.exp()).abs().max() < 0.012


def test_no_conditional_sees_what_comes_later():
    model, x = tiny(levels=4), torch.randint(0, 5, (5, 6), dtype=torch.uint8)
    for k in range(3):
        place = model.degrees[k][0]
        for d in range(6):
            h = x.float().requires_grad_()
            out = h
            for i, layer in enumerate(model.layers):
                out = torch.nn.functional.linear(out.relu() if i else out, layer.weight * getattr(model, f"mask_{k}_{i}"), layer.bias)
            (seen,) = torch.autograd.grad(out.view(5, 6, 5)[:, d].sum(), h)
            assert not seen[:, place >= place[d]].any()


@pytest.mark.parametrize("levels", [3, None])
def test_samples_are_those_of_the_naive_loop(levels):
    model, keys = tiny(levels=levels, orderings=1), random.split(random.key(4), 5)
    naive = torch.zeros(5, 6)
    with torch.no_grad():
        for d in range(6):
            out = naive
            for i, layer in enumerate(model.layers):
                out = torch.nn.functional.linear(out.relu() if i else out, layer.weight * getattr(model, f"mask_0_{i}"), layer.bias)
            naive[:, d] = model._draw(out.view(5, 6, -1)[:, d], random.fold_in(keys, d + 1), 1.0)
    got = model.sample(5, key=random.key(4), batch_size=2).flatten(1)
    expected = naive if levels is None else ((naive + 1) * 1.5).round()
    torch.testing.assert_close(got.float(), expected, rtol=1e-5, atol=1e-5)
    if levels is None:
        assert model.bits_per_dim(got.view(-1, 1, 2, 3)).isnan().all()


def test_training_and_refusals():
    model, x = tiny(levels=3).train(), torch.randint(0, 2, (64, 1, 2, 3), dtype=torch.uint8) * 3
    x[:, :, 1] = x[:, :, 0]
    optimizer, losses = torch.optim.Adam(model.parameters(), 0.02), []
    for step in range(60):
        out = model(x, key=random.key(step))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert sum(losses[-5:]) / 5 < 0.55 * losses[0]
    for bad, kind in ((x[:, :, :1], ValueError), (x.float(), TypeError), (x + 1, ValueError)):
        with pytest.raises(kind, match="MADE"):
            model.log_prob(bad)
    with pytest.raises(ValueError, match="MADE"):
        tiny(orderings=0)
