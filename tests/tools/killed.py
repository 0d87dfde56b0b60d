"""Train, kill with SIGKILL 20 times at random moments, resume, until the end: python killed.py FOLDER SEED.

The interpreter is copied by fork, so that a start costs no import. One torch thread, so that there is no other to lose.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from toys import ToyDropout, points, toy

from genkern import checkpoint
from genkern.train import fit

KILLS, SETTINGS = 20, {"epochs": 40, "ema": 0.9, "progress": False}


def started(work):
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


def progress(file):
    state = checkpoint.load(file)[1] if file.exists() else {"epoch": 0, "step": 0}  # whole after every kill
    return state["epoch"], state["step"]


def main(folder, seed):
    torch.set_num_threads(1)
    chance, last = random.Random(seed), folder / "broken" / "last.safetensors"
    data = points()
    fit(toy(ToyDropout), data, epochs=1, progress=False)  # what torch imports at its first step
    resume = lambda: fit(toy(ToyDropout), data, folder / "broken", resume=True, save_every=1, **SETTINGS)
    kills = []
    while len(kills) < KILLS:
        before = last.stat().st_mtime_ns if last.exists() else None
        child, limit = started(resume), time.monotonic() + 30
        while (last.stat().st_mtime_ns if last.exists() else None) == before and time.monotonic() < limit:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.03))  # some steps
        os.kill(child, signal.SIGKILL)
        if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            break  # a fast machine: it came to its end
        kills.append(progress(last))
    print("killed at (epoch, step)", *kills)
    if len(set(kills)) < KILLS // 2:
        raise SystemExit("too few kills at different moments")
    for work in (resume, lambda: fit(toy(ToyDropout), data, folder / "whole", **SETTINGS)):
        if os.waitpid(started(work), 0)[1]:
            raise SystemExit("a run failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
