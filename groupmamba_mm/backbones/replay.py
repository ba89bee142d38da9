"""Passes without launches from Python: a kind that comes again and again is replayed.

Python takes longer to launch the kernels of a small batch, or of a training step, than a GPU to run
them. A kind of pass that has come several times is recorded in a CUDA graph: images of one size, or
of the few sizes that most batches of a detector have. Weights are read in the graph: what changes
them in place is seen. What a graph cannot see ends it: tensors in other memory, hooks, replaced
submodules, other modes.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from groupmamba_mm.cuda_graph import CapturedTraining, captured
from groupmamba_mm.layers import GroupedSSM, is_watched

logger = logging.getLogger('groupmamba_mm')

#: Passes of a kind before it is recorded, in inference and in training.
PASSES_BEFORE, STEPS_BEFORE = 8, 3
#: Kinds that are kept recorded, and the share of all passes that is worth a recording: images of
#: ever new sizes gain nothing.
MOST_KINDS, LEAST_SHARE = 12, 1 / 20
#: Passes after which the counts are halved, so that the share is that of late.
COUNTED = 200
#: Times that all recordings are thrown away before no more are made.
MOST_ENDS = 4
#: How far a replay's results may be from those of launches, of the largest value of a tensor.
TOLERANCE = 1e-2


class _Replay:
    """The recorded passes of a backbone. Copies of the backbone begin without one."""

    what: str
    passes_before: int

    def __init__(self) -> None:
        self._ends = 0
        self._modules: tuple[nn.Module, ...] = ()
        self._forget()

    def _forget(self) -> None:
        self._passes: Counter[tuple] = Counter()
        self._replays: dict[tuple, Callable | CapturedTraining] = {}
        self._seen: tuple | None = None
        self._pool: tuple | None = None

    def __deepcopy__(self, memo: dict) -> '_Replay':
        return type(self)()

    def __reduce__(self) -> tuple:
        return type(self), ()

    def __call__(self, backbone: nn.Module, image: Tensor) -> tuple[Tensor, ...] | None:
        """The backbone's outputs by replaying, in new memory; None if they have to be computed.

        Args:
            backbone: A ``GroupMamba``.
            image: (B, C, H, W) on a GPU.
        """
        autocast = torch.get_autocast_dtype('cuda') if torch.is_autocast_enabled('cuda') else None
        kind = (image.shape, image.dtype, image.device, autocast)
        if self._replays and self._look(backbone) != self._seen:
            self._ends += 1
            self._forget()
        self._count(kind)
        if not self._is_free() or (image.requires_grad and torch.is_grad_enabled()):
            return None
        if kind not in self._replays and not self._try_to_record(backbone, image, kind):
            return None
        return self._run(self._replays[kind], image)

    def _count(self, kind: tuple) -> None:
        self._passes[kind] += 1
        if self._passes.total() > COUNTED:
            self._passes = Counter({other: n // 2 for other, n in self._passes.items() if n > 1})

    def _try_to_record(self, backbone: nn.Module, image: Tensor, kind: tuple) -> bool:
        """Record a kind of pass if it pays and can be; returns whether it was."""
        passes = self._passes[kind]
        # of few passes any size has a large share; the first recording need not wait
        total = max(self._passes.total(), COUNTED // 2) if self._replays else self._passes.total()
        if (
            passes <= self.passes_before
            or passes < LEAST_SHARE * total
            or len(self._replays) >= MOST_KINDS
            or self._ends >= MOST_ENDS
        ):
            return False
        self._modules = tuple(backbone.modules())
        self._seen = self._look(backbone)
        if not self._can_record(image):
            self._passes[kind] = 0
            return False
        if self._pool is None and image.is_cuda:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            replay, problem = self._record(backbone, image, kind[-1])
        except RuntimeError as error:
            replay, problem = None, _first_line_of_first(error)
        if replay is None:
            # those before may have lost the generator of random numbers, and memory may be short
            self._forget()
            self._ends = MOST_ENDS
            logger.warning(
                f'{self.what} stays with launches from Python, as it cannot be replayed: {problem}'
            )
            return False
        self._replays[kind] = replay
        return True

    def _is_free(self) -> bool:
        """Whether recordings, which share memory, may run now."""
        return True

    def _look(self, backbone: nn.Module) -> tuple:
        """All that a graph does not see change."""
        tensors, children, modes = [], [], []
        for module in self._modules:
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    tensors += [id(tensor), tensor.data_ptr(), tensor.requires_grad]
            children += map(id, module._modules.values())
            modes.append((module.training, is_watched(module)))
        return (
            tensors,
            children,
            modes,
            backbone.residual_in_fp32,
            [getattr(module, 'scan_backend', None) for module in self._modules],
        )

    def _can_record(self, image: Tensor) -> bool:
        return _can_be_recorded(self._modules, image)


class InferenceReplay(_Replay):
    """The replay of passes without gradients in eval mode."""

    what = 'inference'
    passes_before = PASSES_BEFORE

    def _record(self, backbone: nn.Module, image: Tensor, autocast: torch.dtype | None) -> tuple:
        with torch.inference_mode(False), torch.no_grad():
            image = image.clone()  # one that may be written to in any mode
            forward = _forward_of(backbone, autocast)
            expected = forward(image)
            replay = captured(forward, torch.zeros_like(image), self._pool)
            if _are_near(replay(image), expected):
                return replay, None
        return None, 'its results differ from those of launches'

    def _run(self, replay: Callable, image: Tensor) -> tuple[Tensor, ...]:
        with torch.inference_mode(False), torch.no_grad():
            return tuple(output.clone() for output in replay(image))


class TrainingReplay(_Replay):
    """The replay of training passes: one graph forward, one backward.

    A replay overwrites what the one before kept for its backward pass, also one of another kind.
    While that is still to come, the next pass is launched from Python.
    """

    what = 'training'
    passes_before = STEPS_BEFORE

    def __init__(self) -> None:
        super().__init__()
        self._parameters: list[nn.Parameter] = []
        self._pending = None

    def _can_record(self, image: Tensor) -> bool:
        # by identity: modules may share one
        self._parameters = list(
            {
                id(p): p
                for m in self._modules
                for p in m._parameters.values()
                if p is not None and p.requires_grad
            }.values()
        )
        return (
            super()._can_record(image)
            and len({p.dtype for p in self._parameters}) == 1
            # its statistics go between GPUs
            and not any(isinstance(m, nn.SyncBatchNorm) for m in self._modules)
        )

    def _record(self, backbone: nn.Module, image: Tensor, autocast: torch.dtype | None) -> tuple:
        # a graph of autograd that is kept, or a DistributedDataParallel, holds on to the nodes that
        # accumulate the gradients of parameters, and with them to the stream that these were made
        # in, which a recording must not wait for
        leaves = [nn.Parameter(p.detach()) for p in self._parameters]
        forward = _with_parameters(
            self._modules, self._parameters, leaves, _forward_of(backbone, autocast)
        )
        buffers = list(backbone.buffers())
        kept = [buffer.clone() for buffer in buffers]
        devices = [image.device] if image.is_cuda else []

        def restore_buffers() -> None:
            for buffer, value in zip(buffers, kept):
                buffer.data.copy_(value)  # a pass before may have kept the buffer

        try:
            # each of the three begins with the same random numbers, as does what follows
            with torch.random.fork_rng(devices):
                expected = forward(image)
                wanted = [torch.randn_like(output) for output in expected]
                grads = torch.autograd.grad(expected, leaves, wanted, allow_unused=True)
                expected = [output.detach() for output in expected]
            with torch.random.fork_rng(devices):
                other = next(iter(self._replays.values()), None)
                replay = CapturedTraining(forward, image, leaves, self._pool, other)
            restore_buffers()
            with torch.random.fork_rng(devices):
                outputs = replay.forward(image)
                got = replay.backward(wanted)
            is_right = (
                _are_near(outputs, expected)
                and [g is None for g in got] == [g is None for g in grads]
                and _are_near(
                    [g for g in got if g is not None], [g for g in grads if g is not None]
                )
            )
        finally:
            restore_buffers()
        return (replay, None) if is_right else (None, 'its results differ from those of launches')

    def _is_free(self) -> bool:
        return self._pending is None or self._pending() is None

    def _run(self, replay: CapturedTraining, image: Tensor) -> tuple[Tensor, ...]:
        token = _Token()
        self._pending = weakref.ref(token)
        return _Replayed.apply(replay, token, image, *self._parameters)


class _Token:
    """Lives as long as a replayed pass waits for its backward pass."""


class _Replayed(torch.autograd.Function):
    """A backbone's replayed forward and backward pass."""

    @staticmethod
    def forward(ctx, replay, token, image, *parameters):
        ctx.replay, ctx.token = replay, token
        return tuple(output.clone() for output in replay.forward(image))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        if ctx.token is None:
            raise RuntimeError(
                'this pass of the backbone was replayed from a CUDA graph, whose backward pass '
                "runs once; build the backbone with cuda_graphs='inference' to run it again"
            )
        ctx.token = None
        return None, None, None, *ctx.replay.backward(grads)


