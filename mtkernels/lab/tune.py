"""Choose tile configurations by what their machine code says: candidates around the present one, compiled, checked, ranked.

    search = Search("lora_shrink", "grad_a", 16, "sm_90")
    run([search], rounds=3)
    print(search.ranked()[0].options)

The search is local: in each round the neighbours (`tune_space.neighbours`) of the best so far are compiled, for the first
compile case of the configuration. The best one is then compiled for its other cases, and falls out if one of them spills.
"""

import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from .matrix import CompileError, cache_key, measure_each, measured
from .resources import problems
from .tune_model import CARDS, estimate
from .tune_space import KERNELS, neighbours

MARGIN = 0.05
# A num_stages that no configuration has, to find the cases that one decides.
_MARK = 99


def _common():
    return import_module("mtkernels.triton_kernels._common")


@contextmanager
def configured(stem, kernel, bits, target, options):
    """While it lasts, launches and compile cases for the target's column take `options` for this kernel."""
    common = _common()
    table = common.config_file(stem)[kernel]
    table, arch = table.get(str(bits), table), common.config_arch(target)
    before = dict(table)
    table[arch] = options
    common.launch_options.cache_clear()
    try:
        yield
    finally:
        table.clear()
        table.update(before)
        common.launch_options.cache_clear()


def present(stem, kernel, bits, target):
    """The options that configs/*.json give now."""
    common = _common()
    options = common.launch_options(stem, kernel, common.config_arch(target), bits)
    return {k: v for k, v in options.items() if k != "enable_fp_fusion"}


def cases(stem, kernel, bits, target, options):
    """The compile cases that this configuration decides, with these options; the first one is what candidates are ranked by."""
    names = _case_names(stem, kernel, bits, target)
    with configured(stem, kernel, bits, target, options):
        return [case for case in _all_cases(stem, target) if case.name in names]


def _all_cases(stem, target):
    return list(import_module(f"mtkernels.triton_kernels.{stem}").compile_cases(_common().config_arch(target)))


def _case_names(stem, kernel, bits, target):
    with configured(stem, kernel, bits, target, {**present(stem, kernel, bits, target), "num_stages": _MARK}):
        return [case.name for case in _all_cases(stem, target) if case.options["num_stages"] == _MARK]


def _measure_candidate(name, target, stem, kernel, bits, options):
    case = {case.name: case for case in cases(stem, kernel, bits, target, dict(options))}[name]
    return measured(case, target)


@dataclass
class Candidate:
    options: dict
    # Resources of the first case, or what the compiler said.
    found: object = None
    estimate: object = None
    problems: list = field(default_factory=list)
    verified: bool = False

    @property
    def score(self):
        return self.estimate.score if self.estimate and not self.problems else float("inf")


