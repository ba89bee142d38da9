"""Listing the files of a large data set in a fraction of the time."""

import os
from collections.abc import Iterator

from groupmamba_mm.extras import explain_missing

with explain_missing('groupmamba_mm.datasets.listing'):
    from mmengine.fileio import LocalBackend, register_backend


@register_backend('local', force=True, prefixes='')
class QuickLocalBackend(LocalBackend):
    """mmengine's backend of local files, which works out each file's relative path again.

    For ImageNet's 1.28 million files that takes longer than all else that its data set does.
    """

    def join_path(self, filepath: str | os.PathLike, *filepaths: str | os.PathLike) -> str:
        """Join paths, as :func:`os.path.join` does.

        Args:
            filepath (str or os.PathLike): The first part.
            *filepaths (str or os.PathLike): The others.

        Returns:
            str: The path.
        """
        if len(filepaths) == 1 and filepath and isinstance(filepath, str):
            (last,) = filepaths
            if isinstance(last, str) and filepath[-1] != os.sep and last[:1] != os.sep:
                return f'{filepath}{os.sep}{last}'  # of most of the millions
        return os.path.join(filepath, *filepaths)

    def list_dir_or_file(
        self,
        dir_path: str | os.PathLike,
        list_dir: bool = True,
        list_file: bool = True,
        suffix: str | tuple[str, ...] | None = None,
        recursive: bool = False,
    ) -> Iterator[str]:
        """List a folder, as :meth:`mmengine.fileio.LocalBackend.list_dir_or_file` does.

        Args:
            dir_path (str or os.PathLike): The folder.
            list_dir (bool): Whether to list folders. Defaults to True.
            list_file (bool): Whether to list files that are not hidden. Defaults to True.
            suffix (str or tuple[str], optional): What the files end in. Defaults to None.
            recursive (bool): Whether to list the folders in it too. Defaults to False.

        Yields:
            str: A path below the folder.

        Raises:
            TypeError: If folders are asked for with a suffix, or the suffix is none.
        """
        if list_dir and suffix is not None:
            raise TypeError('`suffix` should be None when `list_dir` is True')
        if suffix is not None and not isinstance(suffix, (str, tuple)):
            raise TypeError('`suffix` must be a string or tuple of strings')
        folders = ['']
        while folders:
            below = folders.pop()
            for entry in os.scandir(os.path.join(dir_path, below)):
                name = entry.name
                path = below + name
                if name[0] != '.' and entry.is_file():
                    if list_file and (suffix is None or path.endswith(suffix)):
                        yield path
                elif entry.is_dir():
                    if list_dir:
                        yield path
                    if recursive:
                        folders.append(f'{path}/')
