"""Imports go down only: the order of docs/layout.md, read from the source."""

import ast
import functools
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "reallm"
# A room may import from its own row entry and from rows below it, never from a neighbour in its row.
ROWS = [
    ["__main__"], ["cli"], ["report"], ["analyze", "evaluate", "tune"], ["pipeline"], ["model"], ["artifact"],
    ["allocate", "fit"], ["formats"], ["decoders", "kernels"], ["errors"],
]  # fmt: skip
HEIGHT = {room: -row for row, rooms in enumerate(ROWS) for room in rooms}
FILES = [path for path in sorted(SOURCE.rglob("*.py")) if path != SOURCE / "__init__.py"]


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@functools.cache
def imported_modules(path: Path) -> set[str]:
    """Absolute names of everything that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which room is meant"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_a_room_imports_only_rooms_below_it():
    wrong = {}
    for path in FILES:
        room = room_of(path)
        ours = (name for name in imported_modules(path) if name.startswith("reallm."))
        others = {name.split(".")[1] for name in ours} - {room, "__version__"}
        if upwards := sorted(other for other in others if HEIGHT[other] >= HEIGHT[room]):
            wrong[str(path.relative_to(SOURCE))] = upwards
    assert wrong == {}


def test_only_the_model_room_imports_transformers():
    others = (path for path in FILES if room_of(path) != "model")
    wrong = [str(path) for path in others if "transformers" in {name.split(".")[0] for name in imported_modules(path)}]
    assert wrong == []


def test_every_room_on_disk_has_its_place_in_the_order():
    rooms = {room_of(path) for path in FILES}
    assert rooms <= set(HEIGHT)


def test_a_plan_is_made_without_torch():
    for path in (SOURCE / "allocate").rglob("*.py"):
        assert "torch" not in {name.split(".")[0] for name in imported_modules(path)}, path
