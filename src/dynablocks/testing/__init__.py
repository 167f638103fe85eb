"""The conformance suite: is a module, a field or a region what it says it is? For the library's and for yours."""

from dynablocks.testing.regions import check_region
from dynablocks.testing.report import ConformanceReport, Finding
from dynablocks.testing.suite import CHECKS, FIELD_CHECKS, HOSTILE, check_block, check_field
from dynablocks.testing.twins import HealthyBlock, broken_twins

__all__ = [
    "CHECKS",
    "FIELD_CHECKS",
    "HOSTILE",
    "ConformanceReport",
    "Finding",
    "HealthyBlock",
    "broken_twins",
    "check_block",
    "check_field",
    "check_region",
]