def _forward_of(backbone: nn.Module, autocast: torch.dtype | None):
    def forward(image: Tensor) -> tuple[Tensor, ...]:
        # without autocast's cache, whose casts of weights would be of before the graph
        with torch.autocast('cuda', autocast, enabled=autocast is not None, cache_enabled=False):
            return type(backbone).forward(backbone, image)

    return forward


def _with_parameters(
    modules: tuple[nn.Module, ...],
    parameters: list[nn.Parameter],
    others: list[nn.Parameter],
    function: Callable[[Tensor], tuple[Tensor, ...]],
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A function of modules with other parameters in the place of theirs."""
    other_of = {id(p): other for p, other in zip(parameters, others)}
    places = [
        (module._parameters, name, p)
        for module in modules
        for name, p in module._parameters.items()
        if id(p) in other_of
    ]

    def run(image: Tensor) -> tuple[Tensor, ...]:
        try:
            for owned, name, p in places:
                owned[name] = other_of[id(p)]
            return function(image)
        finally:
            for owned, name, p in places:
                owned[name] = p

    return run


def _first_line_of_first(error: BaseException) -> str:
    """What went wrong first: ending a recording that failed raises again."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).strip() or repr(error)).splitlines()[0]


def _are_near(got, expected) -> bool:
    return all(
        torch.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE * other.abs().max().item())
        for one, other in zip(got, expected)
    )


def _can_be_recorded(modules: tuple[nn.Module, ...], image: Tensor) -> bool:
    """Whether all is launched by kernels that take graphs, and nobody watches a part."""
    return not any(map(is_watched, modules[1:])) and all(
        module.resolve_backend(image) == 'triton'
        for module in modules
        if isinstance(module, GroupedSSM)
    )
