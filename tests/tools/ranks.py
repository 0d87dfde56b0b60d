"""Train and sample in however many processes the launcher started; each writes what it has: python ranks.py FOLDER."""

import gc
import importlib.util
import os
import sys
from pathlib import Path

import safetensors.torch
import torch
import toys
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

import genkern
from genkern.models import VAE, VAEConfig
from genkern.train import fit, sample


def main(folder):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo")
    found = {}
    for kind in ("ToyDenoiser", "ToyAdversary"):
        results = trained(getattr(toys, kind), folder / f"{kind} {world}", rank)
        found.update({f"{kind}/{name}": x for name, x in results.items()})
    if importlib.util.find_spec("accelerate"):
        found.update({f"accelerate/{name}": x.clone() for name, x in accelerated(rank, world).items()})
    found.update({f"sharded/{name}": x for name, x in sharded(rank, world).items()})
    found.update({f"sharded fit/{name}": x for name, x in sharded_fit(folder / f"sharded {world}", world).items()})
    safetensors.torch.save_file(found, folder / f"{world}-{rank}.safetensors")
    if world > 1:
        gc.collect()  # wrappers of DistributedDataParallel hold on to the group
        torch.distributed.barrier()  # the first process keeps the store: it must not leave while the other still talks
        torch.distributed.destroy_process_group()


def trained(kind, folder, rank):
    """By fit(): the weights, the last gradients of each objective, the losses; and samples."""
    gradients = {}

    class Recorded(kind):
        def optimizer(self, parameters, training):
            optimizer, name = super().optimizer(parameters, training), f"gradient/{len(gradients)}"

            def record(optimizer, *_):
                gradients[name] = torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]])

            gradients[name] = None
            optimizer.register_step_pre_hook(record)
            return optimizer

    torch.manual_seed(rank)  # another start in each process: the first one's counts
    for epochs in (1, 2):  # the second time, resumed
        model = Recorded(toys.ToyConfig())
        settings = {"epochs": epochs, "ema": 0.9, "clip_grad_norm": 1.0}
        history = fit(model, toys.points(), folder, resume=epochs > 1, save_every=2, progress=False, **settings)
    losses = torch.tensor([row["loss"] for row in history], dtype=torch.float64)
    return {**model.state_dict(), **gradients, "losses": losses, "sample": sample(model, 7, key=genkern.random.key(3))}


def accelerated(rank, world):
    """By somebody's own loop with accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = toys.toy()
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    x = toys.points().train[0]
    for key in genkern.random.split(genkern.random.key(0), 3):
        keys = genkern.random.split(key, len(x)).chunk(world)[rank]
        accelerator.backward(wrapped(x.chunk(world)[rank], key=keys).loss)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def shardable(world):
    """A VAE, in several processes divided by FSDP: each keeps a part of every weight, of its gradient and of Adam's moments."""
    torch.manual_seed(0)
    model = VAE(VAEConfig(levels=16, width=4, hidden=32, latent=5))
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for part in (model.encoder, model.decoder, model):
            fully_shard(part, mesh=mesh)
        assert sum(p.to_local().numel() for p in model.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())
    return model


def images(n):
    return torch.randint(0, 17, (n, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def whole(x):
    return (x.full_tensor() if isinstance(x, DTensor) else x).clone()


def sharded(rank, world):
    """By somebody's own loop with FSDP."""
    model = shardable(world)
    register_fsdp_forward_method(model, "sample")  # it gathers the weights as forward does
    optimizer, x = torch.optim.AdamW(model.parameters(), 1e-2), images(8)
    for key in genkern.random.split(genkern.random.key(0), 3):
        keys = genkern.random.split(key, len(x)).chunk(world)[rank]
        optimizer.zero_grad()
        model(x.chunk(world)[rank], key=keys).loss.backward()
        optimizer.step()
    found = {f"gradient/{name}": whole(p.grad) for name, p in model.named_parameters()}
    weights = {name: whole(x) for name, x in model.state_dict().items()}
    return {**found, **weights, "sample": model.sample(6, key=genkern.random.key(3))}


def sharded_fit(folder, world):
    """By fit() with FSDP, in two parts; what it wrote is one whole model."""
    x = images(40)
    data = genkern.data.Data("images", (x[:24], None), (x[24:32], None), (x[32:], None), shape=(1, 8, 8), levels=16)
    settings = {"batch_size": 8, "ema": 0.9, "clip_grad_norm": 1.0, "save_every": 2, "progress": False}
    for epochs in (2, 3):  # the second time, resumed
        model = shardable(world)
        history = fit(model, data, folder, resume=epochs == 3, epochs=epochs, **settings)
    losses = torch.tensor([[row["loss"], row["validation_loss"]] for row in history], dtype=torch.float64)
    weights = {f"last/{name}": whole(x) for name, x in model.state_dict().items()}
    sampled = sample(model, 6, key=genkern.random.key(3))
    loaded = genkern.load(folder)
    assert type(loaded) is VAE
    best = {f"best/{name}": x for name, x in loaded.state_dict().items()}
    return {**weights, **best, "losses": losses, "sample": sampled}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
