"""Small models for the tests of the tools."""

import dataclasses

import torch

import genkern
import genkern.data
from genkern.models._base import Model, Output, Training, ink


@dataclasses.dataclass
class ToyConfig:
    features: int = 2
    hidden: int = 8
    classes: int = 0


class ToyDenoiser(Model):
    """Learns to take noise from points: keyed noise per sample, dropout without a key, labels where there are some."""

    Config = ToyConfig
    defaults = Training(epochs=3, batch_size=16, learning_rate=1e-2)

    @classmethod
    def config_for(cls, data, **settings):
        return ToyConfig(**{"features": data.shape[0], **settings})

    def __init__(self, config):
        super().__init__(config)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(config.features, config.hidden), torch.nn.Tanh(), torch.nn.Linear(config.hidden, config.features)
        )

    def forward(self, batch, *, key=None):
        noise = genkern.random.normal(key, batch.shape).to(batch.device)
        return Output(*self._loss(batch, noise))

    def _loss(self, batch, noise):
        noisy = batch + 0.3 * noise
        error = (self.net(noisy) - batch).square().mean()
        return error, {"size": noisy.square().mean().detach()}

    @torch.no_grad()
    def sample(self, n, *, key, batch_size=256):
        return self.net(genkern.random.normal(self.sample_keys(n, key), (n, self.config.features)))


class ToyDropout(ToyDenoiser):
    def forward(self, batch, *, key=None):
        return Output(*self._loss(torch.nn.functional.dropout(batch, 0.2, self.training), genkern.random.normal(key, batch.shape)))


class ToyAdversary(ToyDenoiser):
    """Two objectives, as a GAN has them."""

    def __init__(self, config):
        super().__init__(config)
        self.critic = torch.nn.Linear(config.features, 1)

    def objectives(self):
        return {"critic": self.critic.parameters(), "generator": self.net.parameters()}

    def forward(self, batch, *, key=None, objective):
        fake = self.net(genkern.random.normal(key, batch.shape))
        if objective == "generator":
            return Output(torch.nn.functional.softplus(-self.critic(fake)).mean(), {})
        loss = torch.nn.functional.softplus(-self.critic(batch)) + torch.nn.functional.softplus(self.critic(fake.detach()))
        return Output(loss.mean(), {"real": self.critic(batch).mean().detach()})


@dataclasses.dataclass
class ToyImagesConfig:
    size: int = 8
    levels: int = 16
    classes: int = 0
    scale: float = 0.5


class ToyImages(Model):
    """Images from labels: an independent normal per pixel and class, with a likelihood."""

    Config = ToyImagesConfig
    defaults = Training(epochs=2, batch_size=200, learning_rate=5e-2)
    conditions = ("labels",)

    @classmethod
    def config_for(cls, data, **settings):
        return cls.Config(**{"size": data.shape[-1], "levels": data.levels, "classes": data.classes, **settings})

    def __init__(self, config):
        super().__init__(config)
        self.mean = torch.nn.Parameter(torch.zeros(config.classes, 1, config.size, config.size))

    def forward(self, batch, *, labels, key=None):
        return Output(-self.log_prob(batch, labels=labels).mean(), {})

    def log_prob(self, batch, *, labels, key=None):
        x = 2 * ink(batch, self.config.levels) - 1
        return torch.distributions.Normal(self.mean[labels], self.config.scale).log_prob(x).sum((1, 2, 3))

    @torch.no_grad()
    def sample(self, n, *, labels, key, batch_size=256):
        noise = genkern.random.normal(self.sample_keys(n, key), (n, 1, self.config.size, self.config.size))
        return ((self.mean[labels] + 0.1 * noise).clamp(-1, 1) + 1).mul(self.config.levels / 2).round().to(torch.uint8)

    def traverse(self, *, steps=9, key=None):
        return torch.linspace(-1, 1, steps).view(1, -1, 1, 1, 1).expand(2, steps, 1, 4, 4)


def points(n=100):
    x = genkern.random.normal(genkern.random.key(5), (n, 2))
    parts = {"train": (x[: n - 20], None), "validation": (x[n - 20 : n - 10], None), "test": (x[n - 10 :], None)}
    return genkern.data.Data("points", **parts, shape=(2,), levels=None)


def toy(kind=ToyDenoiser):
    torch.manual_seed(0)
    return kind(ToyConfig())
