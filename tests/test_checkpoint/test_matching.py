"""Comparing a checkpoint with a model."""

import pytest
import torch
from torch import nn

from groupmamba_mm.checkpoint import (
    CheckpointError,
    ExpectedKeys,
    expected_unused_keys,
    match_state_dict,
)
from groupmamba_mm.checkpoint.matching import require_share, without_prefix


def make_model(classes=3):
    model = nn.Module()
    model.backbone = nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10))
    model.head = nn.Linear(10, classes)
    return model


def test_the_same_model_matches_whole():
    report = match_state_dict(make_model().state_dict(), make_model().state_dict())
    assert report.complete and report.matched_share == 1.0
    assert len(report.matched) == 9 and '100%' in str(report)


def test_every_kind_of_difference_is_reported():
    state = make_model(5).state_dict()
    del state['backbone.0.bias']
    state['dist_head.weight'] = torch.ones(2)
    report = match_state_dict(make_model(3).state_dict(), state)
    assert report.missing == ('backbone.0.bias',)
    assert report.unexpected == ('dist_head.weight',)
    assert report.mismatched == (('head.weight', (5, 10), (3, 10)), ('head.bias', (5,), (3,)))
    # 110 + 41 of the backbone, 33 of the head; 10 missing and 33 of another shape.
    assert report.matched_share == pytest.approx((151 - 10) / (151 + 33))
    text = str(report)
    assert '5x10 in the checkpoint, 3x10 in the model' in text
    assert 'backbone.0.bias' in text and 'dist_head.weight' in text


def test_announced_keys_are_set_apart_with_their_reason():
    state = make_model().state_dict()
    for key in list(state):
        if key.startswith('head.'):
            del state[key]
    state['teacher.a'], state['teacher.b'] = torch.ones(1), torch.ones(1)
    report = match_state_dict(
        make_model().state_dict(),
        state,
        expected_missing=[ExpectedKeys(r'^head\.', 'a new head is trained')],
        expected_unused=[ExpectedKeys(r'^teacher\.', 'only trained with')],
    )
    assert report.complete and report.matched_share == 1.0
    assert not report.missing and not report.unexpected
    assert dict(report.expected_missing)['head.weight'] == 'a new head is trained'
    assert '2 unused as expected (only trained with): teacher.* (2)' in str(report)


def test_many_keys_are_grouped_and_counted():
    state = {f'{a}.{b}.weight': torch.ones(1) for a in 'abcdefgh' for b in 'xyz'}
    text = str(match_state_dict({}, {**state, 'a.x.bias': torch.ones(1)}))
    assert 'a.x.* (2)' in text and 'more' in text and len(text) < 300


def test_nothing_announced_hides_an_empty_match():
    report = match_state_dict(make_model().state_dict(), {}, [ExpectedKeys('.', 'all')])
    assert report.matched_share == 0.0 and not report.complete


def test_too_little_is_refused_by_name():
    report = match_state_dict(make_model(3).state_dict(), make_model(5).state_dict())
    require_share(report, 0.8, 'other.pth')
    assert 0.8 < report.matched_share < 1
    with pytest.raises(CheckpointError, match=r'other\.pth does not fit.*head\.weight'):
        require_share(report, 1.0, 'other.pth')


def test_one_means_every_tensor():
    """A missing tensor counts however small its share is."""
    model = nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1, 1))
    state = model.state_dict()
    wanted = dict(state)
    del state['1.bias']
    with pytest.raises(CheckpointError, match='99.9%'):
        require_share(match_state_dict(wanted, state), 1.0, 'file')


@pytest.mark.parametrize('wrapped', ['', 'module.', 'module.module.'])
@pytest.mark.parametrize('prefix', ['backbone', 'backbone.'])
def test_a_part_is_taken_by_its_name(wrapped, prefix):
    state = {f'{wrapped}backbone.a': 1, f'{wrapped}backbone.b.c': 2, f'{wrapped}backbones.d': 3}
    assert without_prefix(state, prefix, 'file') == {'a': 1, 'b.c': 2}
    whole = without_prefix(state, None, 'file')
    assert list(whole) == ['backbone.a', 'backbone.b.c', 'backbones.d']
    with pytest.raises(
        CheckpointError,
        match=r"begins with 'neck\.' \(the names begin with "
        r'backbone, backbones\)',
    ):
        without_prefix(state, 'neck', 'file')


def test_modules_announce_keys_below_their_own_name():
    class Backbone(nn.Linear):
        def expected_unused_keys(self):
            return (ExpectedKeys(r'^norm\.', 'no output norm'),)

    model = nn.Module()
    model.backbone = Backbone(2, 2)
    (keys,) = expected_unused_keys(model)
    assert keys.covers('backbone.norm.weight')
    assert not keys.covers('norm.weight') and not keys.covers('backbone.a.norm.weight')
    (wrapped,) = expected_unused_keys(nn.ModuleDict(dict(student=model)))
    assert wrapped.covers('student.backbone.norm.weight')
