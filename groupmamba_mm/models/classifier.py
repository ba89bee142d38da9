"""The classifier in plain PyTorch, with the methods that timm's users know."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from groupmamba_mm.backbones import GroupMamba
from groupmamba_mm.backbones.kernels import prepare_kernels
from groupmamba_mm.layers import init_parameters

from .heads import LinearHead, TwoLinearHead
from .hub import HubModel
from .pretrained import load_pretrained

#: The head of each family.
HEADS = {'paper': LinearHead, 'official': TwoLinearHead}
#: What ``global_pool`` may be: the family's own summary of the last stage, or none.
POOLINGS = ('avg', '')


class GroupMambaClassifier(nn.Module, HubModel):
    """Backbone, the family's summary of the last stage, and its linear head or heads.

    Parameters have the names of mmpretrain's ``ImageClassifier`` with our configs, so checkpoints
    serve both.

    Args:
        arch: See :class:`groupmamba_mm.GroupMamba`.
        num_classes: Number of classes K; 0: features (B, C4) are returned.
        in_chans: Channels of the image.
        global_pool: ``'avg'``: the family's own summary, which begins with the mean over the map;
            ``''``: the last stage's map stays a map, (B, C4, H, W), and logits are one too.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth of the last layer.
        device: Where the parameters are made. None: PyTorch's default.
        dtype: Of the parameters. None: PyTorch's default.
        **options: Of :class:`groupmamba_mm.GroupMamba`.

    Raises:
        ValueError: An option has a value outside its set.
        TypeError: An option that the backbone does not have.
    """

    def __init__(
        self,
        arch: str | dict,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        for fixed in ('in_channels', 'out_indices', 'init_cfg', 'compile_mode'):
            if fixed in options:
                raise TypeError(f'GroupMambaClassifier takes no argument {fixed!r}')
        self._options = dict(arch=arch, drop_path_rate=drop_path_rate, **options)
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        with nullcontext() if device is None else torch.device(device):
            self.backbone = GroupMamba(
                arch, in_channels=in_chans, drop_path_rate=drop_path_rate, **options
            )
            self.head_drop = nn.Dropout(drop_rate)
            dims = self.backbone.arch.embed_dims
            self.num_features = self.head_hidden_size = dims[-1]
            self._set_head(num_classes, global_pool)
            init_parameters(self)
        self.to(dtype=dtype)
        self.feature_info = [
            dict(num_chs=width, reduction=4 * 2**i, module=f'backbone.stages.{i}.{depth - 1}')
            for i, (width, depth) in enumerate(zip(dims, self.backbone.arch.depths))
        ]

    def __call__(self, image: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """:meth:`forward`, the first time after :func:`prepare_kernels`, as the backbone's own."""
        if image.is_cuda and not torch.compiler.is_compiling():
            prepare_kernels(self.backbone, image)
        return super().__call__(image, *args, **kwargs)

    def forward(self, image: Tensor) -> Tensor:
        """(B, in_chans, H, W), normalised as ImageNet, to logits (B, K)."""
        return self.forward_head(self.forward_features(image))

    def forward_features(self, image: Tensor) -> Tensor:
        """(B, in_chans, H, W) to the last stage's map (B, C4, H', W')."""
        return self.forward_intermediates(image, indices=[len(self.backbone.stages) - 1])[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify.

        Args:
            x: What :meth:`forward_features` returned.
            pre_logits: Return what the linear layers get, (B, C4).

        Returns:
            Logits (B, K), or the features (B, C4) without classes; maps without pooling.
        """
        if self.global_pool == '':
            return x if pre_logits else self.head(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.head_drop(self.backbone.summary(x.flatten(2).transpose(1, 2)))  # -> (B, L, C)
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of stages, as timm's method of that name.

        Args:
            x: Images (B, in_chans, H, W).
            indices: Stages from 0, negative ones from the end; an int n: the last n; None: all.
            norm: Without effect: there is no norm between the last stage and its pooling.
            stop_early: Leave the stages after the last one of ``indices`` out.
            output_fmt: ``'NCHW'`` or ``'NHWC'``.
            intermediates_only: Return the maps alone.

        Returns:
            The last map that was computed, (B, C, H, W), and the list of maps.
        """
        if output_fmt not in ('NCHW', 'NHWC'):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        backbone, maps = self.backbone, []
        taken = self._stage_indices(indices)
        last = max(taken) if stop_early else len(backbone.stages) - 1
        tokens, grid = backbone.stem(x)
        for i in range(last + 1):
            tokens, grid = backbone.run_stage(i, tokens, grid)
            if i in taken:
                rows = tokens.unflatten(1, grid)  # -> (B, H, W, C)
                maps.append(rows if output_fmt == 'NHWC' else rows.permute(0, 3, 1, 2).contiguous())
        if intermediates_only:
            return maps
        return tokens.unflatten(1, grid).permute(0, 3, 1, 2), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the stages asked for do not need, as timm's method of that name.

        Args:
            indices: See :meth:`forward_intermediates`.
            prune_norm: Without effect, as ``norm`` there.
            prune_head: Drop the classifier and the summary even if the last stage stays.

        Returns:
            The stages, counted from 0.
        """
        taken = self._stage_indices(indices)
        last = max(taken)
        backbone = self.backbone
        is_shorter = last < len(backbone.stages) - 1
        backbone.stages = backbone.stages[: last + 1]
        backbone.downsamples = backbone.downsamples[:last]
        if is_shorter or prune_head:
            self.num_features = self.head_hidden_size = self.feature_info[last]['num_chs']
            backbone.summary = MeanOfTokens()
            self.reset_classifier(0, '')
        return taken

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """The linear layer, or a tuple of both."""
        layers = self.head.classifiers()
        return layers[0] if len(layers) == 1 else layers

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one.

        Args:
            num_classes: Number of classes; 0: none.
            global_pool: See the class; None: as it is.
        """
        example = next(self.parameters())
        self._set_head(num_classes, self.global_pool if global_pool is None else global_pool)
        init_parameters(self.head)
        self.head.to(device=example.device, dtype=example.dtype).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each layer's activations in the backward pass, or not."""
        self.backbone.with_cp = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups for layer-wise learning rates: stem, layers one by one, the rest."""
        # a down-sampling stands between the last layer of a stage and the first of the next
        between = (r'^backbone\.downsamples\.(\d+)', (99999,))
        return dict(
            stem=r'^backbone\.stem',
            blocks=[
                between,
                (
                    r'^backbone\.stages\.(\d+)' if coarse else r'^backbone\.stages\.(\d+)\.(\d+)',
                    None,
                ),
            ],
        )

    def no_weight_decay(self) -> set[str]:
        """Parameters of two or more dimensions that are not decayed: none, as released."""
        return set()

    def load_pretrained(self, checkpoint_path: str, prefix: str = '') -> None:
        """Load weights of any origin; timm's name for it. See :func:`load_pretrained`."""
        load_pretrained(self, checkpoint_path)

    @property
    def config(self) -> dict[str, Any]:
        """See :class:`HubModel`."""
        return dict(
            self._options,
            num_classes=self.num_classes,
            in_chans=self.in_chans,
            global_pool=self.global_pool,
            drop_rate=self.drop_rate,
        )

    def _set_head(self, num_classes: int, global_pool: str) -> None:
        if global_pool not in POOLINGS:
            raise ValueError(f'global_pool must be one of {POOLINGS}, got {global_pool!r}')
        if num_classes < 0:
            raise ValueError(f'num_classes must not be negative, got {num_classes}')
        self.num_classes, self.global_pool = num_classes, global_pool
        self.head = HEADS[self.backbone.arch.family](self.num_features, num_classes)

    def _stage_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        total = len(self.backbone.stages)
        if indices is None:
            return list(range(total))
        wanted = range(total - indices, total) if isinstance(indices, int) else indices
        taken = [i + total if i < 0 else i for i in wanted]
        if not taken or not all(0 <= i < total for i in taken):
            raise ValueError(f'stages must be out of {-total} to {total - 1}, got {indices!r}')
        return taken


class MeanOfTokens(nn.Module):
    """What is left of a summary when the stage it belongs to is pruned."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) to (B, C)."""
        return x.mean(dim=1)
