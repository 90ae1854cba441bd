"""The claims of the package's structure: imports point one way, and importing it is lean."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import rmtkd

ROOT = Path(rmtkd.__file__).parent

ORDER = [
    "errors",
    "environment",
    "seeding",
    "writing",
    "spectra",
    "covariance",
    "effective",
    "replicates",
    "batches",
    "memory",
    "calibration",
    "storage",
    "measurement",
    "energy",
    "modeling_rmtkd",
    "modeling_cifar_resnet",
    "modules",
    "families",
    "sites",
    "activations",
    "norms",
    "bases",
    "fisher",
    "levels",
    "vocabulary",
    "surgery",
    "pretrained",
    "cutting",
    "planning",
    "sensitivity",
    "distillation",
    "blending",
    "training",
    "forecast",
    "schedule",
    "checkpoint",
    "interruption",
    "progress",
    "recovering",
    "artifact",
    "reporting",
    "dry_run",
    "roles",
    "subject",
    "standing",
    "result",
    "run",
    "sizes",
    "compression",
    "conformance",
    "exports",
    "recipes",
    "teaching",
    "cli",
    "__main__",
]
"""A part of the package imports, when it is imported, only parts that stand before it. `rmtkd` itself, which re-exports
what users need, comes last. A new part finds its place here."""


def parts() -> dict[str, Path]:
    """Every module by its full name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        names = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
    return found


def module_level(tree: ast.AST) -> Iterator[ast.stmt]:
    """Statements that run on import: not those within functions or `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.stmt):
            yield node
        yield from module_level(node)


def imported(path: Path, modules: dict[str, Path]) -> set[str]:
    """Full names of the package's modules that this one imports when it is imported."""
    names = set()
    for node in module_level(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            travels = path.name.startswith("modeling_")  # transformers takes along what such a file imports beside it
            assert node.level == 0 or travels, f"{path} has a relative import"
            source = f"rmtkd.{node.module}" if node.level else node.module or ""
            # `from rmtkd import spectra` imports a module, `from rmtkd.errors import DataError` a name.
            names |= {full if (full := f"{source}.{alias.name}") in modules else source for alias in node.names}
    return names & set(modules)


def part_of(name: str) -> str:
    """`rmtkd.recipes.rows` belongs to `recipes`."""
    return name.split(".")[1] if "." in name else "rmtkd"


def test_every_part_has_its_place_in_the_order() -> None:
    assert {part_of(name) for name in parts()} - {"rmtkd"} == set(ORDER)
    assert len(set(ORDER)) == len(ORDER)


def test_imports_point_one_way() -> None:
    modules = parts()
    place = {name: i for i, name in enumerate([*ORDER, "rmtkd"])}
    wrong = [
        f"{name} imports {other}"
        for name, path in modules.items()
        for other in imported(path, modules)
        if part_of(other) != part_of(name) and place[part_of(other)] > place[part_of(name)]
    ]
    assert wrong == []


def test_no_module_imports_itself_by_a_detour() -> None:
    modules = parts()
    graph = {name: imported(path, modules) - {name} for name, path in modules.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(modules)  # raises CycleError
    assert graph["rmtkd.surgery"] >= {"rmtkd.sites", "rmtkd.bases", "rmtkd.batches"}  # the reader reads


@pytest.mark.parametrize("module", ["rmtkd", "rmtkd.cli"])
def test_importing_is_lean(module: str) -> None:
    heavy = ["transformers", "matplotlib", "datasets", "sklearn", "pyarrow", "pandas"]
    script = (
        f"import sys, {module}, torch\n"
        f"print([name for name in {heavy} if name in sys.modules], torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.strip() == "[] False"


def test_what_the_package_exports_is_there() -> None:
    for name in (
        "compress",
        "compress_sizes",
        "plan",
        "load",
        "find_sites",
        "narrow",
        "measure",
        "Plan",
        "Options",
        "Recovery",
    ):
        assert getattr(rmtkd, name).__doc__
