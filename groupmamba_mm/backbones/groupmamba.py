"""The GroupMamba backbone."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from groupmamba_mm.checkpoint import (
    ExpectedKeys,
    load_checkpoint_file,
    load_matching,
    state_dict_of,
    without_prefix,
)
from groupmamba_mm.extras import explain_missing
from groupmamba_mm.layers import TokenNorm, init_parameters, is_watched, make_scan_plan

from .archs import FAMILIES, resolve_arch
from .kernels import prepare_kernels
from .replay import InferenceReplay, TrainingReplay

#: Share of the backbone's elements that a checkpoint given by ``init_cfg`` has to fill.
MIN_PRETRAINED_SHARE = 0.9

#: Modes of ``torch.compile`` that replay CUDA graphs.
CUDA_GRAPH_MODES = ('reduce-overhead', 'max-autotune')
#: What ``compile_mode`` may be.
COMPILE_MODES = (None, 'default', *CUDA_GRAPH_MODES)
#: What ``cuda_graphs`` may be.
GRAPHED_PASSES = ('off', 'inference', 'all')


class GroupMamba(nn.Module):
    """GroupMamba, a hierarchical state-space backbone: the paper's model and the released one.

    Four stages at strides 4, 8, 16 and 32 (rounded up), each a stack of layers that scan groups of
    channels in one direction each. Takes any input size from 1x1 up.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'`` (Table 6, Eq. 3-9), ``'official-tiny'``,
            ``'official-small'``, ``'official-base'`` (the layout of the published checkpoints), or
            a dict with ``family`` ('paper' or 'official'), ``stem_channels``, ``embed_dims``,
            ``depths`` and ``ffn_ratios``.
        in_channels: Channels of the image.
        d_state: State size N of each channel.
        num_groups: Number of groups G that the channels of a layer are split into.
        directions: Scanning directions, names out of ``'left-right'``, ``'right-left'``,
            ``'top-bottom'``, ``'bottom-top'``; group g takes ``directions[g % len(directions)]``.
            None: the family's own order of all four (the first G for fewer groups).
        share_directions: Scan every group in all of the directions, with shared parameters, and
            sum the outputs.
        channel_affinity: Whether there is channel affinity modulation (Eq. 7-9).
        drop_path_rate: Stochastic depth of the last layer; it rises linearly from 0.
        out_indices: None for a classifier: one feature vector an image. Else the stages (0 to 3)
            whose maps are returned, each through a LayerNorm of its own; nothing is built that
            they do not need, neither class block nor later stages.
        frozen_stages: -1: none; 0: the stem; n: the stem and the first n stages. Frozen parts get
            no gradient and stay in eval mode.
        norm_eval: Keep the stem's BatchNorms in eval mode during training.
        with_cp: Recompute each layer's activations in the backward pass, to save memory.
        residual_in_fp32: Whether the tokens between the layers stay in fp32 under autocast, as in
            PyTorch's own behaviour. False: they are in autocast's precision, half the bytes, and
            each layer's result is rounded.
        scan_backend: ``'torch'``, ``'reference'`` (slow), ``'triton'``, ``'mamba_ssm'``, or
            ``'auto'``: what the environment variable ``GROUPMAMBA_BACKEND`` names, else the Triton
            kernels on a GPU where they pass their self-test, else ``'torch'``. See
            :func:`groupmamba_mm.ops.explain_backend`.
        compile_mode: None, or a mode of ``torch.compile`` for training passes on a GPU, for images
            of one size, as each size is compiled separately: ``'default'``, ``'reduce-overhead'``
            (CUDA graphs: the fastest; no ``accumulative_counts``) or ``'max-autotune'`` (graphs
            too). Other passes run as without it.
        cuda_graphs: What is replayed from CUDA graphs once images of its shape have come a few
            times, up to twelve shapes: ``'off'``, ``'inference'``, or ``'all'``: training's forward
            and backward pass, too, which then keeps the memory of its activations; shapes share
            it. Passes that a graph cannot hold (hooks, ``with_cp``, ``compile_mode``, SyncBN) are
            launched as ever.
        init_cfg: mmengine's initialisation config. ``dict(type='Pretrained', checkpoint=...,
            prefix='backbone.')`` reads a checkpoint without running code in it, reports what was
            loaded and refuses one that does not fit. None: the released initialisation.

    Raises:
        ValueError: An option has a value outside its set, or widths that the groups do not divide.
    """

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        d_state: int = 1,
        num_groups: int = 4,
        directions: Sequence[str] | None = None,
        share_directions: bool = False,
        channel_affinity: bool = True,
        drop_path_rate: float = 0.0,
        out_indices: Sequence[int] | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        residual_in_fp32: bool = True,
        scan_backend: str = 'auto',
        compile_mode: str | None = None,
        cuda_graphs: str = 'all',
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__()
        self.init_cfg = init_cfg
        self.is_init = False  # mmengine initialises children that say so, once
        self.arch = resolve_arch(arch)
        family = FAMILIES[self.arch.family]
        num_stages = len(self.arch.embed_dims)
        self.in_channels = in_channels
        self.out_indices = _check_out_indices(out_indices, num_stages)
        if not -1 <= frozen_stages <= num_stages:
            raise ValueError(
                f'frozen_stages must be -1 (none) to {num_stages} (stem and all '
                f'stages), got {frozen_stages}'
            )
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate must be in [0, 1), got {drop_path_rate}')
        if d_state < 1:
            raise ValueError(f'd_state must be at least 1, got {d_state}')
        if compile_mode not in COMPILE_MODES:
            raise ValueError(f'compile_mode must be one of {COMPILE_MODES}, got {compile_mode!r}')
        if cuda_graphs not in GRAPHED_PASSES:
            raise ValueError(f'cuda_graphs must be one of {GRAPHED_PASSES}, got {cuda_graphs!r}')
        plan = make_scan_plan(num_groups, directions, share_directions, family.directions)
        for width in self.arch.embed_dims:
            if width % num_groups:
                raise ValueError(
                    f'arch {arch!r}: {width} channels cannot be divided into {num_groups} groups; '
                    'choose embed_dims that num_groups divides'
                )
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        self.residual_in_fp32 = residual_in_fp32

        dims = self.arch.embed_dims
        if self.out_indices is not None:
            dims = dims[: max(self.out_indices) + 1]
        total_depth = sum(self.arch.depths)
        drop_paths = torch.linspace(0, drop_path_rate, total_depth, device='cpu').tolist()
        options = dict(
            d_state=d_state, channel_affinity=channel_affinity, scan_backend=scan_backend
        )
        self.stem = family.stem(in_channels, self.arch.stem_channels, dims[0], scan_backend)
        self.downsamples = nn.ModuleList(
            family.downsample(width, next_width, scan_backend)
            for width, next_width in itertools.pairwise(dims)
        )
        self.stages = nn.ModuleList()
        for stage, width in enumerate(dims):
            first = sum(self.arch.depths[:stage])
            self.stages.append(
                nn.ModuleList(
                    family.block(
                        width,
                        plan,
                        self.arch.ffn_ratios[stage],
                        drop_path=drop_paths[first + i],
                        **options,
                    )
                    for i in range(self.arch.depths[stage])
                )
            )
        if self.out_indices is None:
            self.summary = family.summary(dims[-1], plan, self.arch.ffn_ratios[-1], **options)
        else:
            self.out_norms = nn.ModuleDict(
                {str(i): TokenNorm(dims[i], 1e-6, scan_backend) for i in self.out_indices}
            )
        self._freeze()
        self._replay, self._training_replay = InferenceReplay(), TrainingReplay()
        self.cuda_graphs = cuda_graphs
        self._prepared = set()  # kinds of passes whose kernels are compiled
        self.compile_mode = compile_mode
        if compile_mode is not None:
            self.compile(mode=compile_mode, dynamic=False)

    def __call__(self, image: Tensor, *args, **kwargs) -> tuple[Tensor, ...]:
        """:meth:`forward`; the first time kernels are compiled, and inference that repeats is
        replayed from a CUDA graph (:mod:`.replay`).
        """
        if image.is_cuda and not torch.compiler.is_compiling():
            prepare_kernels(self, image)
        replay = self._replay_of(image)
        if replay is not None and not is_watched(self):
            outputs = replay(self, image)
            if outputs is not None:
                return outputs
        if self.compile_mode is not None and not self._runs_compiled(image):
            return self._call_impl(image, *args, **kwargs)
        return super().__call__(image, *args, **kwargs)

    def _replay_of(self, image: Tensor) -> InferenceReplay | TrainingReplay | None:
        """What may replay this pass from a CUDA graph."""
        if (
            not image.is_cuda
            or torch.compiler.is_compiling()
            or torch.cuda.is_current_stream_capturing()
        ):
            return None
        if not self.training and not torch.is_grad_enabled():
            return self._replay if self.cuda_graphs != 'off' else None
        is_for_training = (
            self.training
            and torch.is_grad_enabled()
            and self.cuda_graphs == 'all'
            and self.compile_mode is None
            and not self.with_cp
        )
        return self._training_replay if is_for_training else None

    def _runs_compiled(self, image: Tensor) -> bool:
        """Whether ``compile_mode`` counts: a validation's last batch is smaller, and would compile
        again; on a CPU it would be minutes.
        """
        return self.training and image.is_cuda

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Compute features.

        Args:
            image: (B, in_channels, H, W), floating point.

        Returns:
            With ``out_indices``: the maps (B, C_i, H_i, W_i) of those stages. Without: a tuple of
            one tensor (B, C4).
        """
        if image.dim() != 4 or image.shape[1] != self.in_channels:
            raise ValueError(
                f'GroupMamba takes images of shape (B, {self.in_channels}, H, W), '
                f'got {tuple(image.shape)}'
            )
        maps = []
        x, grid = self.stem(image)
        for i in range(len(self.stages)):
            x, grid = self.run_stage(i, x, grid)
            if self.out_indices is not None and i in self.out_indices:
                normed = self.out_norms[str(i)](x)
                normed = normed.unflatten(1, grid).permute(0, 3, 1, 2)  # -> (B, C, H, W)
                # mmcv's operators, RoIAlign among them, misread any other memory layout
                maps.append(normed.contiguous())
        return (self.summary(x),) if self.out_indices is None else tuple(maps)

    def run_stage(self, i: int, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """One stage with the down-sampling before it.

        Args:
            i: The stage, from 0.
            x: Tokens (B, L, C) of the stage before, or of the stem.
            grid: Their (H, W).

        Returns:
            The stage's tokens (B, L', C_i) and their grid.
        """
        if i > 0:
            x, grid = self.downsamples[i - 1](x, grid)
        x = _to_stream(x, self.residual_in_fp32)
        stage = self.stages[i]
        for block, following in zip(stage, [*stage[1:], None]):
            # what a hook sees is whole
            is_last = following is None or is_watched(block) or is_watched(following)
            if self.with_cp and torch.is_grad_enabled():
                x = checkpoint(block, x, grid, is_last, use_reentrant=False)
            else:
                x = block(x, grid, is_last)
        return x, grid

    def init_weights(self) -> None:
        """Initialise as the released model, or from ``init_cfg``.

        Raises:
            CheckpointError: The checkpoint of a ``Pretrained`` init_cfg cannot be read, would run
                code, or fills less than 90 % of this backbone.
        """
        init_parameters(self)
        configs = self.init_cfg if isinstance(self.init_cfg, (list, tuple)) else [self.init_cfg]
        pretrained = [cfg for cfg in configs if cfg and 'Pretrained' in str(cfg['type'])]
        others = [cfg for cfg in configs if cfg and cfg not in pretrained]
        if others:
            with explain_missing('init_cfg of GroupMamba'):
                from mmengine.model import initialize
            initialize(self, others)
        for cfg in pretrained:  # the last word
            file, prefix = cfg['checkpoint'], cfg.get('prefix')
            weights = state_dict_of(load_checkpoint_file(file))
            load_matching(
                self,
                without_prefix(weights, prefix, file),
                source=f'{file} (prefix {prefix!r})',
                min_matched_share=MIN_PRETRAINED_SHARE,
                expected_missing=self.expected_missing_keys(),
                expected_unused=self.expected_unused_keys(),
            )
        self.is_init = True

    def expected_missing_keys(self) -> tuple[ExpectedKeys, ...]:
        """Parameters that a classification checkpoint does not have for this backbone."""
        if self.out_indices is None:
            return ()
        return (ExpectedKeys(r'^out_norms\.', 'output norms, new in a dense backbone'),)

    def expected_unused_keys(self) -> tuple[ExpectedKeys, ...]:
        """Parameters of a classification checkpoint that a dense backbone has no place for."""
        if self.out_indices is None:
            return ()
        keys = [ExpectedKeys(r'^summary\.', "the classifier's summary of the last stage")]
        last = len(self.stages)
        for i in range(last, len(self.arch.embed_dims)):
            reason = f'after stage {last}, the last one in out_indices'
            keys += [
                ExpectedKeys(rf'^stages\.{i}\.', reason),
                ExpectedKeys(rf'^downsamples\.{i - 1}\.', reason),
            ]
        return tuple(keys)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter for layer-wise learning-rate decay.

        Args:
            param_name: Full name of the parameter.
            prefix: The backbone's place in the model, such as ``'backbone.'``.

        Returns:
            (depth, number of depths): 0 for the stem, 1.. for the layers one by one (a
            down-sampling counts with the layer after it), the last for all that follows.
        """
        num_depths = sum(self.arch.depths) + 2
        if not param_name.startswith(prefix):
            return num_depths - 1, num_depths
        part, _, rest = param_name[len(prefix) :].partition('.')
        if part == 'stem':
            return 0, num_depths
        if part == 'downsamples':
            stage = int(rest.split('.')[0]) + 1
            return sum(self.arch.depths[:stage]) + 1, num_depths
        if part == 'stages':
            stage, block = (int(index) for index in rest.split('.')[:2])
            return sum(self.arch.depths[:stage]) + block + 1, num_depths
        return num_depths - 1, num_depths

    def train(self, mode: bool = True) -> 'GroupMamba':
        """Set the mode; frozen parts, and with ``norm_eval`` the BatchNorms, stay in eval mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        stages = self.stages[: self.frozen_stages]
        return [self.stem, *self.downsamples[: max(0, len(stages) - 1)], *stages]

    def _freeze(self) -> None:
        for module in self._frozen_modules():
            module.requires_grad_(False)


@torch.fx.wrap  # a symbolic tracer has no device to ask about
def _to_stream(x: Tensor, in_fp32: bool) -> Tensor:
    """The precision of the tokens between layers under autocast."""
    kind = x.device.type
    if kind == 'meta' or not torch.is_autocast_enabled(kind):  # tensors without data have none
        return x
    # a GPU's autocast leaves the norm's result in fp32, a CPU's does not
    return x.to(torch.float32 if in_fp32 else torch.get_autocast_dtype(kind))


def _check_out_indices(
    out_indices: Sequence[int] | None, num_stages: int
) -> tuple[int, ...] | None:
    if out_indices is None:
        return None
    indices = tuple(out_indices)
    if (
        not indices
        or list(indices) != sorted(set(indices))
        or not all(0 <= i < num_stages for i in indices)
    ):
        raise ValueError(
            f'out_indices must be increasing stage numbers out of 0 to '
            f'{num_stages - 1}, or None for a classifier; got {out_indices}'
        )
    return indices
