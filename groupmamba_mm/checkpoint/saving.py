"""Write a checkpoint whole or not at all."""
import os
from pathlib import Path
from typing import Any

import torch

from groupmamba_mm.errors import CheckpointError


def save_new_file(checkpoint: Any, target: str) -> None:
    """Save to a file that does not exist yet.

    Args:
        checkpoint: What :func:`torch.save` takes.
        target: The file. Its folder is made if needed.

    Raises:
        CheckpointError: If the file exists.
    """
    if Path(target).exists():
        raise CheckpointError(f'{target} exists; give another name, or remove it')
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    partial = f'{target}.partial'  # an interrupted run leaves no half checkpoint
    torch.save(checkpoint, partial)
    os.replace(partial, target)
