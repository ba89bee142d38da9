"""Random numbers that a resumed training draws as the uninterrupted one would have."""
import random

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import FUNCTIONS, HOOKS
from mmengine.runner import Runner


@HOOKS.register_module()
class EpochSeedHook(Hook):
    """Seed every process anew at the start of each epoch.

    mmengine saves no state of the random generators, so a resumed training would draw other drop
    paths, mixing weights and augmentations. Here each epoch's numbers follow from the run's seed,
    which a checkpoint holds, the epoch and the process alone, and nothing has to be saved. Every
    process draws its own.

    The workers that load data need :func:`seed_worker_by_epoch` as ``worker_init_fn`` and
    ``persistent_workers=False``, so that they begin each epoch anew too.
    """
    priority = 'VERY_HIGH'

    def before_run(self, runner: Runner) -> None:
        """Remember the seed that the sampler was made with.

        Args:
            runner (Runner): The runner, which has not resumed yet.
        """
        self._seed_before_resuming = runner.seed

    def before_train(self, runner: Runner) -> None:
        """Order the data as the run that is resumed did, and warn of workers that carry over.

        Args:
            runner (Runner): The runner.
        """
        loader = runner.train_dataloader
        # The sampler was made before the checkpoint told the seed of the run, which it takes unless
        # the config gives it another one.
        if getattr(loader.sampler, 'seed', None) == self._seed_before_resuming:
            loader.sampler.seed = runner.seed
        if getattr(loader, 'persistent_workers', False):
            runner.logger.warning(
                'train_dataloader has persistent_workers=True: its workers draw on from epoch to '
                'epoch, so a resumed training will augment its images in another way than an '
                'uninterrupted one')

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed the generators of Python, numpy and torch, of all devices.

        Args:
            runner (Runner): The runner.
        """
        # The iteration tells the parts of a training apart that is one epoch by mmengine's count.
        source = np.random.SeedSequence([runner.seed, runner.epoch, runner.iter, get_rank()])
        seed = int(source.generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


@FUNCTIONS.register_module()
def seed_worker_by_epoch(worker_id: int) -> None:
    """Seed a worker that loads data from the numbers of its process.

    mmengine's default gives a worker the same seed in every epoch.

    Args:
        worker_id (int): Its number, which the seed that torch set holds already.
    """
    seed = torch.initial_seed() % 2**32
    random.seed(seed)
    np.random.seed(seed)
