"""End-to-end benchmark of a config's training, part by part and as a whole, beside peers."""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, MODELS, DefaultScope

from groupmamba_mm.datasets import benchmark_data
from groupmamba_mm.engine.training import apply_train_options, set_common_options
from groupmamba_mm.errors import ConfigError, UserError

from .training_clock import PHASES, STARTED

PARTS = ('loader', 'step', 'run', 'startup', 'peers')
TRAIN = Path(__file__).resolve().parents[2] / 'tools' / 'train.py'
#: Variables that name the folders of compiled kernels.
CACHES = ('TRITON_CACHE_DIR', 'TORCHINDUCTOR_CACHE_DIR', 'CUDA_CACHE_PATH')
_LIBRARIES = {'mmpretrain': 'classification', 'mmdet': 'detection', 'mmseg': 'segmentation'}
_LOG_LINES = 5

Row = dict[str, Any]


class PartError(UserError):
    """A part of the benchmark that failed or took too long."""


@dataclass(frozen=True)
class Plan:
    """What is measured, and how long.

    Attributes:
        parts: Names of :data:`PARTS`.
        out: The folder of results.
        warmup: Iterations before the measured ones.
        iterations: Measured iterations.
        timeout: Seconds after which a part is given up.
        gpus: Numbers of processes, each with a GPU of its own if there are some.
        batch: Images of a process's batch, None for the config's.
        workers: Processes of a loader, None for the config's.
    """

    parts: Sequence[str]
    out: Path
    warmup: int
    iterations: int
    timeout: float
    gpus: Sequence[int] = (1,)
    batch: int | None = None
    workers: int | None = None


@dataclass
class Contestant:
    """A config that is measured.

    Attributes:
        name: What its rows are called.
        kind: 'ours' or 'peer'.
        cfg: The config.
        only_loader: Whether it is timm's loader, which trains nothing.
    """

    name: str
    kind: str
    cfg: Config
    only_loader: bool = False
    notes: list[str] = field(default_factory=list)


# Data


def make_data(cfg: Config, folder: Path, images: int) -> None:
    """Make training data of the shape that a config's data set has, unless they are there.

    Args:
        cfg: The config, whose data set then reads them; changed in place.
        folder: Where data are kept, each kind in a folder of its own.
        images: Number of images.

    Raises:
        ConfigError: The library is none of the three.
    """
    dataset = _innermost(cfg.train_dataloader.dataset)
    scope, threads = cfg.default_scope, benchmark_data.default_threads()
    if scope == 'mmpretrain':
        classes = _num_classes(cfg)
        root = folder / f'classification_{classes}classes_{images}'
        with _made_once(root) as missing:
            if missing:
                benchmark_data.make_classification(root, images, classes, threads)
        dataset.pop('split', None)
        dataset.update(type='CustomDataset', data_prefix='train', ann_file='')
    elif scope == 'mmdet':
        names = _class_names(dataset, scope)
        root = folder / f'detection_{len(names)}classes_{images}'
        dataset.update(ann_file='annotations/instances.json', data_prefix=dict(img='train/'))
        with _made_once(root) as missing:
            if missing:
                benchmark_data.make_detection(
                    root, dataset.ann_file, 'train', names, images, threads
                )
    elif scope == 'mmseg':
        classes = len(_class_names(dataset, scope))
        classes += bool(dataset.get('reduce_zero_label'))
        root = folder / f'segmentation_{classes}classes_{images}'
        dataset.update(
            img_suffix='.jpg',
            seg_map_suffix='.png',
            data_prefix=dict(img_path='images', seg_map_path='annotations'),
        )
        with _made_once(root) as missing:
            if missing:
                benchmark_data.make_segmentation(
                    root, 'images', 'annotations', ('.jpg', '.png'), classes, images, threads
                )
    else:
        raise ConfigError(
            f'config {cfg.filename}: no data can be made for default_scope='
            f'{scope!r}; give one of {", ".join(_LIBRARIES)}'
        )
    dataset.data_root = str(root)


def _innermost(dataset: ConfigDict) -> ConfigDict:
    while 'dataset' in dataset:
        dataset = dataset.dataset
    return dataset


