"""What checks find, one by one, and all findings about one thing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from dynablocks.errors import PropertyViolated
from dynablocks.seeding import seeded

C = TypeVar("C")


@dataclass(frozen=True)
class Finding:
    """The outcome of one check; ``message`` says what is wrong when it failed."""

    check: str
    passed: bool
    message: str = ""

    def __str__(self) -> str:
        return f"ok    {self.check}" if self.passed else f"FAIL  {self.check}: {self.message}"


@dataclass(frozen=True)
class ConformanceReport:
    """All findings about one module; print it, ask ``passed`` or ``failed``, or :meth:`require` it."""

    subject: str
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the checks that failed."""
        return tuple(f.check for f in self.findings if not f.passed)

    def require(self) -> ConformanceReport:
        """Itself when everything passed.

        Raises:
            PropertyViolated: a check failed; the sentence names the module, the check and what was found.
        """
        for finding in self.findings:
            if not finding.passed:
                raise PropertyViolated(f"{self.subject} fails the check {finding.check!r}: {finding.message}")
        return self

    def __str__(self) -> str:
        return "\n".join([self.subject, *(f"  {finding}" for finding in self.findings)])

    __repr__ = __str__


def run_checks(
    subject: str, checks: Mapping[str, Callable[[C], Iterator[str]]], case: C, seed: int, most: int | None = None
) -> ConformanceReport:
    """The findings of checks about one case, each check with the random numbers of ``seed``.

    A check gives one sentence for each thing that is wrong, of which the first ``most`` are told.
    """
    findings = []
    for name, check in checks.items():
        with seeded(seed):
            findings.append(_finding(name, check, case, most))
    return ConformanceReport(subject, tuple(findings))


def _finding(name: str, check: Callable[[C], Iterator[str]], case: C, most: int | None) -> Finding:
    """What a check finds; that it raises is a finding, too."""
    try:
        problems = list(itertools.islice(check(case), most))
    except Exception as error:
        sentence = str(error).split("\n", maxsplit=1)[0]
        problems = [f"it raised {type(error).__name__}: {sentence}"]
    return Finding(name, not problems, "; ".join(problems))
