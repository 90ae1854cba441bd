"""The model folder: safetensors, JSON, a card. No pickle; it says all its shapes, and verifies itself when loaded.

docs/format.md is the specification.
"""

from rmtkd.artifact.folder import check_extra_files, load, load_weights, save, seal, ways_to_load, weights_of
from rmtkd.artifact.inspection import Inspection, inspect
from rmtkd.artifact.manifest import FORMAT, MANIFEST, is_artifact, read_manifest, vouch

__all__ = [
    "FORMAT",
    "MANIFEST",
    "Inspection",
    "check_extra_files",
    "inspect",
    "is_artifact",
    "load",
    "load_weights",
    "read_manifest",
    "save",
    "seal",
    "vouch",
    "ways_to_load",
    "weights_of",
]
