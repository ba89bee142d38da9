"""Where messages go: to mmengine's logger where mmengine is in use, else to Python's logging."""

import logging
import sys


def write_log(
    message: str, level: int = logging.INFO, logger: logging.Logger | None = None
) -> None:
    """Write a message where the user sees it.

    Args:
        message: The message.
        level: Its level, as in :mod:`logging`.
        logger: None: mmengine's current one if mmengine is imported, so that a run's log is whole.
            Else the package's; it writes to stderr if nobody has set up logging.
    """
    if logger is None and 'mmengine.logging' in sys.modules:
        logger = sys.modules['mmengine.logging'].MMLogger.get_current_instance()
    elif logger is None:
        logger = logging.getLogger('groupmamba_mm')
        if not logger.hasHandlers():
            logger.addHandler(logging.StreamHandler())
            logger.setLevel(logging.INFO)
    logger.log(level, message)
