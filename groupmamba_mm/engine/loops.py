"""Mixed precision: its names, and testing in it."""

from collections.abc import Sequence

import torch
from mmengine.device import get_device
from mmengine.registry import LOOPS
from mmengine.runner import TestLoop

# The name on the command line and the one that torch knows.
AMP_DTYPES = {'bf16': 'bfloat16', 'fp16': 'float16'}
# What AmpOptimWrapper takes and OptimWrapper does not.
AMP_ARGUMENTS = ('dtype', 'loss_scale', 'use_fsdp')


@LOOPS.register_module()
class AmpTestLoop(TestLoop):
    """Test in mixed precision of a chosen type.

    mmengine's own loop knows fp16 only, in which a selective scan may overflow.

    Args:
        *args: See :class:`mmengine.runner.TestLoop`.
        dtype (str): 'bfloat16' or 'float16'. Defaults to 'bfloat16'.
        **kwargs: See :class:`mmengine.runner.TestLoop`.

    Raises:
        ValueError: If the type is another one.
    """

    def __init__(self, *args, dtype: str = 'bfloat16', **kwargs) -> None:
        if dtype not in AMP_DTYPES.values():
            raise ValueError(f'dtype must be one of {list(AMP_DTYPES.values())}, got {dtype!r}')
        # fp16=True only switches the loop's own autocast on, which then takes the type set here.
        super().__init__(*args, fp16=True, **kwargs)
        self.dtype = getattr(torch, dtype)

    def run_iter(self, idx: int, data_batch: Sequence[dict]) -> None:
        """Test one batch.

        Args:
            idx (int): Number of the batch.
            data_batch (Sequence[dict]): The batch.
        """
        with torch.autocast(get_device(), dtype=self.dtype):
            super().run_iter(idx, data_batch)
