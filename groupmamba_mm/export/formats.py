"""Writing the formats, and comparing what was written with PyTorch."""

import logging
import statistics
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from groupmamba_mm.errors import CheckpointError, ExportError
from groupmamba_mm.extras import explain_missing
from groupmamba_mm.ops.selective_scan.recurrence import as_one_node
from groupmamba_mm.version import __version__

from .graph import example_image

#: Largest difference from PyTorch's outputs, as a share of the largest output.
TOLERANCE = 1e-4
#: Timed calls of each side.
REPEATS = 7

Run = Callable[[Tensor], Sequence[Tensor]]


@dataclass
class Exported:
    """What an export wrote, and how it compares.

    Args:
        path: The file.
        seconds: What writing took.
        differences: For each input shape the largest difference from PyTorch's output, as a share
            of the largest output.
        latency: Milliseconds for one image, median: of PyTorch and of the file.
        notes: Lines about the file.
    """

    path: Path
    seconds: float
    differences: dict[tuple[int, ...], float] = field(default_factory=dict)
    latency: tuple[float, ...] = ()
    notes: list[str] = field(default_factory=list)


class Format(ABC):
    """One file format.

    Args:
        module: From :func:`groupmamba_mm.export.exported_module`.
        names: Its outputs' names.
        metadata: Facts about the model that the file is to carry.
    """

    suffix: str

    def __init__(self, module: nn.Module, names: Sequence[str], metadata: dict[str, str]) -> None:
        self.module = module
        self.names = list(names)
        self.metadata = dict(metadata, groupmamba_mm=__version__)

    @abstractmethod
    def write(self, path: Path, size: tuple[int, int], fixed: bool) -> list[str]:
        """Write the file.

        Args:
            path: The file.
            size: (H, W) of the images it is recorded with.
            fixed: Whether it is for one image of that size alone.

        Returns:
            Lines about the file.
        """

    @abstractmethod
    def load(self, path: Path) -> Run:
        """Read the file back.

        Args:
            path: The file.

        Returns:
            From images (B, C, H, W) to the outputs.
        """

    def _sizes(self, fixed: bool) -> tuple:
        dynamic = torch.export.Dim.DYNAMIC
        return None if fixed else ({0: dynamic, 2: dynamic, 3: dynamic},)

    def _example(self, size: tuple[int, int], fixed: bool) -> tuple[Tensor]:
        # sizes that are one or equal would be taken for such
        return (
            example_image(self.module, 1, size)
            if fixed
            else example_image(self.module, 2, (size[0], size[1] + 32)),
        )


class OnnxFormat(Format):
    """ONNX: standard operators alone, the scans as two ``Scan`` nodes each."""

    suffix = '.onnx'

    def write(self, path: Path, size: tuple[int, int], fixed: bool) -> list[str]:
        """See :class:`Format`."""
        with explain_missing('export to ONNX'):
            import onnxruntime  # noqa: F401, before minutes are spent
        from .onnx_functions import TRANSLATIONS

        shapes = self._sizes(fixed)
        with as_one_node():
            program = torch.onnx.export(
                self.module,
                self._example(size, fixed),
                dynamo=True,
                optimize=False,
                verbose=False,
                input_names=['image'],
                output_names=self.names,
                dynamic_shapes=shapes,
                custom_translation_table=TRANSLATIONS,
            )
        program.model.metadata_props.update(self.metadata)
        program.save(str(path), external_data=False)
        counts = Counter(node.op_type for node in program.model.graph)
        constants = counts.pop('Constant', 0)
        opset = program.model.opset_imports['']
        return [
            f'opset {opset}, {sum(counts.values())} nodes and {constants} constants, '
            f'{counts["Scan"]} of them Scan'
        ]

    def load(self, path: Path) -> Run:
        """See :class:`Format`."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            str(path), options, providers=['CPUExecutionProvider']
        )
        return lambda image: [
            torch.from_numpy(output) for output in session.run(self.names, {'image': image.numpy()})
        ]


class TorchExportFormat(Format):
    """A program of torch.export, in PyTorch's own operators: loading it needs PyTorch alone."""

    suffix = '.pt2'

    def write(self, path: Path, size: tuple[int, int], fixed: bool) -> list[str]:
        """See :class:`Format`."""
        program = torch.export.export(
            self.module, self._example(size, fixed), dynamic_shapes=self._sizes(fixed)
        )
        torch.export.save(program, str(path), extra_files=self.metadata)
        ranges = ', '.join(f'{name} {bounds}' for name, bounds in program.range_constraints.items())
        return [f'{len(program.graph.nodes)} nodes' + (f'; sizes: {ranges}' if ranges else '')]

    def load(self, path: Path) -> Run:
        """See :class:`Format`."""
        run = torch.export.load(str(path)).module()
        return lambda image: _as_list(run(image))


