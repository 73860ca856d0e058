"""What is measured: a Case is one op at one shape and dtype, a Provider one way to compute it.

A suite is a module bench_<stem>.py: cases(), inputs(case, device), cost(case) -> {"fwd": Work, "bwd": Work},
run(problem, backend) -> Call, plain(problem) -> Call (eager torch, the accuracy yardstick), saved_limit(case) and PROVIDERS.
Cases of preset "cost" are those that `python -m mtkernels.lab cost` counts, small enough for Triton's interpreter.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module

import torch

from mtkernels import _backends
from mtkernels.ops import STEMS

MODES = ("fwd", "bwd", "full")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRESETS = ("quick", "bars", "full", "cost")
DEFAULT_MODES = {"quick": ("fwd", "full"), "bars": ("full",), "full": MODES, "cost": MODES}


class Unavailable(Exception):
    """This provider cannot run this case; the message is the reason shown to the user."""


@dataclass(frozen=True)
class Work:
    """What a pass has to do at least, whatever computes it; passes add up.

    bytes: operands read once and results written once. flops: all useful arithmetic; of it matrix products that belong to
    the op (tensor_flops), and those of a frozen layer beside it (base_flops), which in a kernel of ours are the products of
    the jit function base_function. split_bytes: the least traffic when parts of the pass are launches of their own, where
    the suite has a model of that.
    """

    bytes: int
    flops: int
    tensor_flops: int = 0
    base_flops: int = 0
    split_bytes: int | None = None
    base_function: str | None = None

    def __add__(self, other):
        split = None if self.split_bytes is None or other.split_bytes is None else self.split_bytes + other.split_bytes
        sums = (getattr(self, f) + getattr(other, f) for f in ("bytes", "flops", "tensor_flops", "base_flops"))
        return Work(*sums, split, self.base_function)


@dataclass(frozen=True)
class Bar:
    """A speed to reach in mode "full": time of `row` over time of `base`, at most (or at least) `limit`.

    above: a provider whose time is taken off both first. minima: compare the fastest rounds instead of the median of per-round ratios. emulated: set for CPUs without bf16
    instructions.
    """

    row: str
    base: str
    limit: float
    at_least: bool = False
    minima: bool = False
    emulated: bool = False
    above: str = ""

    def __str__(self):
        row, base = (f"({name} - {self.above})" if self.above else name for name in (self.row, self.base))
        return f"{row} {'>=' if self.at_least else '<='} {self.limit:.2f} x {base}"

    def providers(self):
        return (self.row, self.base, *([self.above] if self.above else []))


@dataclass(frozen=True)
class Case:
    """One op at one shape. `dtypes` are the default ones; `dtype` is set when the case is selected."""

    op: str
    name: str
    shape: dict
    baseline: str
    presets: tuple
    dtypes: tuple = ("fp32", "bf16")
    modes: tuple = MODES
    training: bool = True
    threads: int | None = None
    bars: dict = field(default_factory=dict)
    dtype: str = ""

    def __str__(self):
        return f"{self.op} {self.name} {self.dtype}"


@dataclass
class Call:
    """fn() computes the output or a tuple of them; leaves are differentiated against `upstream`; given: further tensors it received."""

    fn: Callable
    leaves: dict = field(default_factory=dict)
    upstream: torch.Tensor | tuple | None = None
    given: tuple = ()

    def forward(self):
        with torch.set_grad_enabled(bool(self.leaves)):
            return self.fn()

    def gradients(self, out, keep=False):
        return torch.autograd.grad(out, tuple(self.leaves.values()), self.upstream, retain_graph=keep)

    def step(self):
        out = self.forward()
        return out, self.gradients(out) if self.leaves else ()

    def runner(self, mode):
        """The function to time. A call without leaves has only a forward."""
        if mode == "fwd" or not self.leaves:
            return self.forward
        if mode == "bwd":
            return partial(self.gradients, self.forward(), keep=True)
        return self.step

    def results(self):
        out, grads = self.step()
        outs = {f"out {i}": t for i, t in enumerate(out)} if isinstance(out, tuple) else {"out": out}
        return {**{name: t.detach() for name, t in outs.items()}, **dict(zip(self.leaves, grads))}


@dataclass(frozen=True)
class Problem:
    """Tensors of one case: `leaves` are differentiated (in training), `fixed` are not; activations name those with a row per token."""

    case: Case
    leaves: dict
    fixed: dict
    upstream: torch.Tensor | tuple | None = None
    activations: tuple = ()
    training: bool = True

    def to(self, dtype):
        """The same values in another floating-point dtype."""

        def cast(t):
            if t is None or isinstance(t, tuple):
                return t and tuple(map(cast, t))
            return t.detach().to(dtype) if t.is_floating_point() else t

        leaves = {name: cast(t).requires_grad_(t.requires_grad) for name, t in self.leaves.items()}
        fixed = {name: cast(t) for name, t in self.fixed.items()}
        return replace(self, leaves=leaves, fixed=fixed, upstream=cast(self.upstream))

    def without_dropout(self):
        return replace(self, training=False)

    def call(self, fn, leaves=None, given=()):
        """A Call on these leaves; in a case that does not train, nothing is differentiated."""
        leaves = self.leaves if leaves is None else leaves
        return Call(fn, leaves if self.case.training else {}, self.upstream, tuple(given))


class Draw:
    """Reproducible random tensors of a case."""

    def __init__(self, case, device):
        self.case, self.device = case, device
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape, std=1.0, dtype=None):
        t = torch.randn(*shape, generator=self.generator) * std
        return t.to(self.device, dtype or DTYPES[self.case.dtype])

    def leaf(self, *shape, **options):
        return self.normal(*shape, **options).requires_grad_(self.case.training)

    def shuffled(self, counts):
        """int64 ids: counts[i] times i, in random order."""
        ids = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        return ids[torch.randperm(len(ids), generator=self.generator)].to(self.device)

    def ints(self, high, *shape, low=0):
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)


@dataclass(frozen=True)
class Provider:
    """kind: "ours" is verified and must pass, "peer" is verified and reported, "part" computes something else (a floor, a piece).

    slow: not in the preset quick unless named. applies: cases it belongs to. countable: its launches can be seen one by
    one without a GPU, so `python -m mtkernels.lab cost` has a row for it.
    """

    name: str
    make: Callable
    kind: str = "peer"
    slow: bool = False
    countable: bool = True
    applies: Callable = lambda case: True


def ours(run):
    """One provider per backend of `run(problem, backend) -> Call`."""
    return tuple(Provider(name, partial(_on_backend, run, name), kind="ours") for name in _backends.NAMES)


def _on_backend(run, name, problem):
    stem = next(s for s, ops in STEMS.items() if problem.case.op in ops)
    lead = next(iter((*problem.leaves.values(), *problem.fixed.values())))
    why = _backends.refusal(stem, name, lead.device.type, lead.dtype)
    if why:
        raise Unavailable(why)
    return run(problem, name)


def work(suite, case, mode):
    """The Work of one mode; "full" is the sum of the passes."""
    passes = suite.cost(case)
    return passes[mode] if mode != "full" or "bwd" not in passes else passes["fwd"] + passes["bwd"]


def suites():
    return {stem: import_module(f".bench_{stem}", __package__) for stem in STEMS}


def provider_names(kinds):
    """Every provider name of these kinds, in order of first appearance."""
    return list(dict.fromkeys(p.name for suite in suites().values() for p in suite.PROVIDERS if p.kind in kinds))


def select(names, preset, dtypes):
    """[(suite, case)] for stems or ops (all if none), in this preset, one case per dtype."""
    known = [*STEMS, *(op for ops in STEMS.values() for op in ops)]
    for name in names:
        if name not in known:
            raise ValueError(f"no stem or op {name!r}; there are {', '.join(dict.fromkeys(known))}")
    chosen = []
    for stem, suite in suites().items():
        for case in suite.cases():
            if preset in case.presets and (not names or stem in names or case.op in names):
                wanted = dtypes if dtypes and case.dtypes[0] in DTYPES else case.dtypes
                # a bar holds for the dtypes it was set for
                chosen += [(suite, replace(case, dtype=d)) for d in wanted if preset != "bars" or d in case.dtypes]
    return chosen
