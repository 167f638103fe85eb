"""The check of an attack against a certificate."""

from __future__ import annotations

import torch

from dynablocks.errors import InvalidArgument, UnsoundResult
from dynablocks.robustness.attacks import AttackResult
from dynablocks.robustness.certificates import CertificateResult

ATTACK_RESOLUTION = 1e-5
"""Contradictions by less are none: an attack runs in float32, whose errors move a decision boundary about so far, while
the certificate is one of the network in its own arithmetic; clean images within rounding of a tie are the usual case.
"""


def check_sound(attack: AttackResult, certificate: CertificateResult) -> None:
    """Do nothing when attack and certificate agree, otherwise stop: one of the bounds is wrong.

    A sample that is correctly classified with radius r may not change its class under any perturbation shorter than r;
    hence no robust accuracy lies below the certified one. Both must come from the same images in the same order; the
    first min(n_attack, n_certificate) are compared, and differences below :data:`ATTACK_RESOLUTION` pass.

    Raises:
        UnsoundResult: a certified sample was broken; the sentence names the first.
        InvalidArgument: the labels differ, so the two were made on different data, or the radii are not in l2.

    Source:
        D2.13.
    """
    if certificate.norm != "l2":
        raise InvalidArgument(f"the attack is in l2 but the radii are in {certificate.norm}; certify in l2 to compare.")
    count = min(len(attack.labels), len(certificate.labels))
    if not torch.equal(attack.labels[:count], certificate.labels[:count]):
        raise InvalidArgument("attack and certificate were made on different images; run both on the same data set.")
    radii = torch.where(certificate.correct[:count], certificate.radii[:count], 0.0)
    norms = attack.smallest_broken_norm[:count]
    contradictions = (norms < radii - ATTACK_RESOLUTION).nonzero()
    if len(contradictions):
        first = int(contradictions[0, 0])
        raise UnsoundResult(
            f"sample {first} is certified at radius {radii[first]:.6g} but a perturbation of norm {norms[first]:.6g} "
            f"changes its class ({len(contradictions)} of {count} samples do so); a Lipschitz bound of this model is "
            "too small, so neither result may be reported."
        )
    _check_curves(attack, radii, count)


def _check_curves(attack: AttackResult, radii: torch.Tensor, count: int) -> None:
    for index, epsilon in enumerate(attack.epsilons):
        robust = int((attack.smallest_broken_epsilon_index[:count] > index).sum())
        certified = int((radii - ATTACK_RESOLUTION > epsilon).sum())
        if robust < certified:
            raise UnsoundResult(
                f"at epsilon {epsilon:.6g} {certified} of {count} samples are certified but only {robust} survive the "
                "attack; a Lipschitz bound of this model is too small, so neither result may be reported."
            )
