"""Write the installed versions to constraints.txt, so that README commands work on any day."""

from importlib.metadata import distributions
from pathlib import Path

HEADER = """\
# The versions that the tests last passed with: Python 3.11 on a CPU. `make demo`, `make test` and
# .ci/run install with them. requirements.txt keeps its ranges for your own environment, and
# `make test-latest` tests what these admit today. Written by `make constraints`; the markers leave
# a version out where it does not exist for an older Python.
"""
NOT_OURS = {"pip", "setuptools", "wheel", "gram-mini", "gram_mini"}


def main() -> None:
    lines = []
    for package in distributions():
        name = package.metadata["Name"]
        version = package.version.split("+")[0]  # 2.13.0+cpu is 2.13.0
        if name.lower() in NOT_OURS:
            continue
        python = (package.metadata["Requires-Python"] or "").replace(" ", "")
        needs = [
            minor
            for minor in range(11, 20)
            if f">=3.{minor}" in python or f">3.{minor - 1}" in python
        ]
        marker = f'; python_version >= "3.{needs[0]}"' if needs else ""
        lines.append(f"{name}=={version}{marker}")
    (Path(__file__).parent / "constraints.txt").write_text(
        HEADER + "\n".join(sorted(lines, key=str.lower)) + "\n"
    )


if __name__ == "__main__":
    main()
