"""Small models for the tests of the tools."""

import dataclasses

import torch

import genkern
import genkern.data
from genkern.models._base import Model, Output, Training


@dataclasses.dataclass
class ToyConfig:
    features: int = 2
    hidden: int = 8
    classes: int = 0


class ToyDenoiser(Model):
    """Learns to take noise from points: keyed noise per sample, dropout without a key, labels where there are some."""

    Config = ToyConfig
    training = Training(epochs=3, batch_size=16, learning_rate=1e-2)

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
        return self.net(genkern.random.normal(genkern.random.split(key, n), (n, self.config.features)))


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


def points(n=100):
    x = genkern.random.normal(genkern.random.key(5), (n, 2))
    parts = {"train": (x[: n - 20], None), "validation": (x[n - 20 : n - 10], None), "test": (x[n - 10 :], None)}
    return genkern.data.Data("points", **parts, shape=(2,), levels=None)


def toy(kind=ToyDenoiser):
    torch.manual_seed(0)
    return kind(ToyConfig())
