"""Op: from one schema and one reference to a function that picks a backend, differentiates and compiles.

Above the dispatcher, one chooser looks up (forced backend, device type) and calls either the reference (plain differentiable
torch, which Inductor may fuse) or a raw native op. Raw ops are private: torch.ops.genkern._<name>, with kernels added by the C++
library of the device, and twins of the same schema for Triton and for the CUDA emulation.
"""

import difflib
import importlib
import importlib.util
import warnings

import torch
import torch.autograd.forward_ad as forward_ad
from torch.compiler import is_compiling

from genkern.core import _backends
from genkern.core._backends import BACKENDS, INTERPRET, PREFERENCE

OPS: dict = {}  # name -> Op

_NAMESPACES = sorted({backend.namespace for backend in BACKENDS.values()})
_fragments = {name: torch.library.Library(name, "FRAGMENT") for name in _NAMESPACES}  # registrations die with these


def _define(name, schema, fake):
    for namespace, fragment in _fragments.items():
        fragment.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=fragment)


def implements(backend, name):
    """Register a Python function (a Triton launcher) as the kernel of raw op `name` on a backend."""
    chosen = BACKENDS[backend]

    def register(function):
        _fragments[chosen.namespace].impl("_" + name, function, chosen.key)
        return function

    return register


def transforming():
    """Inside vmap, grad, jvp ... of torch.func, or in forward-mode differentiation: only plain torch operations are right there."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class Op:
    """An operation on every backend.

    name            the stem: schema, file, case, test and bench name
    schema          "(Tensor x, ..., float a) -> (Tensor, Tensor)"
    reference       the formula in plain torch with the same positional arguments: documentation, fallback and oracle
    fake            output shapes for torch.compile, with the same arguments
    differentiable  names of the arguments that have gradients (all tensors then stand before other arguments); the raw op
                    `_<name>_backward(grad outputs, all arguments)` returns those of the arguments that are not None
    device_of       position of the argument whose device chooses the backend
    first           a backend to choose before the others of its device
    passes          a function of the arguments: whether the gradient of the output is, as it is, that of the first argument, which
                    `_<name>_backward` then leaves out
    """

    def __init__(self, name, schema, *, reference, fake, differentiable=(), device_of=0, first=None, passes=None):
        self.name, self.backward_name, self.reference = name, f"{name}_backward", reference
        self.device_of, self.first, self._passes = device_of, first, passes
        parsed = torch._C.parse_schema(f"genkern::_{name}{schema}")
        arguments, outputs = parsed.arguments, len(parsed.returns)
        self._tensors = sum("Tensor" in str(a.type) for a in arguments)
        self._differentiable = tuple(i for i, a in enumerate(arguments) if a.name in differentiable)
        if differentiable and not all("Tensor" in str(a.type) for a in arguments[: self._tensors]):
            raise ValueError(f"Op {name}: where there are gradients, tensors must stand before other arguments, got {schema}")
        _define("_" + name, schema, fake)
        if differentiable:
            grads = ", ".join(f"Tensor grad_{i}" for i in range(outputs))
            inside = schema[1 : schema.index(") ->")]
            _define(f"_{name}_backward", f"({grads}, {inside}) -> Tensor[]", self._fake_backward(outputs))
        self._forward = {b: getattr(getattr(torch.ops, n), f"_{name}").default for b, (n, _, _) in BACKENDS.items()}
        self._backward = differentiable and {
            b: getattr(getattr(torch.ops, n), f"_{name}_backward").default for b, (n, _, _) in BACKENDS.items()
        }
        self._functions = {b: self._autograd_function(b) for b in BACKENDS} if differentiable else {}
        # Function.apply is Python around this: for transforms of torch.func, in which no kernel is called
        self._apply = {b: super(torch.autograd.Function, f).apply for b, f in self._functions.items()}
        self._with_backward: set = set()  # backends that have a kernel for the backward pass too
        self._default: dict = {}  # device type -> (backend, None or why it is the reference)
        _backends.libraries()
        self._settle("cpu")
        OPS[name] = self

    def __call__(self, *args):
        choice, why = self._choose(args[self.device_of])
        compiling = is_compiling()
        if not compiling:
            _backends.count(self.name, choice)
            if why is not None:
                self._slow(why)
        if choice == "reference":
            return self._call_reference(args)
        if self._differentiable and torch.is_grad_enabled():
            for i in self._differentiable:
                if args[i] is not None and args[i].requires_grad:
                    apply = self._functions[choice].apply if compiling else self._apply[choice]
                    return apply(args[self._tensors :], *args[: self._tensors])
        return self._forward[choice](*args)

    def bound(self, tensor, calls):
        """(backend, function): the choice for `calls` calls whose choosing argument is like this tensor, made and counted once.

        The function is what runs, for a loop of eager calls without gradients.
        """
        choice, why = self._choose(tensor)
        if why is not None:
            self._slow(why)
        _backends.count(self.name, choice, calls)
        return choice, self._forward.get(choice) or (lambda *args: self._call_reference(args))

    # ---- choosing

    def available(self, device_type):
        """{backend: None if it can serve tensors of this device type, else the reason why not}."""
        return {name: self._missing(name, device_type) for name in BACKENDS}

    def _missing(self, name, device_type):
        namespace, device, key = BACKENDS[name]
        if device != device_type:
            return f"serves {device} tensors" + (" (TRITON_INTERPRET=1: cpu)" if name == "triton" else "")
        if name == "triton":
            module = self.reference.__module__ + "_triton"
            if importlib.util.find_spec("triton") is None:
                return "triton is not installed"
            if importlib.util.find_spec(module) is None:
                return "no kernel exists for this op"
            importlib.import_module(module)
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        if has_kernel(f"{namespace}::_{self.name}", key):
            if self._backward and has_kernel(f"{namespace}::_{self.name}_backward", key):
                self._with_backward.add(name)
            return None
        if name == "triton":
            return "no kernel exists for this op"
        why_not_loaded = _backends.libraries().get(name, (None, f"the {name} library is not loaded"))[1]
        return why_not_loaded or "no kernel exists for this op"

    def _settle(self, device_type):
        why = f"no kernels exist for {device_type} tensors"
        for name in sorted(PREFERENCE.get(device_type, ()), key=lambda name: name != self.first):
            missing = self._missing(name, device_type)
            if missing is None and device_type == "cuda":
                from genkern.core._verified import untrusted

                missing = untrusted(self.name, name)
            if missing is None:
                self._default[device_type] = (name, None)
                return
            why = f"{name}: {missing}"
        self._default[device_type] = ("reference", None if device_type == "meta" else why)  # a meta tensor only has a shape

    def _choose(self, tensor):
        """(backend, None or why a slow path is taken) for a call whose choosing argument is this tensor."""
        name = _backends.forced()
        if name == "reference":
            return name, None
        if transforming():
            return "reference", None
        device_type = "cpu" if tensor.is_cpu else tensor.device.type  # is_cpu is several times cheaper
        if name is not None and BACKENDS[name].device == device_type:
            if device_type != "cpu" or name != self._default["cpu"][0]:
                missing = self._missing(name, device_type)
                if missing is not None:
                    raise RuntimeError(f"{self.name}: backend {name!r} was forced but cannot be used: {missing}")
            return name, None
        return self._default.get(device_type) or self.default(device_type)

    def backend_of(self, tensor):
        """The backend that a call with this choosing argument takes now."""
        return self._choose(tensor)[0]

    def default(self, device_type):
        """(backend that serves this device type unless one is forced, None or why it is the reference)."""
        if device_type not in self._default:
            self._settle(device_type)
        return self._default[device_type]

    def _slow(self, why):
        if _backends.is_strict():
            raise RuntimeError(f"{self.name}: takes the slow PyTorch reference ({why}); genkern.strict() forbids it")
        _warn_once(why)

    def _call_reference(self, args):
        device_type = args[self.device_of].device.type
        if device_type != "meta" and torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return self.reference(*args)
        return self.reference(*args)

    # ---- differentiating

    def _fake_backward(self, outputs):
        def fake(*args):
            inputs = args[outputs:]
            wanted = self._differentiable[1 if self._passes and self._passes(*inputs) else 0 :]
            return [torch.empty_like(inputs[i], memory_format=torch.contiguous_format) for i in wanted if inputs[i] is not None]

        return fake

    def _autograd_function(self, choice):
        op, tensors, differentiable = self, self._tensors, self._differentiable
        leading = len(differentiable) if differentiable == tuple(range(len(differentiable))) else None
        nones = (None,) * (tensors - len(differentiable))

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, rest, *tensors):  # each argument and each gradient costs time: the others are one
                ctx.save_for_backward(*tensors)
                ctx.rest = rest
                return op._forward[choice](*tensors, *rest)

            @staticmethod
            def backward(ctx, *grads):
                args = (*ctx.saved_tensors, *ctx.rest)
                if torch.is_grad_enabled():  # create_graph=True: a second derivative may follow
                    return None, *op._differentiate_reference(args, grads)
                native = choice in op._with_backward  # else there is a kernel for the forward pass alone
                if not is_compiling():
                    _backends.count(op.backward_name, choice if native else "reference")
                if not native:
                    with torch.enable_grad():
                        return None, *op._differentiate_reference(args, grads)
                got = op._backward[choice](*grads, *args)
                if len(got) != leading and op._passes and op._passes(*args):
                    first = grads[0] if grads[0].dtype is args[0].dtype else grads[0].to(args[0].dtype)
                    got = first, *got
                if len(got) == leading:  # the usual case: all are there, before the other tensors
                    return None, *got, *nones
                got = iter(got)
                tensors = enumerate(args[: op._tensors])
                return None, *(next(got) if i in differentiable and a is not None else None for i, a in tensors)

        Function.__name__ = Function.__qualname__ = self.name
        return Function

    def _differentiate_reference(self, args, grads):
        """Gradients of all tensors, with a graph of their own: those of the reference, so that they can be differentiated again."""
        alias = list(args)  # aliases, because saved inputs that depend on each other would be counted twice
        for i in self._differentiable:
            alias[i] = None if args[i] is None else args[i].view_as(args[i])
        outputs = self._call_reference(alias)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [i for i in self._differentiable if alias[i] is not None and alias[i].requires_grad]
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        got = torch.autograd.grad(
            [o for o, _ in pairs], [alias[i] for i in wanted], [g for _, g in pairs], create_graph=True, allow_unused=True
        )
        got = dict(zip(wanted, got, strict=True))
        return tuple(got.get(i) for i in range(self._tensors))


_warned: set = set()


def _warn_once(why):
    if why in _warned:
        return
    _warned.add(why)
    how = "python -m genkern verify" if "verify" in why else "python -m genkern info"
    warnings.warn(f"genkern runs on its PyTorch references here ({why}). To see or mend this: {how}", stacklevel=4)


def explain(name, *args):
    """Why a fast path is not taken for these (positional, raw) arguments of an op: a list of sentences, empty if it is.

    name: of the op, or the function of genkern.ops that has it.
    """
    name = getattr(name, "__name__", name)
    if name not in OPS:
        close = difflib.get_close_matches(str(name), OPS, 1)
        raise ValueError(f"explain: no op {name!r}" + (f"; did you mean {close[0]!r}?" if close else f"; ops are {', '.join(OPS)}"))
    op = OPS[name]
    if not isinstance(next(iter(args[op.device_of : op.device_of + 1]), None), torch.Tensor):
        raise TypeError(f"explain: argument {op.device_of} of {name} must be a tensor: its device chooses the backend")
    if _backends.forced() == "reference":
        return ['backend "reference" is forced']
    if transforming():
        return ["inside a torch.func transform or forward-mode differentiation the reference is taken"]
    choice, why = op._choose(args[op.device_of])
    reasons = [] if why is None else [why]
    reasons += [
        f"argument {i} is not contiguous and is copied first"
        for i, argument in enumerate(args)
        if isinstance(argument, torch.Tensor) and choice != "reference" and not _row_dense(argument)
    ]
    if INTERPRET and choice == "triton":
        reasons.append("Triton runs in its interpreter (TRITON_INTERPRET=1)")
    return reasons


def _row_dense(x):
    return x.dim() == 0 or x.is_contiguous() or (x.shape[0] > 0 and x[0].is_contiguous())