class SafetensorsFormat(Format):
    """The weights alone, by our names, with the config's name beside them."""

    suffix = '.safetensors'

    def write(self, path: Path, size: tuple[int, int], fixed: bool) -> list[str]:
        """See :class:`Format`."""
        with explain_missing('export to safetensors'):
            from safetensors.torch import save_file
        weights = {key: value.contiguous() for key, value in self._model.state_dict().items()}
        save_file(weights, str(path), metadata=dict(self.metadata, format='pt'))
        return [f'{len(weights)} tensors']

    def load(self, path: Path) -> Run:
        """See :class:`Format`."""
        from safetensors.torch import load_file

        weights = load_file(str(path))
        own = self._model.state_dict()
        if own.keys() != weights.keys() or any(
            not torch.equal(own[k], v) for k, v in weights.items()
        ):
            raise ExportError(f'{path} does not hold the tensors that were written')
        return lambda image: _as_list(self.module(image))

    @property
    def _model(self) -> nn.Module:
        return getattr(self.module, 'model', self.module)


FORMATS = {'onnx': OnnxFormat, 'torch-export': TorchExportFormat, 'safetensors': SafetensorsFormat}


@torch.no_grad()
def export_model(
    module: nn.Module,
    names: Sequence[str],
    kind: str,
    path: Path,
    size: tuple[int, int],
    fixed: bool,
    metadata: dict[str, str],
) -> Exported:
    """Write a file and check it against PyTorch, at several sizes unless it is for one.

    Args:
        module: From :func:`groupmamba_mm.export.exported_module`.
        names: Its outputs' names.
        kind: A name out of :data:`FORMATS`.
        path: The file; an existing one is refused.
        size: (H, W) of the images.
        fixed: Whether the file is for one image of that size alone, instead of any number of any
            size: ONNX from 9 x 9 pixels, torch.export from 33 x 33.
        metadata: Facts about the model that the file is to carry.

    Returns:
        What was written, and how it compares.

    Raises:
        CheckpointError: The file exists.
        ExportError: The file computes something else; it is removed.
        MissingExtraError: A library of the format is not installed.
    """
    if path.exists():
        raise CheckpointError(f'{path} exists; give another name, or remove it')
    path.parent.mkdir(parents=True, exist_ok=True)
    form = FORMATS[kind](module, names, metadata)
    start = time.perf_counter()
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)
    notes = form.write(path, size, fixed)
    result = Exported(path, time.perf_counter() - start, notes=notes)
    run = form.load(path)
    shapes = [(1, size)]
    if not fixed:
        # another height, another width, more images
        shapes += [(1, (size[0] * 5 // 7, size[1])), (1, (size[0], size[1] * 3 // 2)), (3, size)]
    for batch, image_size in shapes:
        image = example_image(module, batch, image_size)
        pairs = zip(run(image), _as_list(module(image)))
        worst = max(
            ((found - wanted).abs().max() / wanted.abs().max()).item() for found, wanted in pairs
        )
        result.differences[tuple(image.shape)] = worst
        if not worst <= TOLERANCE:
            path.unlink()
            raise ExportError(
                f'{kind} differs from PyTorch by {worst:.1e} of the largest output '
                f'for images {tuple(image.shape)}, more than {TOLERANCE:g}; the '
                'file was removed'
            )
    image = example_image(module, 1, size)
    result.latency = tuple(_milliseconds(call, image) for call in (module, run))
    return result


def _as_list(outputs) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _milliseconds(call: Callable, image: Tensor) -> float:
    call(image)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call(image)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)
