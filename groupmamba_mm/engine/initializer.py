"""``init_cfg=dict(type='Pretrained', ...)`` of any module: read safely, reported, or refused."""

from inspect import unwrap

from mmengine.logging import MMLogger
from mmengine.model import PretrainedInit, update_init_info
from mmengine.registry import WEIGHT_INITIALIZERS
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from groupmamba_mm.checkpoint import (
    expected_unused_keys,
    load_checkpoint_file,
    match_state_dict,
    state_dict_of,
    without_prefix,
)
from groupmamba_mm.checkpoint.matching import BATCH_COUNTERS, log_report, require_share

#: Share of a module's elements that a checkpoint has to fill: the rest may be a new head.
MIN_SHARE = 0.8


@WEIGHT_INITIALIZERS.register_module(name='Pretrained', force=True)
class CheckedPretrainedInit(PretrainedInit):
    """mmengine's ``Pretrained``, which loads whatever fits, be it nothing, and continues.

    Args:
        checkpoint (str): A file or an address.
        prefix (str, optional): The module's place in the checkpoint, with its dot or without.
            Defaults to None, the whole checkpoint.
        map_location (str): As in :func:`torch.load`. Defaults to 'cpu'.
    """

    def __init__(
        self, checkpoint: str, prefix: str | None = None, map_location: str = 'cpu'
    ) -> None:
        super().__init__(checkpoint, prefix, map_location)

    def __call__(self, module: nn.Module) -> None:
        """Load the weights.

        Args:
            module (nn.Module): The module.

        Raises:
            CheckpointError: If the checkpoint cannot be read, has no key with the prefix, or fills
                too little of the module.
        """
        scheme, found, _ = self.checkpoint.partition('://')
        if found and scheme not in ('http', 'https', 'file'):  # torchvision://resnet50
            checkpoint = CheckpointLoader.load_checkpoint(self.checkpoint, self.map_location)
        else:
            checkpoint = load_checkpoint_file(self.checkpoint, self.map_location)
        state_dict = without_prefix(state_dict_of(checkpoint), self.prefix, self.checkpoint)
        source = self.checkpoint + (f' (prefix {self.prefix!r})' if self.prefix else '')
        expected_missing = getattr(module, 'expected_missing_keys', tuple)()
        report = match_state_dict(
            module.state_dict(),
            state_dict,
            expected_missing=[BATCH_COUNTERS, *expected_missing],
            expected_unused=expected_unused_keys(module),
        )
        log_report(report, source, MMLogger.get_current_instance())
        require_share(report, MIN_SHARE, source)
        # with its hooks, by which some modules resize what is of another size; it was compared above
        unwrap(load_state_dict)(module, state_dict, strict=False)
        if hasattr(module, '_params_init_info'):
            update_init_info(module, init_info=self._get_init_info())
