"""What only a GPU can show: the stream's bits there, capture of graphs, the verdicts that switch kernels on."""

import pytest
import torch

import genkern
from genkern import core, random
from genkern.ops import reparameterize_kl
from genkern.testing import backends

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
BACKENDS = ["reference", *backends("cuda")] if torch.cuda.is_available() else []
DRAWS = ("bits", "uniform", "normal", "exponential", "gumbel", "logistic")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DRAWS)
def test_draws_have_the_bits_of_the_cpu(backend, name):
    for key in (random.key(7), random.split(random.key(7), 3)):
        expected = getattr(random, name)(key, (3, 1031))
        with genkern.backend(backend):
            assert torch.equal(getattr(random, name)(key.cuda(), (3, 1031)).cpu(), expected)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_a_captured_graph_follows_its_key(backend):
    """The key lies on the device: a replay reads it anew, without a synchronisation."""
    mu = torch.randn(8, 64, device="cuda")
    key = random.key(1, device="cuda")
    with genkern.backend(backend):
        reparameterize_kl(mu, mu, key=key)  # compiles and allocates before the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            z, kl = reparameterize_kl(mu, mu, key=key)
        drawn = []
        for seed in (1, 2):
            key.copy_(random.key(seed))
            graph.replay()
            drawn.append((z.clone(), reparameterize_kl(mu, mu, key=random.key(seed))[0]))
    assert all(torch.equal(replayed, expected) for replayed, expected in drawn)
    assert not torch.equal(drawn[0][0], drawn[1][0])


def test_every_kernel_is_verified():
    verdicts = genkern.testing.verify("cuda")
    assert verdicts and set(verdicts.values()) == {"passed"}, {k: v for k, v in verdicts.items() if v != "passed"}
    assert {name.split("/")[0] for name in verdicts} <= set(core.OPS)
