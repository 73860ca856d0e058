"""Run Triton kernels on CPU tensors and check every access that their programs make.

    with Probe(seed=0) as probe:
        op(*cpu_tensors)
    assert not probe.findings
    probe.launches[-1].report()

The interpreter is repaired (bf16 and fp8, see interpreter.py), rounds TF32 operands, and leaves NaN, the largest
integer or True in lanes that a mask switches off without `other`. Programs run one after another, in the order of
`seed`. Findings:

out of bounds    outside the elements that an argument's shape and strides reach, or outside the storage that a pointer
                 loaded from memory points into; an access of a freed tensor too
race             two programs, one of them storing, in no order given by acquire and release
differing lanes  lanes of one store write different values to one address
never written    a read of what torch.empty left, in a tensor made inside the block; writes behind torch's back, such as
                 through Tensor.numpy(), are not known
misaligned       an address that is no multiple of the element size

Layouts, warps and what happens inside a program are the compiler's affair and are not seen. Needs TRITON_INTERPRET=1 in
the environment before Triton is imported.
"""

from contextlib import ExitStack, contextmanager

from . import interpreter
from .instrument import instrumented
from .launch import Launch
from .storages import StorageTracker

_active = False


class Probe:
    """Context manager; `launches` and `findings` grow while it is open.

    seed: order of the programs of each launch; None keeps the grid's own order.
    """

    def __init__(self, seed=None):
        _check_interpreter()
        self.seed = seed
        self.launches, self.findings = [], []
        self.tracker = StorageTracker()
        self.watched = []
        self.launch = self.ordering = None
        self.argument_names = {}

    def watch(self, tensors):
        """Bound pointers taken from memory by these tensors instead of by their storages; {name: contiguous tensor}."""
        self.watched += tensors.items()
        for tensor in tensors.values():
            self.tracker.of(tensor)

    def __enter__(self):
        global _active
        if _active:
            raise RuntimeError("a Probe is open already; one at a time can instrument the interpreter")
        with ExitStack() as stack:
            stack.enter_context(interpreter.repaired())
            stack.enter_context(instrumented(self))
            stack.enter_context(self.tracker)
            self._stack = stack.pop_all()
        _active = True
        return self

    def __exit__(self, *error):
        global _active
        _active = False
        return self._stack.__exit__(*error)

    @contextmanager
    def launching(self, kernel):
        self.launch = Launch(kernel, self)
        self.launches.append(self.launch)
        try:
            yield
        finally:
            self.launch.finish()
            self.launch = None


def _check_interpreter():
    if not interpreter.interpreting():
        raise RuntimeError("lab.Probe needs Triton's interpreter: set TRITON_INTERPRET=1 before Triton is imported")
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    if not isinstance(tl.sum, InterpretedFunction):
        raise RuntimeError("TRITON_INTERPRET=1 was set after Triton was imported; set it before the first import")
