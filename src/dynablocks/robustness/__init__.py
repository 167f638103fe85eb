"""Attacks, certificates and the curves that hold them against each other."""

from __future__ import annotations

from dynablocks.robustness.arithmetic import NoRoundingBound, plain_arithmetic
from dynablocks.robustness.attacks import DEFAULT_EPSILONS, LOSSES, AttackConfig, AttackResult, attack, l2_pgd
from dynablocks.robustness.certificates import CertificateResult, certified_radii, certify, generic_radii
from dynablocks.robustness.curves import PAPER_EPSILONS, Curve, auc
from dynablocks.robustness.rounding import LogitError, rounding_bound
from dynablocks.robustness.soundness import check_sound

__all__ = [
    "DEFAULT_EPSILONS",
    "LOSSES",
    "PAPER_EPSILONS",
    "AttackConfig",
    "AttackResult",
    "CertificateResult",
    "Curve",
    "LogitError",
    "NoRoundingBound",
    "attack",
    "auc",
    "certified_radii",
    "certify",
    "check_sound",
    "generic_radii",
    "l2_pgd",
    "plain_arithmetic",
    "rounding_bound",
]
