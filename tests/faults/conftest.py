"""Trainings that something happens to: ``python -m pytest tests/faults -m faults`` runs them all."""

import pytest


def pytest_collection_modifyitems(config, items):
    """Leave the long ones out unless a marker expression names them."""
    if 'faults' in config.option.markexpr:
        return
    long = [item for item in items if item.get_closest_marker('faults')]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.fixture(scope='session')
def whole(tmp_path_factory):
    """The checkpoint of two uninterrupted processes."""
    from .launching import Launch, last_checkpoint

    folder = tmp_path_factory.mktemp('whole')
    launch = Launch(folder)
    assert launch.wait() == [0, 0], launch.log(0)[-3000:]
    return last_checkpoint(folder)
