"""Tokens per second of GPT at the layout of GPT-2 (124M): generate() against that of transformers.

    python bench/gpt_sampling.py [--tokens 32] [--rounds 3]

Random weights, the same on both sides; greedy, one sequence, one thread, interleaved. The tokens must agree.
"""

import argparse
import tempfile
import time

import torch

from genkern.models import GPT


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt")
    arguments = parser.parse_args()
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=0, eos_token_id=None)).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = GPT.from_gpt2(folder)
    prompt = torch.randint(0, 50257, (1, arguments.prompt))
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0, "use_cache": True}
    calls = {
        "transformers": lambda: theirs.generate(prompt, max_new_tokens=arguments.tokens, **options),
        "genkern": lambda: ours.generate(prompt, arguments.tokens, temperature=0),
    }
    seconds = {name: [] for name in calls}
    with torch.no_grad():
        results = {name: call() for name, call in calls.items()}
        for _ in range(arguments.rounds):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
    ratio = sorted(a / b for a, b in zip(*seconds.values(), strict=True))[arguments.rounds // 2]
    rates = ", ".join(f"{name} {arguments.tokens / min(times):.1f}/s" for name, times in seconds.items())
    same = float((results["genkern"] == results["transformers"]).float().mean())
    print(f"GPT-2 124M, {arguments.tokens} tokens after {arguments.prompt}: {rates}; {ratio:.2f}x; {same:.0%} of tokens equal")


if __name__ == "__main__":
    main()
