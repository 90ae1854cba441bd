"""Where the noise of a measured spectrum ends: the laws of noise, and rules that find its edge.

spectrum = Spectrum(eigenvalues=..., samples=...)
found = MarchenkoPasturRule(tau=0.5)(spectrum)
found.count(spectrum.eigenvalues.ravel())
"""

from dataclasses import fields
from typing import Any

from rmtkd.spectra.laws import MarchenkoPastur
from rmtkd.spectra.published import MarchenkoPasturRule
from rmtkd.spectra.spectrum import NoiseEdge, Rule, Spectrum

RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (MarchenkoPasturRule,)}
"""Every rule by name."""


def rule_named(name: str, **options: Any) -> Rule:
    """The rule of this name, with those of the options that it has."""
    rule = RULES[name]
    known = {field.name for field in fields(rule)}  # pyright: ignore[reportArgumentType]
    return rule(**{key: value for key, value in options.items() if key in known})


__all__ = ["RULES", "MarchenkoPastur", "MarchenkoPasturRule", "NoiseEdge", "Rule", "Spectrum", "rule_named"]
