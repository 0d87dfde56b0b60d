"""Neural spline flows: couplings, or autoregressive layers, of rational-quadratic splines (Durkan et al., 2019).

Each number goes through a monotonic spline of its own on [-bound, bound], whose 3 bins - 1 parameters a network gives that sees the
other half (or, autoregressive, the numbers before it). On images the couplings take the place of Glow's; on points each follows an
actnorm and a learned linear map W = P L U.
"""

from dataclasses import dataclass

from torch import nn

from genkern.models._base import Training
from genkern.models.flow._flow import FlowConfig, FlowModel
from genkern.models.flow.glow import check_images, learned_prior
from genkern.models.flow.networks import MLP, ConvNet
from genkern.nn import ActNorm, ActNormConv1x1, InvertibleSequence, MaskedAutoregressive, SplineCoupling, Squeeze


@dataclass
class NeuralSplineFlowConfig(FlowConfig):
    autoregressive: bool = False  # images are then seen as rows of numbers
    bins: int = 8
    bound: float = 4.0
    steps: int = 4  # of each scale
    scales: int = 2  # of images
    positions: bool = True  # the networks of images also learn a number per position
    width: int = 64  # hidden channels or units of the networks
    depth: int = 2  # hidden layers of the networks of points


class NeuralSplineFlow(FlowModel):
    """NeuralSplineFlow(NeuralSplineFlowConfig(shape=(2,), levels=None)): images or points."""

    Config = NeuralSplineFlowConfig
    defaults = Training(epochs=30, batch_size=64, learning_rate=3e-3, schedule="cosine", clip_grad_norm=100.0, warmup=50, ema=0.99)

    def __init__(self, config):
        super().__init__(config)
        c = config
        self.flat = c.autoregressive
        options = {"bins": c.bins, "bound": c.bound}
        if len(c.shape) == 1 or c.autoregressive:
            n, layers = self.dimensions, []
            if n < 2 and not c.autoregressive:
                raise ValueError(f"NeuralSplineFlow: couplings need at least 2 features, got {n}")
            for _ in range(c.steps):
                layers.append(ActNormConv1x1(n))
                if c.autoregressive:
                    layers.append(MaskedAutoregressive(n, (c.width,) * c.depth, self.context, **options))
                else:
                    network = MLP(n // 2, (n - n // 2) * (3 * c.bins - 1), c.width, c.depth, self.context)
                    layers.append(SplineCoupling(network, n, **options))
            self.levels = nn.ModuleList([InvertibleSequence([*layers, ActNorm(n)], backward=c.backward)])
            return
        check_images("NeuralSplineFlow", c)
        self.levels, (channels, height, width) = nn.ModuleList(), c.shape
        for level in range(c.scales):
            channels, height, width = 4 * channels, height // 2, width // 2
            size = (height, width) if c.positions else None
            layers = [Squeeze()]
            for _ in range(c.steps):
                kept = channels // 2
                network = ConvNet(kept, (channels - kept) * (3 * c.bins - 1), c.width, self.context, size)
                layers += [ActNormConv1x1(channels), SplineCoupling(network, channels, **options)]
            layers.append(learned_prior(channels, self.context, size, last=level + 1 == c.scales))
            self.levels.append(InvertibleSequence(layers, backward=c.backward))
            channels -= channels // 2