def _class_names(dataset: ConfigDict, scope: str) -> Sequence[str]:
    """The classes of a data set's config, or else those of its type."""
    with DATASETS.switch_scope_and_registry(scope) as registry:
        owner = registry.get(dataset.type)
    return (dataset.get('metainfo') or {}).get('classes') or owner.METAINFO['classes']


def _num_classes(cfg: Config) -> int:
    found = cfg.model.get('num_classes') or cfg.model.get('head', {}).get('num_classes')
    if found is None:
        raise ConfigError(
            f'config {cfg.filename} does not say how many classes its model has; give --data-root'
        )
    return found


@contextlib.contextmanager
def _made_once(root: Path) -> Iterator[bool]:
    """Whether a folder is still to be filled; it counts as filled once the block is through."""
    done = root / '.complete'
    if done.exists():
        yield False
        return
    print(f'Making {root.name} in {root.parent}', flush=True)
    start = time.perf_counter()
    yield True
    done.touch()
    print(f'    {time.perf_counter() - start:.0f} s', flush=True)


# Configs


def prepare(cfg: Config, name: str, plan: Plan, data_root: str | None, images: int) -> None:
    """Change a config into what is measured: no weights to read, data, batch, lines in the log.

    Args:
        cfg: The config, changed in place.
        name: Its name.
        plan: The plan.
        data_root: A folder with the config's data, None to make some.
        images: Number of images that are made.
    """
    cfg.model = _without_pretrained(cfg.model)
    apply_train_options(cfg, no_validate=True)
    for key in ('test_dataloader', 'test_cfg', 'test_evaluator'):
        cfg[key] = None
    set_common_options(cfg, f'{name}.py', str(plan.out / 'work_dirs' / name), 'none')
    loader = cfg.train_dataloader
    if plan.batch is not None:
        loader.batch_size = plan.batch
    if plan.workers is not None:
        loader.num_workers = plan.workers
        loader.persistent_workers = bool(loader.get('persistent_workers')) and plan.workers > 0
    if data_root is not None:
        _innermost(loader.dataset).data_root = data_root
    else:
        make_data(cfg, plan.out / 'data', images)
        # as in a long epoch, workers are not restarted while it is measured
        needed = (plan.warmup + plan.iterations + 1) * loader.batch_size * max(plan.gpus)
        loader.dataset = ConfigDict(
            type='RepeatDataset', dataset=loader.dataset, times=1 + needed // images
        )
    interval = max(1, plan.iterations // _LOG_LINES)
    cfg.default_hooks.logger = dict(type='LoggerHook', interval=interval, log_metric_by_epoch=False)
    cfg.log_processor = dict(cfg.get('log_processor') or {}, window_size=interval)
    imports = cfg.get('custom_imports') or dict(imports=[])
    cfg.custom_imports = dict(
        imports,
        imports=[
            *imports['imports'],
            'groupmamba_mm.engine',
            'groupmamba_mm.datasets.loading',
            'groupmamba_mm.analysis.training_clock',
        ],
    )
    if 'teacher' in cfg.model:
        _give_teacher_weights(cfg, plan.out)


def _without_pretrained(part: Any) -> Any:
    """A part of a model's config that reads no weights: speed does not depend on them."""
    if isinstance(part, dict):
        return ConfigDict(
            {
                key: None
                if key == 'pretrained'
                or (
                    key == 'init_cfg'
                    and isinstance(value, dict)
                    and value.get('type') == 'Pretrained'
                )
                else _without_pretrained(value)
                for key, value in part.items()
            }
        )
    return [_without_pretrained(value) for value in part] if isinstance(part, list) else part


def _give_teacher_weights(cfg: Config, out: Path) -> None:
    """Write random weights of the teacher's network into the file that its config names."""
    file = out / 'teacher.pth'
    cfg.model.teacher.checkpoint = str(file)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        torch.save(MODELS.build(cfg.model.teacher).build().state_dict(), file)


def peers_of(cfg: Config, name: str) -> list[Contestant]:
    """What a config is compared with: Swin-T through the same runner, and timm's loader.

    Args:
        cfg: The config, not prepared yet.
        name: Its name.

    Returns:
        The peers.
    """
    scope = cfg.default_scope
    if scope == 'mmpretrain':
        swin = Config(cfg._cfg_dict.to_dict(), filename=cfg.filename)
        classes = _num_classes(cfg)
        swin.model = dict(
            type='ImageClassifier',
            backbone=dict(
                type='SwinTransformer', arch='tiny', drop_path_rate=0.2, pad_small_map=True
            ),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(
                type='LinearClsHead',
                num_classes=classes,
                in_channels=768,
                loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
            ),
            train_cfg=cfg.model.get('train_cfg'),
        )
        return [
            Contestant('timm loader', 'peer', Config(cfg._cfg_dict.to_dict()), True),
            Contestant('swin-t', 'peer', swin),
        ]
    if scope == 'mmdet':
        # the libraries' own configs: with fp16, as they are trained
        recipe = 'amp-ms-crop-3x' if 'ms-crop' in name else '1x'
        peer = _library_config('mmdet', f'swin/mask-rcnn_swin-t-p4-w7_fpn_{recipe}_coco.py')
    else:
        peer = _library_config(
            'mmseg', 'swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'
        )
    apply_train_options(peer, amp='fp16')
    # the same data, classes and pipeline of the test set apart
    own = _innermost(cfg.train_dataloader.dataset)
    theirs = _innermost(peer.train_dataloader.dataset)
    for key in ('type', 'metainfo', 'reduce_zero_label', 'data_root', 'ann_file', 'data_prefix'):
        if key in own:
            theirs[key] = own[key]
    return [Contestant(Path(peer.filename).stem, 'peer', peer)]


def _library_config(package: str, path: str) -> Config:
    """Read a config that an installed library has brought along."""
    library = __import__(package)
    root = Path(library.__file__).parent
    for folder in (root / '.mim' / 'configs', root.parent / 'configs'):
        if (folder / path).is_file():
            return Config.fromfile(str(folder / path))
    raise ConfigError(
        f'{package} {library.__version__} has no config {path}; leave "peers" out of --parts'
    )


# Measuring


def measure(contestant: Contestant, plan: Plan) -> list[Row]:
    """Measure a config part by part.

    Args:
        contestant: The config, prepared.
        plan: The plan.

    Returns:
        A row for each number of GPUs.
    """
    rows = []
    for gpus in plan.gpus:
        row = dict(
            name=contestant.name,
            kind=contestant.kind,
            gpus=gpus,
            batch=contestant.cfg.train_dataloader.batch_size,
        )
        notes = []
        for part in ('loader', 'step', 'startup', 'run'):
            if (
                part not in plan.parts
                or (contestant.only_loader and part != 'loader')
                or (part in ('loader', 'startup') and gpus != plan.gpus[0])
            ):
                continue
            print(f'{contestant.name}, {gpus} process(es): {part}', flush=True)
            try:
                found = _MEASURES[part](contestant, plan, gpus)
            except PartError as error:
                notes.append(f'{part}: {error}')
                print(f'    failed: {error}', flush=True)
            else:
                row.update(found)
                print(
                    '    ' + ', '.join(f'{key} {_short(value)}' for key, value in found.items()),
                    flush=True,
                )
        rows.append(dict(row, note='; '.join(notes)))
        if contestant.only_loader:
            break
    return rows


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _short(number) for key, number in value.items()}
    return round(value, 2) if isinstance(value, float) else value


