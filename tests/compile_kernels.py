"""Translate the Triton kernels that whole models launch for a GPU, on a machine without one.

Triton's interpreter, in which the tests run kernels on a CPU, is Python: it takes what the compiler
refuses, and does with loops what Python does. Here the launches of models are noted, and each
kernel goes through the compiler's frontend. One more thing is looked for: a name that a loop
assigns without Triton passing it on to the next pass.

    python -m tests.compile_kernels      prints each kernel once, and what is wrong
"""

import importlib
import inspect
import os
import pkgutil
import re
import sys

os.environ.pop('TRITON_INTERPRET', None)  # before Triton is imported

import torch
import triton
from triton.compiler import code_generator

from groupmamba_mm import GroupMamba, ops
from groupmamba_mm.backbones.kernels import Pass, note_backbone
from groupmamba_mm.ops.gpu import shared_memory_of
from groupmamba_mm.ops.grouped_conv import grouped_conv, packed_weight
from groupmamba_mm.ops.launch import Launch
from groupmamba_mm.ops.precompile import AbsentGPU, _example
from groupmamba_mm.ops.tracing import noting_launches

#: An H100's.
CAPABILITY = 90

#: Narrow and wide stages of both families, whose kernels branch by width, with one state and more.
MODELS = (
    dict(
        arch=dict(
            family='official',
            stem_channels=8,
            embed_dims=(64, 348),
            depths=(1, 1),
            ffn_ratios=(8, 4),
        )
    ),
    dict(
        arch=dict(
            family='paper',
            stem_channels=8,
            embed_dims=(48, 96, 368),
            depths=(1, 1, 2),
            ffn_ratios=(2, 8, 2),
        )
    ),
    dict(
        arch=dict(
            family='official', stem_channels=8, embed_dims=(24,), depths=(1,), ffn_ratios=(2,)
        ),
        d_state=3,
    ),
    dict(
        arch=dict(family='paper', stem_channels=8, embed_dims=(144,), depths=(1,), ffn_ratios=(2,)),
        d_state=3,
    ),
)
#: Of images, four at once: maps that strips of seven columns divide, and others; of many tokens, of
#: which a program takes whole FFNs, and which are cut into segments.
SIZES = ((224, 224), (320, 608))
PASSES = tuple(
    Pass(4, torch.float32, autocast, training, training)
    for autocast in (None, torch.bfloat16)
    for training in (False, True)
)

#: Values of constants that must all have been translated.
BRANCHES = dict(
    WHOLE=(False, True),
    BACKWARD=(False, True),
    SUMMARY_PASS=(False, True),
    EVEN=(False, True),
    HAS_NORM=(False, True),
    TW=(4, 7),
    KEEP=(False, True),
    NORM=(False, True),
    SUM=(False, True),
    GRAD_ROUNDED_ROW=(0, 368),
)


class Translated(Exception):
    """The frontend is done; nothing else is wanted."""


class Frontend:
    """Translates kernels, for a GPU that is not there.

    Attributes:
        problems: What is wrong with each kernel, by its name.
        constants: Names and values of the constants they had.
    """

    def __init__(self) -> None:
        self.problems = {}
        self.constants = set()
        self._dropped = set()
        generator = code_generator.CodeGenerator
        self._set_value, self._find_carries = generator.set_value, generator._find_carries
        generator.set_value = lambda *args: self._note(*args)
        generator._find_carries = lambda *args, **kwargs: self._compare(*args, **kwargs)
        triton.knobs.compilation.always_compile = True  # what is cached does not pass the frontend
        triton.runtime.driver.set_active(AbsentGPU(CAPABILITY))
        triton.knobs.runtime.add_stages_inspection_hook = self._stop

    @staticmethod
    def _stop(backend_of, stages, options, language, capability):
        frontend = stages['ttir']

        def stop(source, metadata):
            frontend(source, metadata)
            raise Translated

        stages['ttir'] = stop

    def translate(self, launch: Launch) -> None:
        """Note in ``problems`` what is wrong with one version of a kernel."""
        self.constants.update(launch.constants)
        self._dropped = set()
        found = self.problems.setdefault(launch.function.__name__, set())
        try:
            launch.function.warmup(
                *map(_example, launch.kinds), grid=(1,), **dict(launch.constants)
            )
        except Translated:
            pass
        except triton.CompilationError as error:
            found.add(str(error))
        if self._dropped:
            found.add(
                f'a loop assigns {sorted(self._dropped)}, which the next pass does not see: '
                'let the names begin with values of their own'
            )

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
        known = {name for name, value in liveins.items() if code_generator._is_triton_value(value)}
        ignored = kwargs.get('ignore', args[0] if args else ())
        self._dropped |= (generator.assigned.pop() & known) - set(found[0]) - set(ignored)
        return found


def launched_kernels():
    """Names of the kernels that the package launches."""
    modules = [
        importlib.import_module(info.name)
        for info in pkgutil.walk_packages(ops.__path__, ops.__name__ + '.')
    ]
    source = ''.join(map(inspect.getsource, modules))
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction)
        and re.search(rf'\blaunch\((kernels\.)?{name}\b', source)
    }


def note_models() -> list[Launch]:
    """What the models launch, forward, and forward and backward in training."""
    return list(
        dict.fromkeys(
            launch
            for options in MODELS
            for launch in note_backbone(
                GroupMamba(scan_backend='triton', drop_path_rate=0.1, **options),
                SIZES,
                PASSES,
                CAPABILITY,
            )
        )
    )


def note_grouped_convs() -> list[Launch]:
    """What a teacher's grouped convolutions launch."""
    with noting_launches(shared_memory_of(CAPABILITY)) as launches:
        for channels in (16, 112):
            image = torch.zeros(1, 2 * channels, 4, 4, dtype=torch.bfloat16)
            weight = packed_weight(image.new_zeros(2 * channels, channels, 3, 3), groups=2)
            for relu in (False, True):
                grouped_conv(image, weight, image[0, :, 0, 0], relu=relu)
    return launches


def specialised_integers(launches: list[Launch]) -> list[str]:
    """Integers on which Triton would compile a version for 1, one for multiples of 16, ..."""
    return sorted(
        {
            f'{launch.function.__name__}: {parameter.name}'
            for launch in launches
            for parameter, kind in zip(launch.function.params, launch.kinds)
            if kind in ('i32', 'i64') and not parameter.do_not_specialize
        }
    )


def main() -> int:
    """Return the number of kernels that have problems."""
    launches, frontend = note_models() + note_grouped_convs(), Frontend()
    for launch in launches:
        frontend.translate(launch)
    problems = dict.fromkeys(launched_kernels(), {'no model here launches it'})
    problems.update(frontend.problems)
    problems.update(
        {
            f'{name}={value}': {'no kernel here has it'}
            for name, values in BRANCHES.items()
            for value in values
            if (name, value) not in frontend.constants
        }
    )
    problems.update(
        {integer: {'its value decides on a version'} for integer in specialised_integers(launches)}
    )
    for name, found in sorted(problems.items()):
        print(f'{name}:', *(sorted(found) or ['fine']))
    print(f'{len(launches)} versions of {len(frontend.problems)} kernels')
    return sum(map(bool, problems.values()))


if __name__ == '__main__':
    sys.exit(main() > 0)
