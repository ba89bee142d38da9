"""Precompile the header that every C++ file of mmcv's operators includes, for install.sh.

    python tools/_precompile_headers.py SOURCE COMPILER FLAGS

SOURCE is mmcv's unpacked source. gcc takes the result only where its options fit those of the later
compilation, so they are put together as torch's and mmcv's build scripts do.
"""

import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from torch.utils.cpp_extension import include_paths


def main(source, compiler, flags):
    header = Path(source).resolve() / 'mmcv/ops/csrc/common/pytorch_cpp_helper.hpp'
    folders = [header.parent, *include_paths(), sysconfig.get_paths()['include']]
    options = [*shlex.split(flags), '-fPIC', '-std=c++17', *(f'-I{folder}' for folder in folders)]
    command = [*shlex.split(compiler), *options, '-x', 'c++-header', header, '-o', f'{header}.gch']
    subprocess.run(command, check=True)


if __name__ == '__main__':
    main(*sys.argv[1:])
