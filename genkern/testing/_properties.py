"""Properties beyond the values of one call: nothing but the arguments enters, and second derivatives are right."""

import torch
from torch.autograd.gradcheck import GradcheckError

import genkern
from genkern.testing._case import Make
from genkern.testing._check import _named_run


def check_repeatable(case, backend, *, device="cpu"):
    """Raise AssertionError unless the outputs and gradients of `case` depend on the values of the arguments alone, bit for bit.

    They must be the same in every call, with one thread and with two; after other values were written into the arguments' memory,
    those of the new values; and where the reference keeps samples apart, the same while another sample changes. But for the backend
    "cpu", gradients may be torch's in whole or in part, and depend on the number of threads as those do.
    """
    where, leaves = f"{case.name} on {backend}", case.differentiable(case.arguments(Make(device=device), case.shapes[0]))
    _check_threads(case, backend, device, where, leaves)
    run = lambda name, arguments: _named_run(name, case.function, arguments, leaves)
    old, new, other = (case.arguments(Make(device=device, seed=seed), case.shapes[0]) for seed in range(3))
    before, after, plain = run(backend, old), run(backend, new), run("reference", new)
    for name, value in run("reference", old).items():
        stays = torch.equal(before[name], after[name]) and not torch.equal(value, plain[name])
        assert not stays, f"{where}: {name} is that of an earlier call"
    tensors = [name for name, a in new.items() if isinstance(a, torch.Tensor) and not torch.equal(a, other[name])]
    for name in tensors:
        old[name].copy_(new[name])
    for name, value in run(backend, old).items():
        assert torch.equal(value, after[name]), f"{where}: {name} is not that of the values last written into the arguments"
    for name in (n for n in tensors if new[n].dim() and len(new[n]) > 1):
        changed = new | {name: torch.cat([new[name][:-1], other[name][-1:]])}
        got, reference = run(backend, changed), run("reference", changed)
        for result, value in after.items():
            apart = value.dim() and len(value) == len(new[name]) and torch.equal(reference[result][:-1], plain[result][:-1])
            same = not apart or torch.equal(got[result][:-1], value[:-1])
            assert same, f"{where}: {result} of other samples changes with the last sample of {name}"


def _check_threads(case, backend, device, where, leaves):
    alone = device == "cpu" and backend in ("triton", "emulated")  # an interpreter or an emulation: slow, and one thread
    shape = case.shapes[0] if alone else case.large
    threads, seen = torch.get_num_threads(), []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            seen.append(_named_run(backend, case.function, case.arguments(Make(device=device), shape), leaves))
    finally:
        torch.set_num_threads(threads)
    one, two, again = seen
    for name, value in two.items():
        assert torch.equal(value, again[name]), f"{where}: {name} changes from call to call"
        if backend == "cpu" or name.startswith("output"):
            assert torch.equal(value, one[name]), f"{where}: {name} changes with the number of threads"


def check_second_order(case, backend, *, device="cpu"):
    """Raise AssertionError unless the first and second derivatives of `case` are those of finite differences, in float64."""
    for form, variant in [*((case, v) for v in case.variants[:2]), *((f, {}) for f in case.other_forms())]:
        arguments = form.arguments(Make(torch.float64, device), form.small)
        names = form.differentiable(arguments)
        function = lambda *leaves, form=form, a=arguments | variant, n=names: form.function(**a | dict(zip(n, leaves, strict=True)))
        leaves = [arguments[name].detach().requires_grad_() for name in names]
        with genkern.backend(backend):
            for order, check in (("first", torch.autograd.gradcheck), ("second", torch.autograd.gradgradcheck)):
                try:
                    check(function, leaves)
                except GradcheckError as error:
                    raise AssertionError(f"{case.name} on {backend}: wrong {order} derivative: {error}") from error
