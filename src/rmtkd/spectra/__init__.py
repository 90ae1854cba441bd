"""Where the noise of a measured spectrum ends: the laws of noise, and rules that find its edge.

    spectrum = Spectrum(eigenvalues=..., samples=...)
    found = MarchenkoPasturRule(tau=0.5)(spectrum)
    found.count(spectrum.eigenvalues)

A rule is a small frozen object that looks at a `Spectrum` and answers with a `NoiseEdge`.
"""

from dataclasses import fields
from typing import Any

from rmtkd.spectra.agreement import ConsensusRule, GapRule
from rmtkd.spectra.anisotropic import AnisotropicMarchenkoPastur
from rmtkd.spectra.classical import GavishDonohoRule, ScreenotRule, TracyWidomRule
from rmtkd.spectra.laws import MarchenkoPastur
from rmtkd.spectra.matching import BulkMatchingRule
from rmtkd.spectra.parallel import ParallelAnalysisRule
from rmtkd.spectra.published import MarchenkoPasturRule
from rmtkd.spectra.replicates import ReplicateRule
from rmtkd.spectra.shares import EnergyRule, FixedRule
from rmtkd.spectra.spectrum import NoiseEdge, Rule, Spectrum

RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (
        MarchenkoPasturRule,
        ParallelAnalysisRule,
        ReplicateRule,
        BulkMatchingRule,
        ConsensusRule,
        GapRule,
        GavishDonohoRule,
        TracyWidomRule,
        ScreenotRule,
        EnergyRule,
        FixedRule,
    )
}
"""Every rule by name."""


DETECTOR = "rdpa"
"""The rule that counts what is not noise, where no rule is asked for: one of the widths that are tried."""


def rule_named(name: str, **options: Any) -> Rule:
    """The rule of this name, with those of the options that it has."""
    return RULES[name](**{key: value for key, value in options.items() if takes(name, key)})


def takes(name: str, option: str) -> bool:
    """Whether the rule of this name has this option."""
    return option in {field.name for field in fields(RULES[name])}  # pyright: ignore[reportArgumentType]


__all__ = [
    "DETECTOR",
    "RULES",
    "AnisotropicMarchenkoPastur",
    "BulkMatchingRule",
    "ConsensusRule",
    "EnergyRule",
    "FixedRule",
    "GapRule",
    "GavishDonohoRule",
    "MarchenkoPastur",
    "MarchenkoPasturRule",
    "NoiseEdge",
    "ParallelAnalysisRule",
    "ReplicateRule",
    "Rule",
    "ScreenotRule",
    "Spectrum",
    "TracyWidomRule",
    "rule_named",
    "takes",
]
