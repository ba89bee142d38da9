"""Translate the Triton kernels that whole models launch for a GPU, on a machine without one.

Triton's interpreter, in which the tests run kernels on a CPU, is Python: it takes what the compiler
refuses, and does with loops what Python does. Here the blocks run as on a GPU, forward and
backward, but each launch ends when the compiler's frontend is done with the kernel. One more thing
is looked for: a name that a loop assigns without Triton passing it on to the next pass.

    python -m tests.compile_kernels      prints each kernel once, and what is wrong
"""
import contextlib
import importlib
import inspect
import os
import pkgutil
import re
import sys

os.environ.pop('TRITON_INTERPRET', None)  # before Triton is imported

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import code_generator  # noqa: E402

from groupmamba_mm import GroupMamba, ops  # noqa: E402
from groupmamba_mm.ops import backend  # noqa: E402
from groupmamba_mm.ops.ffn import hidden  # noqa: E402
from groupmamba_mm.ops.grouped_ssm import launch  # noqa: E402
from groupmamba_mm.ops.norm import kernels as norm_kernels  # noqa: E402

#: Narrow and wide stages of both families, whose kernels branch by width, with one state and more.
MODELS = (
    dict(arch=dict(family='official', stem_channels=8, embed_dims=(64, 348), depths=(1, 1),
                   ffn_ratios=(8, 4))),
    dict(arch=dict(family='paper', stem_channels=8, embed_dims=(48, 96, 368), depths=(1, 1, 2),
                   ffn_ratios=(2, 8, 2))),
    dict(arch=dict(family='official', stem_channels=8, embed_dims=(24, ), depths=(1, ),
                   ffn_ratios=(2, )), d_state=3),
    dict(arch=dict(family='paper', stem_channels=8, embed_dims=(144, ), depths=(1, ),
                   ffn_ratios=(2, )), d_state=3),
)
#: Of the images: maps of 14 and 7 columns, which strips of seven divide, and of others.
SIZES = ((56, 56), (56, 56), (56, 72), (56, 72))

#: Values of constants that must all have been translated.
BRANCHES = dict(WHOLE=(False, True), BACKWARD=(False, True), SUMMARY_PASS=(False, True),
                EVEN=(False, True), HAS_NORM=(False, True), TW=(7, ), KEEP=(False, True),
                NORM=(False, True), SUM=(False, True), GRAD_ROUNDED_ROW=(0, 368))


class AbsentGPU:
    """What Triton asks its driver about: an H100."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget('cuda', 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Translated(Exception):
    """The frontend is done; nothing else is wanted."""


class Frontend:
    """From its creation on, launches translate kernels and do not run them.

    Attributes:
        problems: What is wrong with each kernel that was launched, by its name.
        variants: How many there were of all kernels, by dtypes and constants.
        constants: Names and values of the constants they had.
    """

    def __init__(self) -> None:
        self.problems = {}
        self.constants = set()
        self._seen, self._dropped = set(), set()
        generator = code_generator.CodeGenerator
        self._set_value, self._find_carries = generator.set_value, generator._find_carries
        generator.set_value = lambda *args: self._note(*args)
        generator._find_carries = lambda *args, **kwargs: self._compare(*args, **kwargs)
        triton.knobs.compilation.always_compile = True  # what is cached does not pass the frontend
        triton.runtime.driver.set_active(AbsentGPU())
        triton.knobs.runtime.add_stages_inspection_hook = self._stop
        self._launch, triton.JITFunction.run = triton.JITFunction.run, self._run_of()

    @property
    def variants(self) -> int:
        return len(self._seen)

    @staticmethod
    def _stop(backend_of, stages, options, language, capability):
        frontend = stages['ttir']

        def stop(source, metadata):
            frontend(source, metadata)
            raise Translated

        stages['ttir'] = stop

    def _run_of(self):
        def run(kernel, *args, grid, warmup, **kwargs):
            kinds = [arg.dtype if isinstance(arg, torch.Tensor) else type(arg) for arg in args]
            variant = (kernel.__name__, str(kinds), str(kwargs))
            if variant in self._seen:
                return
            self._seen.add(variant)
            self.constants.update(kwargs.items())
            self._dropped = set()
            found = self.problems.setdefault(kernel.__name__, set())
            try:
                self._launch(kernel, *args, grid=grid, warmup=True, **kwargs)
            except Translated:
                pass
            except triton.CompilationError as error:
                found.add(str(error))
            if self._dropped:
                found.add(f'a loop assigns {sorted(self._dropped)}, which the next pass does not '
                          'see: let the names begin with values of their own')
        return run

    def _note(self, generator, name, value):
        for assigned in getattr(generator, 'assigned', ()):
            assigned.add(name)
        return self._set_value(generator, name, value)

    def _compare(self, generator, node, liveins, *args, **kwargs):
        """Names that a loop assigns, against those that Triton hands on to the next pass.

        A name that holds after the first pass what it began with counts as unchanged, even if that
        is by way of another name, which does change: ``above = here``, both zeros at first.
        """
        generator.assigned = [*getattr(generator, 'assigned', ()), set()]
        found = self._find_carries(generator, node, liveins, *args, **kwargs)
        known = {name for name, value in liveins.items()
                 if code_generator._is_triton_value(value)}
        ignored = kwargs.get('ignore', args[0] if args else ())
        self._dropped |= (generator.assigned.pop() & known) - set(found[0]) - set(ignored)
        return found


def launched_kernels():
    """Names of the kernels that the package launches."""
    modules = [importlib.import_module(info.name)
               for info in pkgutil.walk_packages(ops.__path__, ops.__name__ + '.')]
    source = ''.join(map(inspect.getsource, modules))
    return {name for module in modules for name, value in vars(module).items()
            if isinstance(value, triton.JITFunction) and re.search(rf'\b{name}\[', source)}


def run_models() -> None:
    """Each model forward, and forward and backward in training, the CPU taken for a GPU."""
    backend._problem = lambda *args, **kwargs: None
    norm_kernels.runs_on = lambda device: True
    torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
    # small maps take what large ones do: whole FFNs in a kernel, sequences cut into segments
    hidden._PROGRAMS, launch.SHORTEST_SEGMENT = 2, 16
    for options, (height, width) in zip(MODELS, SIZES):
        model = GroupMamba(scan_backend='triton', drop_path_rate=.1, **options)
        for stage in model.stages:  # a GPU's autocast keeps the tokens in fp32
            stage[0].register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))
        for dtype in (torch.bfloat16, torch.float32):
            with torch.autocast('cpu', torch.bfloat16, enabled=dtype != torch.float32):
                image = torch.randn(1, 3, height, width)
                with torch.no_grad():
                    model.eval()(image)
                model.train()(image)[-1].float().sum().backward()


def main() -> int:
    """Return the number of kernels that have problems."""
    frontend = Frontend()
    run_models()
    problems = dict.fromkeys(launched_kernels(), {'no model here launches it'})
    problems.update(frontend.problems)
    problems.update({f'{name}={value}': {'no kernel here has it'}
                     for name, values in BRANCHES.items() for value in values
                     if (name, value) not in frontend.constants})
    for name, found in sorted(problems.items()):
        print(f'{name}:', *(sorted(found) or ['fine']))
    print(f'{frontend.variants} variants of {len(frontend.problems)} kernels')
    return sum(map(bool, problems.values()))


if __name__ == '__main__':
    sys.exit(main() > 0)
