"""Environments made from nothing: ``python -m pytest tests/installs -m installs`` runs them."""


def pytest_collection_modifyitems(config, items):
    """Leave them out unless a marker expression names them."""
    if 'installs' in config.option.markexpr:
        return
    left = [item for item in items if item.get_closest_marker('installs')]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]
