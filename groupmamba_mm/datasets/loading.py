"""Loading images, with errors that name the file."""

import re

import numpy as np

from groupmamba_mm.errors import DataError
from groupmamba_mm.extras import explain_missing

with explain_missing('groupmamba_mm.datasets.loading'):
    import mmcv
    from mmcv.transforms import LoadImageFromFile
    from mmengine import fileio
    from mmengine.registry import TRANSFORMS

_JPEG_START, _JPEG_END = b'\xff\xd8', 0xD9
_JPEG_MARKER = re.compile(rb'\xff+[^\x00\xff\xd0-\xd7]')
_JPEG_WITHOUT_LENGTH = (0x01, 0xD8)
_PNG_START, _PNG_END = b'\x89PNG', b'IEND'


@TRANSFORMS.register_module()
class CheckedLoadImageFromFile(LoadImageFromFile):
    """Load an image, or say which file is missing, empty, cut off or no image.

    It takes the place of ``LoadImageFromFile`` in the pipelines of all three libraries. A file that
    was cut off is refused too: OpenCV fills the rest with grey and continues.

    Args:
        to_float32 (bool): Whether to convert to float32, as images are that stay in 16 bits
            (``color_type='unchanged'`` or ``'anydepth'``). Defaults to False.
        color_type (str): Flag of :func:`mmcv.imfrombytes`. Defaults to 'color'.
        imdecode_backend (str): Backend of :func:`mmcv.imfrombytes`. Defaults to 'cv2'.
        backend_args (dict, optional): Where files come from, see :mod:`mmengine.fileio`.
    """

    def __init__(
        self,
        to_float32: bool = False,
        color_type: str = 'color',
        imdecode_backend: str = 'cv2',
        *,
        backend_args: dict | None = None,
    ) -> None:
        super().__init__(to_float32, color_type, imdecode_backend, backend_args=backend_args)

    def transform(self, results: dict) -> dict:
        """Load the image.

        Args:
            results (dict): With 'img_path', or with 'img' already, as mmpretrain's inferencers
                hand images over; those are left as they are.

        Returns:
            dict: The same with 'img' (H, W, C), 'img_shape' and 'ori_shape'.

        Raises:
            DataError: If the file is missing or no whole image.
        """
        if 'img' in results:
            return results
        path = results['img_path']
        try:
            content = fileio.get(path, backend_args=self.backend_args)
        except FileNotFoundError:
            # a byte order mark, for one, would not be seen
            shown = path if path.isprintable() else ascii(path)
            raise DataError(
                f'image {shown} does not exist; restore it, or take it out of the annotations'
            ) from None
        image = self._decode(path, content)
        if self.to_float32 or image.dtype == np.uint16:
            # torch and the transforms have few operations for whole numbers of 16 bits
            image = image.astype(np.float32)
        results['img'] = image
        results['img_shape'] = results['ori_shape'] = image.shape[:2]
        return results

    def _decode(self, path: str, content: bytes) -> np.ndarray:
        remedy = 'replace the file, or remove it from the data'
        size = f'{len(content)} bytes'
        if not content:
            raise DataError(f'image {path} is empty (0 bytes); {remedy}')
        if _is_cut_off(content):
            raise DataError(f'image {path} is cut off after {size}; {remedy}')
        try:
            image = mmcv.imfrombytes(content, flag=self.color_type, backend=self.imdecode_backend)
        except Exception as error:
            # Every backend has exceptions of its own for what it cannot decode.
            reason = ' '.join(str(error).split())
            raise DataError(
                f'image {path} ({size}) cannot be decoded ({reason}); {remedy}'
            ) from None
        if image is None:
            raise DataError(f'image {path} ({size}) cannot be decoded; {remedy}')
        return image


def _is_cut_off(content: bytes) -> bool:
    """Say whether a JPEG or PNG lacks its end; what follows the end does not matter."""
    if content.startswith(_JPEG_START):
        # an end mark at the end is the rule, and quicker than the walk
        return not content.endswith(b'\xff\xd9') and not _jpeg_ends(content)
    return content.startswith(_PNG_START) and _PNG_END not in content


def _jpeg_ends(content: bytes) -> bool:
    """Walk through a JPEG's segments to its end mark.

    Phones put films after it and thumbnails with an end mark of their own before it, so that
    neither the first nor the last such mark of the file tells.
    """
    position = len(_JPEG_START)
    while True:
        # in a scan's data, 0xFF is followed by 0 or a restart number; before a marker by itself
        found = _JPEG_MARKER.search(content, position)
        if found is None:
            return False
        marker, position = found[0][-1], found.end()
        if marker == _JPEG_END:
            return True
        if marker not in _JPEG_WITHOUT_LENGTH:
            position += int.from_bytes(content[position : position + 2], 'big')
