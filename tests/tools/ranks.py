"""Train and sample in however many processes the launcher started; each writes what it has: python ranks.py FOLDER."""

import gc
import importlib.util
import os
import sys
from pathlib import Path

import safetensors.torch
import torch
import toys

import genkern
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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