def _part(contestant: Contestant, plan: Plan, gpus: int, name: str) -> Row:
    config, out = plan.out / 'config.py', plan.out / 'part.json'
    contestant.cfg.dump(str(config))
    out.unlink(missing_ok=True)
    command = [
        '-m',
        'groupmamba_mm.analysis.training_parts',
        name,
        str(config),
        str(out),
        '--warmup',
        str(plan.warmup),
        '--iterations',
        str(plan.iterations),
    ]
    _run(command, gpus, plan, {})
    return json.loads(out.read_text())


def _measure_loader(contestant: Contestant, plan: Plan, gpus: int) -> Row:
    return _part(contestant, plan, 1, 'timm-loader' if contestant.only_loader else 'loader')


def _measure_step(contestant: Contestant, plan: Plan, gpus: int) -> Row:
    return _part(contestant, plan, gpus, 'step')


def _measure_startup(contestant: Contestant, plan: Plan, gpus: int) -> Row:
    """The time from launch to the 20th iteration, without compiled kernels and with them."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: str(Path(folder) / name.lower()) for name in CACHES}
        seconds = [
            _train(contestant, plan, gpus, STARTED, 0, caches)['startup_s'] for _ in range(2)
        ]
    return dict(startup_cold_s=seconds[0], startup_warm_s=seconds[1])


def _measure_run(contestant: Contestant, plan: Plan, gpus: int) -> Row:
    found = _train(contestant, plan, gpus, plan.warmup, plan.iterations, {})
    del found['startup_s']
    return found


_MEASURES = dict(
    loader=_measure_loader, step=_measure_step, startup=_measure_startup, run=_measure_run
)


def _train(
    contestant: Contestant,
    plan: Plan,
    gpus: int,
    warmup: int,
    iterations: int,
    environment: dict[str, str],
) -> Row:
    """Run ``tools/train.py`` and read its log."""
    config, out = plan.out / 'config.py', plan.out / 'clock.json'
    cfg = Config(contestant.cfg._cfg_dict.to_dict())
    cfg.work_dir = tempfile.mkdtemp(prefix=f'{contestant.name}_', dir=_folder(plan.out / 'runs'))
    cfg.custom_hooks = [
        *(cfg.get('custom_hooks') or []),
        dict(type='TrainingClockHook', out=str(out), warmup=warmup, iterations=iterations),
    ]
    for length in ('max_epochs', 'max_iters'):  # the clock ends it
        if length in cfg.train_cfg:
            cfg.train_cfg[length] = max(cfg.train_cfg[length], warmup + iterations + 1)
    cfg.dump(str(config))
    out.unlink(missing_ok=True)
    launcher = ['--launcher', 'pytorch'] if gpus > 1 else []
    start = time.time()
    host_gb = _run([str(TRAIN), str(config), *launcher], gpus, plan, environment)
    clock = json.loads(out.read_text())
    row = dict(startup_s=clock['started'] - start, host_gb=host_gb, phases_ms=clock['phases'])
    lines = read_log(Path(cfg.work_dir), warmup)
    if lines:
        # as the log has them, the median of its lines after the warm-up
        row['run_ms'] = 1000 * statistics.median(line['time'] for line in lines)
        row['run_img_s'] = 1000 * gpus * cfg.train_dataloader.batch_size / row['run_ms']
    if 'peak_gb' in clock:
        logged = [line['memory'] * 2**20 / 1e9 for line in read_log(Path(cfg.work_dir), 0)]
        row['peak_gb'] = max([clock['peak_gb'], *logged])
        row['reserved_gb'] = clock['reserved_gb']
    return row


def read_log(work_dir: Path, warmup: int) -> list[dict[str, Any]]:
    """Read the training lines of a run's log.

    Args:
        work_dir: The run's folder.
        warmup: Lines up to that iteration are left out, and those that average over it.

    Returns:
        The records that the runner wrote, at least with 'time' in seconds.
    """
    records = []
    for file in sorted(work_dir.glob('*/vis_data/scalars.json')):
        records += [json.loads(line) for line in file.read_text().splitlines()]
    records = [record for record in records if 'time' in record and 'loss' in record]
    if len(records) < 2:
        return [record for record in records if record['iter'] > warmup]
    window = records[1]['iter'] - records[0]['iter']
    return [record for record in records if record['iter'] - window >= warmup]


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _run(arguments: list[str], processes: int, plan: Plan, environment: dict[str, str]) -> float:
    """Run Python, in several processes by torchrun.

    Returns:
        Peak of the host's memory in GB, for all processes of the command.

    Raises:
        PartError: It failed, or took longer than the plan allows.
    """
    command = [sys.executable, '-u']
    if processes > 1:
        command += [
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc-per-node',
            str(processes),
        ]
    path = os.pathsep.join(filter(None, (str(TRAIN.parents[1]), os.environ.get('PYTHONPATH'))))
    with open(plan.out / 'output.log', 'w+') as output:
        process = subprocess.Popen(
            command + arguments,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, 'PYTHONPATH': path, **environment},
        )
        memory = _MemoryWatch(process.pid)
        try:
            code = process.wait(plan.timeout)
        except subprocess.TimeoutExpired:
            raise PartError(
                f'not done in {plan.timeout:.0f} s; give a longer --timeout or fewer --iterations'
            ) from None
        finally:
            memory.stop()
            _end(process)
        if code != 0:
            output.seek(0)
            lines = [line.strip() for line in output if line.strip()]
            errors = [line for line in lines if 'rror' in line] or lines or ['no output']
            raise PartError(f'exit code {code}: {errors[-1][:300]}')
    return memory.peak_gb


def _end(process: subprocess.Popen) -> None:
    """End a process and its descendants, on Linux also those in other sessions."""
    started = _family(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pid in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _family(pid: int) -> list[int]:
    """A process and its descendants, by Linux's /proc."""
    parents = {}
    for entry in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):
            # after the command's name, which may have spaces
            state, parent = (entry / 'stat').read_text().rpartition(')')[2].split()[:2]
            if state != 'Z':
                parents[int(entry.name)] = int(parent)
    family = [pid] if pid in parents else []
    for member in family:
        family += [child for child, parent in parents.items() if parent == member]
    return family


