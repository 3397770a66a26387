"""Which file imports which, read from the sources: folders lie above each other, no import goes up or in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = [  # each may import those before it; "." has the scripts
    "ops/triton",
    "ops",
    "common",
    "data",
    "modules/transformer",
    "modules",
    "modules/tokenizer",
    "modules/generation",
    "modules/serving",
    "training",
    ".",
]
FILES = [file for folder in FOLDERS for file in sorted((ROOT / folder).glob("*.py"))]


def imported(file: Path) -> set[Path]:
    """The project's files that a file imports anywhere, within functions and for types alone as well."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {ROOT / f"{name.replace('.', '/')}.py" for name in names} & set(FILES)


def test_every_source_lies_in_a_folder_with_a_place():
    tops = {folder.split("/")[0] for folder in FOLDERS} - {"."}
    assert {file for top in tops for file in (ROOT / top).rglob("*.py")} <= set(FILES)
    assert sum(len(imported(file)) for file in FILES) > 200  # so that the test sees them


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_import_goes_up(folder):
    below = FOLDERS[: FOLDERS.index(folder) + 1]
    for file in (ROOT / folder).glob("*.py"):
        up = [str(f.relative_to(ROOT)) for f in imported(file) if str(f.parent.relative_to(ROOT)) not in below]
        assert not up, f"{file.relative_to(ROOT)} imports {up}"


def test_no_files_import_each_other_in_a_circle():
    TopologicalSorter({file: imported(file) for file in FILES}).prepare()  # raises CycleError that names them
