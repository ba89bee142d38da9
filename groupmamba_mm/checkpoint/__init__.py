"""Checkpoints: read without running code, matched with a model before anything is loaded."""

from groupmamba_mm.errors import CheckpointError

from .foreign import read_tensors
from .loading import load_all_safely, load_checkpoint_file, map_checkpoint, state_dict_of
from .matching import (
    ExpectedKeys,
    LoadReport,
    expected_unused_keys,
    load_matched,
    load_matching,
    match_state_dict,
    without_prefix,
)
from .official import convert_official, revert_to_official

__all__ = [
    'CheckpointError',
    'ExpectedKeys',
    'LoadReport',
    'convert_official',
    'expected_unused_keys',
    'load_all_safely',
    'load_checkpoint_file',
    'load_matched',
    'load_matching',
    'map_checkpoint',
    'match_state_dict',
    'read_tensors',
    'revert_to_official',
    'state_dict_of',
    'without_prefix',
]