class _MemoryWatch:
    """Sample the memory of a process and its descendants twice a second, on Linux.

    Pages that processes share count once: each has its part of them.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.peak_gb = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop looking."""
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.5):
            total = 0
            for pid in _family(self.pid):
                with contextlib.suppress(OSError, StopIteration):
                    lines = Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines()
                    total += next(int(line.split()[1]) for line in lines if line.startswith('Pss:'))
            self.peak_gb = max(self.peak_gb, 1024 * total / 1e9)


# Reporting

_COLUMNS = (
    ('model', 'name', ''),
    ('GPUs', 'gpus', 'd'),
    ('batch', 'batch', 'd'),
    ('loader [img/s]', 'loader_img_s', '.4g'),
    ('step [img/s]', 'step_img_s', '.4g'),
    ('train.py [img/s]', 'run_img_s', '.4g'),
    ('train.py [ms]', 'run_ms', '.4g'),
    ('start, empty caches [s]', 'startup_cold_s', '.1f'),
    ('warm [s]', 'startup_warm_s', '.1f'),
    ('GPU [GB]', 'peak_gb', '.2f'),
    ('reserved [GB]', 'reserved_gb', '.2f'),
    ('host [GB]', 'host_gb', '.1f'),
)


def make_tables(rows: Sequence[Row]) -> str:
    """Make Markdown tables of rows.

    Args:
        rows: Measured rows.

    Returns:
        A table of rates, and one of the phases of an iteration if they were measured.
    """
    body = [[_cell(row.get(key), spec) for _, key, spec in _COLUMNS] for row in rows]
    text = _table([heading for heading, _, _ in _COLUMNS], body)
    phased = [row for row in rows if row.get('phases_ms')]
    if phased:
        text += '\n\n' + _table(
            ['one iteration of train.py [ms]', 'GPUs', *PHASES],
            [
                [
                    row['name'],
                    _cell(row['gpus'], 'd'),
                    *(_cell(row['phases_ms'][phase], '.2f') for phase in PHASES),
                ]
                for row in phased
            ],
        )
    notes = [f'- {row["name"]}, {row["gpus"]} GPU(s): {row["note"]}' for row in rows if row['note']]
    return text + ('\n\nNot measured:\n\n' + '\n'.join(notes) if notes else '')


def _cell(value: Any, spec: str) -> str:
    return '-' if value is None else format(value, spec)


def _table(headings: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [f'| {" | ".join(headings)} |', '|---' + '|---:' * (len(headings) - 1) + '|']
    return '\n'.join(lines + [f'| {" | ".join(cells)} |' for cells in body])
