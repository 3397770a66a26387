"""Lines of a small repository, against what was written into it."""

import subprocess
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.lines import count, table


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=folder, check=True)


def write(folder: Path, name: str, lines: int) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n" * lines)


@pytest.fixture
def repository(tmp_path) -> Path:
    git(tmp_path, "init", "--quiet")
    files = {"train.py": 3, "data/a.py": 5, "data/deep/b.py": 2, "tests/test_a.py": 7, "docs/a.md": 4, "empty.py": 0}
    for name, lines in (files | {"README.md": 9, "data/a.csv": 11, ".gitignore": 0}).items():
        write(tmp_path, name, lines)
    (tmp_path / ".gitignore").write_text("out\n")
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    return tmp_path


def test_lines_of_a_revision_and_of_the_working_tree(repository):
    first = {"scripts": 3, "data": 7, "tests": 7, "docs": 4}
    assert count(repository, "HEAD") == count(repository, None) == first
    write(repository, "data/a.py", 1)
    write(repository, "modules/new file.py", 6)
    write(repository, "out/ignored.py", 50)
    (repository / "train.py").unlink()
    assert count(repository, "HEAD") == first
    assert count(repository, None) == {"data": 3, "modules": 6, "tests": 7, "docs": 4}


def test_the_table_adds_up_the_sources_and_shows_the_difference():
    before, now = Counter(scripts=3, data=1007, tests=7), Counter(data=3, modules=6, tests=7)
    cells = {row.split()[0]: row.split()[1:] for row in table(before, now, "HEAD").splitlines()}
    assert cells["data"] == ["1,007", "3", "-1,004"] and cells["sources"] == ["1,010", "9", "-1,001"]
    assert cells["modules"] == ["0", "6", "+6"] and cells["tests"] == ["7", "7", "+0"] and cells["docs"][-1] == "+0"


def test_a_revision_that_is_not_there_is_named(repository):
    with pytest.raises(SystemExit, match="nothing"):
        count(repository, "nothing")
