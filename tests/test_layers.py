"""Imports go down only: the order of docs/layout.md, read from the source."""

import ast
import functools
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "reallm"
# A package may import from itself and from rows below it, never from a neighbour in its row.
ROWS = [
    ["__main__"], ["cli"], ["integrations", "model"], ["analyze", "evaluate", "tuning"], ["pipeline"],
    ["hf", "calibrate"], ["source"], ["checkpoint"], ["allocate", "fit"], ["formats"], ["decoders", "kernels"],
    ["errors"],
]  # fmt: skip
# Files of one name that stand in two packages: a format's own pair, and a command's name in cli/.
PAIRS = {"formats", "fit"}
HEIGHT = {package: -row for row, packages in enumerate(ROWS) for package in packages}
FILES = [path for path in sorted(SOURCE.rglob("*.py")) if path != SOURCE / "__init__.py"]


def package_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@functools.cache
def imported_modules(path: Path) -> set[str]:
    """Absolute names of everything that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which package is meant"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_a_package_imports_only_packages_below_it():
    wrong = {}
    for path in FILES:
        package = package_of(path)
        ours = (name for name in imported_modules(path) if name.startswith("reallm."))
        others = {name.split(".")[1] for name in ours} - {package, "__version__"}
        if upwards := sorted(other for other in others if HEIGHT[other] >= HEIGHT[package]):
            wrong[str(path.relative_to(SOURCE))] = upwards
    assert wrong == {}


def test_only_packages_about_models_import_transformers():
    others = (path for path in FILES if package_of(path) not in ("source", "calibrate", "hf", "integrations"))
    wrong = [str(path) for path in others if "transformers" in {name.split(".")[0] for name in imported_modules(path)}]
    assert wrong == []


def test_every_package_on_disk_has_its_place_in_the_order():
    packages = {package_of(path) for path in FILES}
    assert packages <= set(HEIGHT)


def test_a_plan_is_made_without_torch():
    for path in (SOURCE / "allocate").rglob("*.py"):
        assert "torch" not in {name.split(".")[0] for name in imported_modules(path)}, path


def test_no_file_name_stands_in_two_packages():
    places = {}
    for path in FILES:
        if path.stem not in ("__init__", "__main__") and package_of(path) != "cli":
            places.setdefault(path.stem, set()).add(package_of(path))
    assert {stem: found for stem, found in places.items() if len(found) > 1 and found != PAIRS} == {}
