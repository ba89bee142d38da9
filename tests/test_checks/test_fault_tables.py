"""The tables of faults name tests that exist."""

import re

import pytest

from tests.conftest import REPO

#: Documents, each with the file of the tests that its tables name without one.
TABLES = {'docs/faults.md': '', 'docs/checks.md': 'test_checks/test_checks.py'}


@pytest.mark.parametrize('document', TABLES)
def test_every_fault_has_a_test_that_is_there(document):
    rows = re.findall(r'^\|.*\|$', (REPO / document).read_text(), flags=re.MULTILINE)
    rows = [row for row in rows if row.count(' | ') == 2 and 'test' in row][1:]
    assert len(rows) > 15
    for row in rows:
        file, named = TABLES[document], 0
        for name in re.findall(r'`([^`]+)`', row.rsplit(' | ', 1)[1]):
            if '/' in name or name.endswith('.py'):
                file = name if '/' in name else f'test_checks/{name}'
                assert (REPO / 'tests' / file).is_file(), row
                named += 1
            else:  # of a test, or of one of its cases
                text = (REPO / 'tests' / file).read_text()
                found = any(name in test for test in re.findall(r'def (test_\w+)', text))
                assert found or f"'{name}'" in text, f'{name} in {row}'
                named += 1
        assert named, row
