"""What a model folder is, told after all of it is verified."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmtkd import modeling_rmtkd
from rmtkd.artifact.files import WEIGHTS, read_shapes, sha256
from rmtkd.artifact.folder import CODE, Build, check_shapes, verified, ways_to_load
from rmtkd.artifact.manifest import MANIFEST, read_manifest, verify_files
from rmtkd.artifact.self_test import NOT_RUN, TOLERANCE
from rmtkd.batches import Forward
from rmtkd.environment import versions
from rmtkd.measurement import count_parameters
from rmtkd.sites import find_sites

NEEDS_BUILD = "the model's class is its maker's. Pass it: rmtkd.inspect(FOLDER, build)"


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A model folder whose files are all as they were written.

    Attributes:
        folder: where it is.
        format: of the folder.
        library: `transformers`, or `own` for a class of its maker's.
        model_class: name of the class.
        parameters: how many, tied ones once.
        bytes: of all files.
        files: how many files were verified by their SHA-256.
        loads_with: what reads it.
        code: whose the modelling file is; None where none is needed.
        widths: by name of the width, as they are now; empty for models of one's own.
        labels: class names by index.
        versions, versions_here: of the libraries that wrote it, and of those that read it.
        self_test: largest difference from the stored answers, relative to the largest; None where it was not run.
        self_test_remark: why it was not.
        provenance: what its maker wrote of it.
        unlisted: files that are there and that nobody vouches for.
    """

    folder: str
    format: int
    library: str
    model_class: str
    parameters: int
    bytes: int
    files: int
    loads_with: tuple[str, ...]
    code: str | None
    widths: dict[str, int]
    labels: dict[str, str]
    versions: dict[str, str]
    versions_here: dict[str, str]
    self_test: float | None
    self_test_remark: str | None
    provenance: dict[str, Any]
    unlisted: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """The facts in words, without the provenance."""
        yield f"{self.folder}: whole, and as it was written"
        yield f"- model: {self.model_class}, {self.parameters:,} parameters, {self.bytes / 1e6:,.2f} MB"
        yield f"- loads with: {'; '.join(self.loads_with)}"
        if self.code is not None:
            yield f"- code: {self.code}"
        if self.widths:
            yield f"- widths: {', '.join(f'{name} {width}' for name, width in self.widths.items())}"
        if self.labels:
            yield f"- labels: {', '.join(f'{index} {name}' for index, name in self.labels.items())}"
        told = f"not run: {self.self_test_remark}"
        if self.self_test is not None:
            told = f"answers differ by {self.self_test:.1e} from the stored ones, of {TOLERANCE:g} allowed"
        yield f"- self-test: {told}"
        yield f"- files: {self.files} verified by SHA-256, format {self.format}"
        if self.unlisted:
            yield f"- nobody vouches for: {', '.join(self.unlisted)} (`rmtkd seal {self.folder} FILE` does)"
        here = {name: version for name, version in self.versions_here.items() if self.versions.get(name) != version}
        yield f"- written with: {_listed(self.versions)}" + (f"; here: {_listed(here)}" if here else "")


def inspect(folder: str | Path, build: Build | None = None, *, forward: Forward | None = None) -> Inspection:
    """Verify a model folder as `rmtkd.load` does, and tell what it is.

    Args:
        folder: what `save` wrote.
        build: of a model of one's own, see `rmtkd.load`; without it the self-test is not run.
        forward: the one that the model was compressed with, if it had one of its own.

    Raises:
        ArtifactError: naming what is missing, altered or of another format.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    widths: dict[str, int] = {}
    is_own = manifest["library"] == "own"
    if is_own and build is None:
        verify_files(folder, manifest, (WEIGHTS,))
        parameters, error = _parameters(folder, manifest), None
    else:
        model, error = verified(folder, build, forward)
        parameters = count_parameters(model)
        if build is None:
            widths = {site.shares: site.width for site in find_sites(model)}
    return Inspection(
        folder=str(folder),
        format=manifest["format"],
        library=manifest["library"],
        model_class=manifest["model_class"],
        parameters=parameters,
        bytes=sum(facts["bytes"] for facts in manifest["files"].values()),
        files=len(manifest["files"]),
        loads_with=tuple(
            ways_to_load(
                manifest["model_class"], is_own=is_own, own_forward=bool(manifest["self_test"].get("own_forward"))
            )
        ),
        code=next((_whose(folder, name) for name in CODE if name in manifest["files"]), None),
        widths=widths,
        labels=manifest["labels"],
        versions=manifest["versions"],
        versions_here=versions(),
        self_test=error,
        self_test_remark=None if error is not None else manifest["self_test"].get(NOT_RUN, NEEDS_BUILD),
        provenance=manifest["provenance"],
        unlisted=tuple(sorted({path.name for path in folder.iterdir()} - {MANIFEST, *manifest["files"]})),
    )


def _parameters(folder: Path, manifest: Mapping[str, Any]) -> int:
    """The number of parameters, if the weights have the shapes that the manifest says."""
    found = read_shapes(folder / WEIGHTS)
    check_shapes(manifest["shapes"], {name: found.get(name) for name in manifest["shapes"]})
    return sum(math.prod(found[name]) for name in manifest["shapes"])


def _whose(folder: Path, name: str) -> str:
    if sha256(folder / name) == sha256(Path(modeling_rmtkd.__file__).with_name(name)):
        return "that of the installed rmtkd"
    return "not that of the installed rmtkd: read it before you pass trust_remote_code=True"


def _listed(named: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in named.items())
