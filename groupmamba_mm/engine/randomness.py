"""Random numbers that a resumed training draws as the uninterrupted one would have."""
import random
from typing import Any, List, Optional, Sequence

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.utils.data import Dataset


@HOOKS.register_module()
class EpochSeedHook(Hook):
    """Seed every process anew at each iteration, and its workers at each batch of an epoch.

    mmengine saves no state of the random generators, so a resumed training would draw other drop
    paths, mixing weights and augmentations. Here the numbers of an iteration follow from the run's
    seed, which a checkpoint holds, the iteration and the process alone; those of a batch in the
    workers from the seed, the epoch, the process and the batch's indices. So nothing has to be
    saved, the number of workers has no influence, and they may live on between epochs.

    A loop that counts iterations has one epoch, over which its workers draw on.
    """
    priority = 'VERY_HIGH'
    _fetch: Optional['SeededFetch'] = None

    def before_run(self, runner: Runner) -> None:
        """Remember the seed that the sampler was made with.

        Args:
            runner (Runner): The runner, which has not resumed yet.
        """
        self._seed_before_resuming = runner.seed

    def before_train(self, runner: Runner) -> None:
        """Order the data as the run that is resumed did, and have the workers seeded.

        Args:
            runner (Runner): The runner.
        """
        loader = runner.train_dataloader
        # The sampler was made before the checkpoint told the seed of the run, which it takes unless
        # the config gives it another one.
        if getattr(loader.sampler, 'seed', None) == self._seed_before_resuming:
            loader.sampler.seed = runner.seed
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            self._fetch = SeededFetch(loader.dataset, runner.seed, get_rank())
            # torch's DataLoader asks a data set for a batch by this name, before it starts workers
            loader.dataset.__getitems__ = self._fetch

    def before_train_epoch(self, runner: Runner) -> None:
        """Tell the workers the epoch, and seed what is drawn before the first iteration.

        Args:
            runner (Runner): The runner.
        """
        if self._fetch is not None:
            self._fetch.epoch.fill_(runner.epoch)
        seed_generators(runner.seed, runner.iter, get_rank())

    def before_train_iter(self,
                          runner: Runner,
                          batch_idx: int,
                          data_batch: Any = None) -> None:
        """Seed the generators of Python, numpy and torch, of all devices.

        Args:
            runner (Runner): The runner.
            batch_idx (int): Number of the batch in its epoch, unused.
            data_batch (Any): The batch, unused.
        """
        seed_generators(runner.seed, runner.iter, get_rank())


class SeededFetch:
    """Read the images of a batch with random numbers of the batch's own.

    Args:
        dataset (Dataset): Where they are read from.
        seed (int): The run's.
        rank (int): Number of the process that trains.

    Attributes:
        epoch (Tensor): Shared with workers that run already; the next batch takes it.
    """

    def __init__(self, dataset: Dataset, seed: int, rank: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.rank = rank
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __call__(self, indices: Sequence[int]) -> List[Any]:
        """Read.

        Args:
            indices (Sequence[int]): Of a batch.

        Returns:
            list: What the data set has at each.
        """
        # by all indices: the same image drawn twice in an epoch is then augmented in two ways
        seed_generators(self.seed, self.epoch.item(), self.rank, *indices)
        return [self.dataset[index] for index in indices]


def seed_generators(*source: int) -> None:
    """Seed the generators of Python, numpy and torch, of all devices.

    Args:
        *source (int): Numbers of at least 0; others give other and independent seeds.
    """
    seed = int(np.random.SeedSequence(source).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
