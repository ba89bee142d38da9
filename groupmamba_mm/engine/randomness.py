"""Random numbers that follow from the seed, the iteration and the process alone.

Before each step of a training, and before each batch is loaded, the generators are seeded from
these three. So a training that is resumed anywhere draws what the uninterrupted one draws, without
any generator's state in the checkpoint, and however many workers load the data and for however
long they live.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from torch.utils.data import DataLoader

# What is drawn for: the last number of a seed's source.
_LOADING, _STEP = 0, 1
# Batches that can be loaded again: more than all workers prefetch.
_REMEMBERED = 1000


def seed_step(seed: int, iteration: int, rank: int) -> None:
    """Seed the generators of Python, numpy and torch, of all devices, for one training step.

    Args:
        seed (int): The run's.
        iteration (int): The step's number from the start of the training.
        rank (int): The process's number.
    """
    _seed_generators(_derived_seed(seed, iteration, rank, _STEP))


def _derived_seed(*source: int) -> int:
    return int(np.random.SeedSequence(source).generate_state(1)[0])


def _seed_generators(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    # as torch.manual_seed, which for each kind of device that is not there, or not in use, would
    # keep the call and a traceback for good
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


class SeededBatch(list):
    """Indices of a batch, with the seed of the random numbers that loading it draws.

    Args:
        indices (Sequence[int]): The indices.
        seed (int): The seed.
    """

    def __init__(self, indices: Sequence[int] = (), seed: int = 0) -> None:
        super().__init__(indices)
        self.seed = seed


class SeededBatchSampler:
    """The batches of another sampler from any position on, each with its seed.

    Batches before the position are drawn as indices and dropped: no data is loaded for them.

    Args:
        loader (DataLoader): The loader whose sampler it is.
        endless (bool): Whether to start over when its batches are used up.
    """

    def __init__(self, loader: DataLoader, endless: bool) -> None:
        self.loader = loader
        self.batch_sampler = loader.batch_sampler
        self.endless = endless
        self._given: dict[int, SeededBatch] = {}
        self.set_position(0, 0, 0)

    @classmethod
    def install(cls, loader: DataLoader, endless: bool) -> 'SeededBatchSampler':
        """Put one between a loader and its sampler, and let its data set seed itself.

        Args:
            loader (DataLoader): The loader, which has not been iterated over.
            endless (bool): As in the class.

        Returns:
            SeededBatchSampler: The sampler, whose position can be set before each iteration.
        """
        sampler = cls(loader, endless)
        # Through the dict, as torch refuses to change a loader: nothing has read this entry yet.
        vars(loader)['batch_sampler'] = sampler
        # torch fetches a batch by this name where a data set has it.
        if not isinstance(getattr(loader.dataset, '__getitems__', None), _SeededFetch):
            loader.dataset.__getitems__ = _SeededFetch(loader.dataset)
        return sampler

    def set_position(self, seed: int, iteration: int, skip: int) -> None:
        """Say where the next iteration over the loader begins.

        Args:
            seed (int): The run's.
            iteration (int): Number of the first batch from the start of the training.
            skip (int): How many of the sampler's batches are behind it.
        """
        self.seed, self.iteration, self.skip = seed, iteration, skip

    def __getattr__(self, name: str) -> Any:
        if name == 'batch_sampler':  # not set yet: while a copy is made
            raise AttributeError(name)
        return getattr(self.batch_sampler, name)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[SeededBatch]:
        batches = itertools.islice(self._all_batches(), self.skip, None)
        for iteration, indices in enumerate(batches, start=self.iteration):
            batch = SeededBatch(indices, _derived_seed(self.seed, iteration, get_rank(), _LOADING))
            self._given[iteration] = batch
            self._given.pop(iteration - _REMEMBERED, None)
            yield batch

    def load_again(self, iteration: int) -> Any:
        """Load a batch of the last steps as it was loaded for training.

        Args:
            iteration (int): Its step.

        Returns:
            Any: The batch.
        """
        return self.loader.collate_fn(self.loader.dataset.__getitems__(self._given[iteration]))

    def _all_batches(self) -> Iterator[Sequence[int]]:
        yield from self.batch_sampler
        for epoch in itertools.count(1) if self.endless else ():
            # as mmengine's loops do it
            getattr(self.batch_sampler.sampler, 'set_epoch', lambda epoch: None)(epoch)
            yield from self.batch_sampler


class _SeededFetch:
    """Load the samples of a batch with its own random numbers.

    Args:
        dataset (Dataset): Where they come from.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.fetch = getattr(dataset, '__getitems__', self._one_by_one)

    def __call__(self, indices: Sequence[int]) -> list[Any]:
        if isinstance(indices, SeededBatch):  # not those of a validation, which may share the data
            _seed_generators(indices.seed)
        return self.fetch(indices)

    def _one_by_one(self, indices: Sequence[int]) -> list[Any]:
        return [self.dataset[index] for index in indices]
