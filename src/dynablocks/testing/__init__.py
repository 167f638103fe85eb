"""The conformance suite: is a module, field, integrator or region what it says it is? For the library's and yours."""

from dynablocks.testing.methods import INTEGRATOR_CHECKS, check_integrator
from dynablocks.testing.regions import check_region
from dynablocks.testing.report import ConformanceReport, Finding
from dynablocks.testing.suite import CHECKS, FIELD_CHECKS, HOSTILE, check_block, check_field
from dynablocks.testing.twins import HealthyBlock, broken_twins

__all__ = [
    "CHECKS",
    "FIELD_CHECKS",
    "HOSTILE",
    "INTEGRATOR_CHECKS",
    "ConformanceReport",
    "Finding",
    "HealthyBlock",
    "broken_twins",
    "check_block",
    "check_field",
    "check_integrator",
    "check_region",
]
