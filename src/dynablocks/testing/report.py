"""What a check found, and all findings about one thing."""

from __future__ import annotations

from dataclasses import dataclass

from dynablocks.errors import PropertyViolated


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
