"""What a check found, stated in one way."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from groupmamba_mm.errors import ConfigError, DataError, UserError


@dataclass(frozen=True)
class Finding:
    """Something that a check found.

    Args:
        where: The thing: a file, a split of the data, a key of the config.
        what: What is the matter with it, with the value that was found.
        remedy: What to do, '' for a fact.
        how_many: How many images, annotations or files it is about.
        severity: 'error': a run would fail, or learn something else than was meant. 'warning': it
            may be meant. 'fact': for a report.
        error: How an error is raised.
    """

    where: str
    what: str
    remedy: str = ''
    how_many: int = 1
    severity: Literal['error', 'warning', 'fact'] = 'error'
    error: type[UserError] = DataError

    def __str__(self) -> str:
        return f'{self.where} {self.what}'.strip() + (f'; {self.remedy}' if self.remedy else '')


@dataclass
class Report:
    """The findings of all checks, in the order in which they were made."""

    findings: list[Finding] = field(default_factory=list)

    def add(self, findings: Iterable[Finding]) -> bool:
        """Take findings in, and say whether there was no error among them."""
        new = list(findings)
        known = set(self.findings)  # there may be a finding for each of many images
        self.findings += [finding for finding in dict.fromkeys(new) if finding not in known]
        return not any(finding.severity == 'error' for finding in new)

    def of(self, severity: str) -> list[Finding]:
        """List the findings of one severity."""
        return [finding for finding in self.findings if finding.severity == severity]

    def lines(self, most: int = 50) -> Iterator[str]:
        """Write facts, warnings and errors, at most so many of each."""
        for severity in ('fact', 'warning', 'error'):
            found = self.of(severity)
            yield from (f'{severity}: {finding}' for finding in found[:most])
            if len(found) > most:
                yield f'{severity}: and {len(found) - most} more'

    def require_no_error(self) -> None:
        """Raise the first error, with the number of all, as its own kind of ``UserError``."""
        errors = self.of('error')
        if errors:
            more = f' (the first of {len(errors)} errors)' if len(errors) > 1 else ''
            raise errors[0].error(f'{errors[0]}{more}')


def config_error(where: str, what: str, remedy: str) -> Finding:
    """Make an error that is about the config."""
    return Finding(where, what, remedy, error=ConfigError)


def shown(names: Iterable, most: int = 5) -> str:
    """List some names and how many more there are."""
    names = list(names)
    listed = ', '.join(map(str, names[:most]))
    return listed + (f' and {len(names) - most} more' if len(names) > most else '')


def doubles(names: Iterable) -> list:
    """List what stands several times."""
    return [name for name, count in Counter(names).items() if count > 1]