class Search:
    """Candidates for one kernel, element size and target. Raises ValueError for what there is no space of."""

    def __init__(self, stem, kernel, bits, target, options=None):
        self.stem, self.kernel, self.bits, self.target = stem, kernel, bits, target
        self.space = space_of(stem, kernel, bits, target)
        self.present = present(stem, kernel, bits, target)
        self.candidates = {}
        self.names = _case_names(stem, kernel, bits, target)
        for chosen in [self.present, *(options or [])]:
            self._add(chosen)

    def __str__(self):
        return f"{self.stem}.{self.kernel} {self.bits} bits {self.target}"

    def _add(self, options):
        self.candidates.setdefault(key_of(options), Candidate(options))

    def first_jobs(self):
        return [(self.job(self.names[0], c), c) for c in self.candidates.values() if c.found is None]

    def job(self, name, candidate):
        return (name, self.target, self.stem, self.kernel, self.bits, key_of(candidate.options))

    def widen(self):
        """Add the neighbours of the best, or of the present one if nothing is good; whether there are new ones."""
        before = len(self.candidates)
        start = self.best.options if self.best else self.present
        for options in neighbours(start, self.space.space):
            self._add(options)
        return len(self.candidates) > before

    def accept(self, candidate, found, tensor_cores):
        """Take what compiling the first case gave."""
        candidate.found = found
        candidate.problems = self._problems(found, tensor_cores)
        if not candidate.problems:
            candidate.estimate = estimate(found, self.space.passes(self.bits // 8), candidate.options, self.bits // 8)

    def _problems(self, found, tensor_cores):
        if isinstance(found, CompileError):
            return [f"does not compile: {found}"]
        said = problems(found, tensor_cores)
        now = self.candidates[key_of(self.present)].found
        # A chain of products that falls back to another instruction sums in another order than its sibling configurations.
        missing = set(getattr(now, "tensor_cores", ())) - set(found.tensor_cores)
        if missing and not said:
            said.append(f"no {', '.join(sorted(missing))}, which the present one has")
        return said

    def ranked(self):
        """Candidates without problems, best first; of equals the one with fewer warps, then stages."""
        good = [c for c in self.candidates.values() if c.estimate and not c.problems]
        return sorted(good, key=lambda c: (c.score, c.options["num_warps"], c.options["num_stages"]))

    def discarded(self):
        return [c for c in self.candidates.values() if c.problems]

    @property
    def best(self):
        return next(iter(self.ranked()), None)

    @property
    def gain(self):
        """Share of the present score that the best one saves; 1 where the present one has problems."""
        if self.best is None:
            return 0.0
        now = self.candidates[key_of(self.present)].score
        return 1.0 if now == float("inf") else 1 - self.best.score / now


def key_of(options):
    return tuple(options.items())


def space_of(stem, kernel, bits, target):
    """Kernel of tune_space. Raises ValueError naming what there is."""
    if stem not in KERNELS:
        raise ValueError(f"no tile space for {stem!r}; stems are {', '.join(KERNELS)}")
    if kernel not in KERNELS[stem]:
        raise ValueError(f"no tile space for kernel {kernel!r} of {stem}; kernels are {', '.join(KERNELS[stem])}")
    if target not in CARDS:
        raise ValueError(f"no card for target {target!r}; configurations are chosen for {', '.join(CARDS)}")
    if bits not in KERNELS[stem][kernel].bits:
        raise ValueError(f"{stem}.{kernel} has no configuration for {bits} bits; it has {KERNELS[stem][kernel].bits}")
    return KERNELS[stem][kernel]


def run(searches, *, rounds=3, jobs=2, cache=None, progress=lambda done, total, name: None):
    """Search all of them together, so that the compiling processes have enough to do; then verify the best of each."""

    def compile_first():
        wanted = {job: (search, candidate) for search in searches for job, candidate in search.first_jobs()}
        for job, (found, case) in _compile(list(wanted), jobs, cache, progress).items():
            search, candidate = wanted[job]
            search.accept(candidate, found, case.tensor_cores)

    compile_first()
    for _ in range(rounds):
        if not any([search.widen() for search in searches]):
            break
        compile_first()
    _verify(searches, jobs, cache, progress)


def _verify(searches, jobs, cache, progress):
    """Compile the best of each search for its other cases until it has no problem in any."""
    while open_ones := [s for s in searches if s.best and not s.best.verified]:
        wanted = {s.job(name, s.best): s for s in open_ones for name in s.names[1:]}
        results, said = _compile(list(wanted), jobs, cache, progress), {}
        for job, (found, case) in results.items():
            search = wanted[job]
            said.setdefault(id(search), []).extend(f"{job[0]}: {text}" for text in _said(found, case))
        for search in open_ones:
            best = search.best
            best.verified, best.problems = True, said.get(id(search), [])


def _said(found, case):
    return [f"does not compile: {found}"] if isinstance(found, CompileError) else problems(found, case.tensor_cores)


def _compile(wanted, jobs, cache, progress):
    """{job: (Resources or CompileError, case)}"""
    by_job = {job: next(c for c in cases(*job[2:5], job[1], dict(job[5])) if c.name == job[0]) for job in wanted}
    keys = {job: cache_key(case, job[1]) for job, case in by_job.items()}
    found = measure_each(_measure_candidate, keys, jobs=jobs, cache=cache, progress=progress)
    return {job: (found[job], case) for job, case in by_job.items()}


def write(searches, margin=MARGIN, where=None):
    """Put the best of each search that gains more than `margin` into configs/STEM.json; the searches that were written."""
    chosen = [s for s in searches if s.best and s.gain > margin]
    for stem in dict.fromkeys(s.stem for s in chosen):
        path = (where or Path(_common().__file__).parent / "configs") / f"{stem}.json"
        tables = json.loads(path.read_text())
        for search in (s for s in chosen if s.stem == stem):
            table = tables[search.kernel]
            table.get(str(search.bits), table)[_common().config_arch(search.target)] = search.best.options
        path.write_text(_text(tables) + "\n")
    return chosen


def _text(value, depth=0):
    """JSON with one line for each set of options, as the files are."""
    if not any(isinstance(v, dict) for v in value.values()):
        return json.dumps(value)
    pad = "  " * (depth + 1)
    return "{\n" + ",\n".join(f"{pad}{json.dumps(k)}: {_text(v, depth + 1)}" for k, v in value.items()) + "\n" + "  " * depth + "}"
