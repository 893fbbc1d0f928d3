"""Write the installed versions to constraints.txt, so that README commands work on any day."""

import re
from importlib.metadata import distributions
from pathlib import Path

HEADER = """\
# The versions that the tests last passed with: Python 3.11 on a CPU. `make demo`, `make test` and
# .ci/run install with them. requirements.txt keeps its ranges for your own environment, and
# `make test-latest` tests what these admit today. Written by `make constraints`; the markers leave
# a version out where it does not exist for an older Python.
"""
NOT_OURS = {"pip", "setuptools", "wheel", "gram-mini", "gram_mini"}


def marker_of(requires_python: str) -> str:
    """What leaves a version out for a Python that is older than it wants; Python 3.10 is ours."""
    least = re.search(r">(=?)\s*3\.(\d+)(\.[1-9]\d*)?", requires_python)
    minor = int(least[2]) + (not least[1]) if least else 0  # >3.10 is taken for >=3.11
    if not least or minor <= 10:
        return ""
    name = "python_full_version" if least[3] else "python_version"
    return f'; {name} >= "3.{minor}{least[3] or ""}"'


def main() -> None:
    lines = []
    for package in distributions():
        name = package.metadata["Name"]
        version = package.version.split("+")[0]  # 2.13.0+cpu is 2.13.0
        if name.lower() in NOT_OURS:
            continue
        marker = marker_of(package.metadata["Requires-Python"] or "")
        lines.append(f"{name}=={version}{marker}")
    (Path(__file__).parent / "constraints.txt").write_text(
        HEADER + "\n".join(sorted(lines, key=str.lower)) + "\n"
    )


if __name__ == "__main__":
    main()
