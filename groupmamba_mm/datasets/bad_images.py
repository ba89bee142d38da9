"""Bad images in a run: named, counted, left out of their batch, and too many of them end it.

A config asks for it with ``max_bad_images = N`` at its top; 0, the default, ends a run with the
first one. mmengine's data sets would take another image at random in place of one that its
pipeline drops, and say nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

from groupmamba_mm.errors import DataError
from groupmamba_mm.extras import explain_missing

with explain_missing('groupmamba_mm.datasets.bad_images'):
    from mmengine.hooks import Hook
    from mmengine.registry import DATASETS, FUNCTIONS, HOOKS
    from mmengine.runner import Runner

#: Where a batch says which images it lost on the way to the process that trains.
KEY = 'bad_images'


class BadImage(str):
    """What stands for an image that cannot be read: the error's message."""


@DATASETS.register_module()
class SkipBadImages:
    """A data set that gives a :class:`BadImage` instead of raising; otherwise as the one inside.

    Args:
        dataset (dict): Config of the data set.
    """

    def __init__(self, dataset: dict[str, Any]) -> None:
        self.dataset = DATASETS.build(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except DataError as error:
            return BadImage(error)

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__') or name == 'dataset':  # not there yet while it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)


@FUNCTIONS.register_module()
def skip_bad_images(samples: Sequence[Any], collate: dict[str, Any]) -> dict[str, Any]:
    """Collate the good images of a batch.

    Args:
        samples: Images and :class:`BadImage`.
        collate: Config of the function that collates the good ones.

    Returns:
        Their batch, with the messages of the others under :data:`KEY` if there are any.

    Raises:
        DataError: None is good.
    """
    bad = [str(sample) for sample in samples if isinstance(sample, BadImage)]
    if len(bad) == len(samples):
        raise DataError(f'all {len(bad)} images of a batch are bad: {bad[0]}')
    options = dict(collate)
    kind = options.pop('type')
    function: Callable = FUNCTIONS.get(kind) if isinstance(kind, str) else kind
    batch = function([sample for sample in samples if not isinstance(sample, BadImage)], **options)
    if bad:
        batch[KEY] = bad
    return batch


@HOOKS.register_module()
class BadImagesHook(Hook):
    """Name bad images once each, and end the run when there are too many.

    Each process of several counts the images that it was given.

    Args:
        budget (int): So many different images may be bad.
    """

    priority = 'VERY_HIGH'

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.found: set[str] = set()

    def _before_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, mode: str = 'train'
    ) -> None:
        """Take the messages out of a batch.

        Args:
            runner (Runner): The runner.
            batch_idx (int): Number of the batch, unused.
            data_batch (dict): The batch.
            mode (str): 'train', 'val' or 'test', unused.

        Raises:
            DataError: More images are bad than the budget.
        """
        messages: list[str] = data_batch.pop(KEY, []) if isinstance(data_batch, dict) else []
        for message in dict.fromkeys(messages):
            if message in self.found:
                continue
            self.found.add(message)
            number = len(self.found)
            if number > self.budget:
                raise DataError(
                    f'{number} images are bad, and max_bad_images is {self.budget}; '
                    f'the last one: {message}'
                )
            runner.logger.warning(
                f'Left out (bad image {number}, of {self.budget} at most): {message}'
            )
