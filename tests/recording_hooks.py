"""Imported by a config of the tests: hooks that write down what cannot be seen from outside."""

import atexit
import hashlib
from pathlib import Path

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS


def digest(network):
    """A hash of all tensors of a network, bit by bit."""
    found = hashlib.sha256()
    for key, value in network.state_dict().items():
        found.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


@HOOKS.register_module()
class TeacherHashHook(Hook):
    """Writes the hashes of the teacher before and after the training, one file a process."""

    def before_train(self, runner):
        """Remember the teacher, which has been read by now."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self.network = model.teacher.network
        self.before = digest(self.network)

    def after_train(self, runner):
        """Write both hashes."""
        file = Path(runner.work_dir) / f'teacher_hash_{runner.rank}.txt'
        file.write_text(f'{self.before} {digest(self.network)}')


@HOOKS.register_module()
class ThreadNamesHook(Hook):
    """Writes the names of the process's threads in training and at its end, one file a process."""

    def after_train(self, runner):
        """Write the names now, and once more when the command is done (Linux)."""
        file = Path(runner.work_dir).resolve() / f'threads_{runner.rank}.txt'
        in_training = self.names()
        atexit.register(lambda: file.write_text(f'{in_training}\n{self.names()}'))

    @staticmethod
    def names():
        """Names of this process's threads, in a line."""
        return ' '.join(
            sorted(file.read_text().strip() for file in Path('/proc/self/task').glob('*/comm'))
        )
