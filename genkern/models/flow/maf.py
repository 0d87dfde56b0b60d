"""MAF and IAF: autoregressive flows. Images are seen as rows of numbers.

In a layer of the masked autoregressive flow (Papamakarios et al., 2017) z_d = x_d s(x_1 ... x_d-1) + t(x_1 ... x_d-1), by one masked
network: densities cost one pass per layer; a sample is sequential, which genkern.ops.made_inverse does at about the cost of one pass.
The inverse autoregressive flow (Kingma et al., 2016) is the same layer the other way round: x_d = z_d s(z_1 ...) + t(z_1 ...). Samples
cost one pass, and training on data as many as there are dimensions: made for posteriors whose own samples are scored, or for points.
"""

from dataclasses import dataclass

from torch import nn

from genkern.models._base import Training
from genkern.models.flow._flow import FlowConfig, FlowModel
from genkern.nn import ActNorm, Flip, Inverse, InvertibleSequence, MaskedAutoregressive


@dataclass
class MAFConfig(FlowConfig):
    steps: int = 5  # autoregressive layers, each in the reverse order of the one before
    hidden: tuple = (256, 256)  # widths of the hidden layers of the masked networks


class MAF(FlowModel):
    """MAF(MAFConfig(shape=(2,), levels=None)): points or images."""

    Config = MAFConfig
    defaults = Training(epochs=15, batch_size=64, learning_rate=3e-3, schedule="cosine", ema=0.99, clip_grad_norm=100.0)
    flat = True

    def __init__(self, config):
        super().__init__(config)
        layers = []
        for _ in range(config.steps):
            layers += [ActNorm(self.dimensions), self._layer(), Flip()]
        self.levels = nn.ModuleList([InvertibleSequence([*layers, ActNorm(self.dimensions)], backward=config.backward)])

    def _layer(self):
        return MaskedAutoregressive(self.dimensions, self.config.hidden, self.context)


@dataclass
class IAFConfig(MAFConfig):
    steps: int = 2
    hidden: tuple = (64, 64)


class IAF(MAF):
    """IAF(IAFConfig(shape=(2,), levels=None)): points, or small images."""

    Config = IAFConfig
    defaults = Training(epochs=40, batch_size=64, learning_rate=4e-3, schedule="cosine", ema=0.99, clip_grad_norm=100.0)

    def _layer(self):
        return Inverse(super()._layer())
