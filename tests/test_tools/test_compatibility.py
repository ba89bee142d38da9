"""The table of package sets, and the Pythons that are asked for."""

import compatibility
import pytest


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / 'table.md'
    row = '| 3.11 | tested | 2.11.0 | 0.26.0 | 1.0.31 | 306 passed | 50 passed | 2026-11-27 |'
    path.write_text(f'Before.\n\n{compatibility.HEAD}\n|---|\n{row}\n\nAfter.\n')
    monkeypatch.setattr(compatibility, 'TABLE', path)
    return path


@pytest.mark.parametrize('torch, libraries', [('2.11.0', '50 passed'), ('2.12.0', 'not tried')])
def test_a_row_keeps_what_was_found_with_the_same_versions(table, torch, libraries):
    compatibility.write_row(
        '3.11', 'tested', [torch, '0.26.0', '1.0.31', '307 passed', 'not tried']
    )
    compatibility.write_row('3.11', 'oldest', ['2.7.1', '', '', '1 passed', 'not tried'])
    lines = table.read_text().splitlines()
    assert lines[4].startswith('| 3.11 | oldest | 2.7.1 |')
    assert lines[5].startswith(
        f'| 3.11 | tested | {torch} | 0.26.0 | 1.0.31 | 307 passed | {libraries} | '
    )
    assert (lines[0], lines[-1], len(lines)) == ('Before.', 'After.', 8)


def test_a_python_that_does_not_start_is_missing(tmp_path, monkeypatch):
    for version, code in (('3.12', 0), ('3.13', 127)):
        command = tmp_path / f'python{version}'
        command.write_text(f'#!/bin/sh\nexit {code}\n')
        command.chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path))
    assert compatibility.missing(['3.11', '3.12', '3.13']) == ['3.11', '3.13']
