"""Which extra of this package brings which library, for errors that name it."""

from collections.abc import Iterator
from contextlib import contextmanager

from groupmamba_mm.errors import MissingExtraError

#: Each extra with the top-level modules that it brings; its requirements are in ``requirements/``.
EXTRAS = {
    'mm': ('mmcv', 'mmdet', 'mmengine', 'mmpretrain', 'mmseg'),
    'demo': ('cv2', 'matplotlib', 'sklearn'),
    'export': ('onnx', 'onnxruntime', 'onnxscript'),
    'hub': ('huggingface_hub', 'safetensors', 'timm', 'yaml'),
    'analysis': ('pytorch_grad_cam',),
    'dev': ('pytest',),
    'docs': ('mkdocs', 'mkdocstrings'),
    'mamba': ('causal_conv1d', 'mamba_ssm'),
}


@contextmanager
def explain_missing(user: str) -> Iterator[None]:
    """Turn a failed import of an optional library into an error that names its extra.

    Args:
        user: What needs the library, for the message.

    Raises:
        MissingExtraError: A library of :data:`EXTRAS` that was imported inside is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if isinstance(error, MissingExtraError):
            raise  # by a module that was imported inside, which knows better who needs it
        library = (error.name or '').partition('.')[0]
        for extra, libraries in EXTRAS.items():
            if library in libraries:
                raise MissingExtraError(
                    f'{user} needs {library}, which is not installed: '
                    f"pip install 'groupmamba-mm[{extra}]'",
                    name=error.name,
                ) from error
        raise
