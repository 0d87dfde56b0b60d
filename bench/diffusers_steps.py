"""Steps of a sampling loop, and a whole tiny pipeline: diffusers as it is, with its scheduler fused, and genkern.samplers.

    python bench/diffusers_steps.py [--json bench/results/diffusers_steps.json] [--rounds 7] [--threads 1]

A loop doubles the model's input for guidance, combines the two outputs and steps; the model itself takes no time: it returns what it
was given. Every round runs each contender once, in turn; a ratio is the median over rounds of diffusers' time over the contender's in
the same round. With one thread the clock is the CPU's, so that other programs hardly count. Before anything is timed, all must agree on
the samples. Under two minutes on one core.
"""

import argparse
import copy
import json
import pathlib
import statistics
import time

import diffusers
import torch

from genkern import random, samplers
from genkern.integrations.diffusers import fuse, fuse_scheduler
from genkern.testing.bench import machine

SMALL, LARGE = (2, 4, 64, 64), (8, 3, 256, 256)
LATENT = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
THRESHOLD = dict(thresholding=True, dynamic_thresholding_ratio=0.995, sample_max_value=1.5)
P = samplers.Schedule.scaled_linear()
# name: (diffusers' scheduler, its configuration, the sampler of a number of steps, guidance, rescale, shapes)
CASES = {
    "CFG + DPM++ 2M": (
        "DPMSolverMultistep", LATENT, lambda n: samplers.DPMSolverMultistep(P, n, spacing="linspace"), 7.5, 0.0, (SMALL, LARGE),
    ),
    "CFG + rescale + DPM++ 2M": (
        "DPMSolverMultistep", LATENT, lambda n: samplers.DPMSolverMultistep(P, n, spacing="linspace"), 7.5, 0.7, (SMALL, LARGE),
    ),
    "DPM++ 2M with dynamic thresholding": (
        "DPMSolverMultistep", LATENT | THRESHOLD,
        lambda n: samplers.DPMSolverMultistep(P, n, spacing="linspace", threshold=0.995, threshold_max=1.5), None, 0.0, (SMALL, LARGE),
    ),
    "CFG + UniPC": ("UniPCMultistep", LATENT, lambda n: samplers.UniPC(P, n, spacing="linspace"), 7.5, 0.0, (SMALL, LARGE)),
    "DDPM with noise": ("DDPM", LATENT, lambda n: samplers.DDPM(P, n, spacing="leading", clip=1.0), None, 0.0, (SMALL, LARGE)),
}  # fmt: skip


def rescaled(m, c, part):
    """Lin et al., 2023, eq. 15 and 16, as pipelines write it."""
    dims = list(range(1, m.dim()))
    return part * m * (c.std(dim=dims, keepdim=True) / m.std(dim=dims, keepdim=True)) + (1 - part) * m


def loop_of(scheduler, outputs, start, guidance, rescale):
    """What a pipeline does around its model."""

    def run(seed=0):
        scheduler.set_timesteps(len(outputs))
        draws = {"generator": torch.Generator().manual_seed(seed)} if "DDPM" in type(scheduler).__name__ else {}
        x = start * scheduler.init_noise_sigma
        for m, t in zip(outputs, scheduler.timesteps, strict=True):
            scheduler.scale_model_input(torch.cat([x, x]) if guidance else x, t)
            if guidance:
                u, c = m.chunk(2)
                m = u + guidance * (c - u)
                m = rescaled(m, c, rescale) if rescale else m
            x = scheduler.step(m, t, x, **draws, return_dict=False)[0]
        return x

    return run


def contenders(name, shape):
    """({contender: call}, steps of a call), after a check that all give the same samples."""
    kind, config, sampler_of, guidance, rescale, _ = CASES[name]
    steps = 20 if shape == SMALL else 6
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    outputs = torch.randn(steps, shape[0] * (2 if guidance else 1), *shape[1:], generator=generator).unbind()  # a view takes time
    make = lambda: getattr(diffusers, kind + "Scheduler")(**config)
    sampler, guiding = sampler_of(steps), {"guidance_scale": guidance, "guidance_rescale": rescale} if guidance else {}

    def sample(**options):
        each = iter(outputs)
        return sampler.sample(lambda x, t: next(each), start=start, **guiding, **options)

    key = random.key(0)
    calls = {
        "diffusers": loop_of(make(), outputs, start, guidance, rescale),
        "fused scheduler": loop_of(fuse_scheduler(make()), outputs, start, guidance, rescale),
        "genkern.samplers": lambda: sample(key=key),
    }
    expected, draws = calls["diffusers"](), torch.Generator().manual_seed(0)
    for got in (calls["fused scheduler"](), sample(noise=lambda i: torch.randn(shape, generator=draws))):
        if not (got - expected).abs().max() < 1e-5 * expected.abs().max():
            raise AssertionError(f"{name} {shape}: other samples than those of diffusers; nothing is measured")
    if kind == "DDPM":
        calls["fused scheduler, keyed noise"] = loop_of(fuse_scheduler(make(), keyed_noise=True), outputs, start, guidance, rescale)
    return calls, steps


def tiny_pipelines():
    """({contender: call}, 1): Stable Diffusion in small, random weights, ten steps with guidance; fused or not, the same images."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=4,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=8,
    )  # fmt: skip
    text, calls = torch.randn(2, 2, 16, 32), {}
    for name in ("diffusers", "fuse(pipe)"):
        pipe = diffusers.StableDiffusionPipeline(
            vae=vae, unet=unet, text_encoder=None, tokenizer=None,
            scheduler=diffusers.DPMSolverMultistepScheduler(steps_offset=1, **LATENT),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        if name != "diffusers":
            pipe.unet, pipe.vae = copy.deepcopy(unet), copy.deepcopy(vae)
            fuse(pipe)
        calls[name] = lambda pipe=pipe: pipe(
            prompt_embeds=text[0], negative_prompt_embeds=text[1], num_inference_steps=10, output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip
    torch.testing.assert_close(*(call() for call in calls.values()), rtol=0, atol=1e-4)
    return calls, 1


def measure(calls, steps, rounds):
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            begin = clock()
            call()
            times[name].append((clock() - begin) / steps)
    result = {}
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(times["diffusers"], seconds, strict=True)]
        quantiles = statistics.quantiles(ratios, n=5)
        result[name] = {
            "us": statistics.median(seconds) * 1e6, "ratio": statistics.median(ratios), "ratio_p20": quantiles[0],
            "ratio_p80": quantiles[-1],
        }  # fmt: skip
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    jobs = [(name, shape, lambda n=name, s=shape: contenders(n, s)) for name, case in CASES.items() for shape in case[-1]]
    for name, shape, make in [*jobs, ("tiny Stable Diffusion, 10 steps", (2, 3, 32, 32), tiny_pipelines)]:
        with torch.no_grad():
            measured = measure(*make(), arguments.rounds)
        results.append({"case": name, "shape": list(shape), "contenders": measured})
        print(f"{name}, {'x'.join(map(str, shape))}")
        for contender, r in measured.items():
            spread = f"({r['ratio_p20']:.1f}-{r['ratio_p80']:.1f})"
            print(f"  {contender:30} {r['us']:10.1f} us {r['ratio']:6.1f}x {spread:>13}", flush=True)
    if arguments.json:
        facts = machine() | {"diffusers": diffusers.__version__}
        pathlib.Path(arguments.json).write_text(json.dumps({"machine": facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
