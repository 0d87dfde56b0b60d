"""What the two networks of a GAN minimise, from the discriminator's scores of real and generated images: logits (N,).

With p = sigmoid(score), the discriminator's probability that an image is real:
    minimax         the discriminator minimises -log p(real) - log(1 - p(fake)), the generator log(1 - p(fake))
                    (Goodfellow et al., 2014, equation 1)
    non_saturating  the same, but the generator minimises -log p(fake) (section 3), whose gradient does not vanish where the
                    discriminator is sure
    hinge           max(0, 1 - real) + max(0, 1 + fake), and -fake (Lim & Ye, 2017)
    wasserstein     fake - real, and -fake (Arjovsky et al., 2017, equation 2): an estimate of -W_1 where the score is 1-Lipschitz
"""

import torch
import torch.nn.functional as F

LOSSES = ("non_saturating", "minimax", "hinge", "wasserstein")


def discriminator_loss(kind, real, fake):
    """The mean over the batch."""
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    if kind == "wasserstein":
        return fake.mean() - real.mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()  # softplus(-s) = -log sigmoid(s)


def generator_loss(kind, fake):
    """The mean over the batch."""
    if kind == "non_saturating":
        return F.softplus(-fake).mean()
    return -F.softplus(fake).mean() if kind == "minimax" else -fake.mean()


def gradient_penalty(critic, real, fake, mix):
    """E (|grad critic(x)| - 1)^2 at x = mix real + (1 - mix) fake, one mix in [0, 1] per image (Gulrajani et al., 2017, equation 3).

    The norm is over all numbers of an image, so the critic must not mix images: no batch norm. Differentiable: a second backward
    pass runs through the critic's layers, genkern's ops among them.
    """
    with torch.enable_grad():
        x = torch.lerp(fake.detach(), real.detach(), mix.view(-1, 1, 1, 1)).requires_grad_()
        (slope,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        return (slope.flatten(1).norm(dim=1) - 1).square().mean()


def r1_penalty(critic, real):
    """E |grad critic(real)|^2 / 2 (Mescheder et al., 2018, equation 9 without its gamma): the discriminator stays flat on the data."""
    with torch.enable_grad():
        x = real.detach().requires_grad_()
        (slope,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        return slope.flatten(1).square().sum(1).mean() / 2
