"""Lines of the sources, by folder: of a git revision, of the working tree, and the difference.

    python -m benchmarks.lines [REVISION]

REVISION: "HEAD" unless given. All lines of the .py files count, in docs those of the .md files; in the working tree
also files that git does not know yet and does not ignore.
"""

import subprocess
import sys
from collections import Counter
from pathlib import Path

SOURCES = ("scripts", "common", "data", "modules", "ops", "training")  # scripts: the files at the top
APART = ("tests", "benchmarks", "docs")


def count(folder: Path, revision: str | None) -> Counter[str]:
    """Lines by top folder, of a revision or, without one, of the working tree."""
    where = ["-e", "", revision] if revision else ["--untracked", "-e", ""]
    command = ["git", "grep", "-z", "-c", *where, "--", "*.py", "docs/*.md"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode > 1:  # 1: there are none
        sys.exit(done.stderr.strip())
    lines: Counter[str] = Counter()
    for entry in done.stdout.splitlines():
        path, number = entry.removeprefix(f"{revision}:").split("\0")
        lines[path.split("/")[0] if "/" in path else "scripts"] += int(number)
    return lines


def table(before: Counter[str], now: Counter[str], revision: str) -> str:
    """The rows of both counts, and the sum of those of the sources."""
    sums = [lines + Counter(sources=sum(lines[name] for name in SOURCES)) for lines in (before, now)]
    rows = [f"{'lines':<12}{revision[:12]:>12}{'now':>8}{'':>2}difference"]
    for name in (*SOURCES, "sources", *APART):
        old, new = (lines[name] for lines in sums)
        rows.append(f"{name:<12}{old:>12,}{new:>8,}{new - old:>+12,}")
    return "\n".join(rows)


def main() -> None:
    revision, folder = sys.argv[1] if len(sys.argv) > 1 else "HEAD", Path(__file__).parents[1]
    print(table(count(folder, revision), count(folder, None), revision))


if __name__ == "__main__":
    main()
