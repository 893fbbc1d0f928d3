"""Write constraints.txt, the versions that are installed, so that both README commands hold on any day (make constraints)."""

from importlib.metadata import distributions
from pathlib import Path

HEADER = """\
# The versions that the tests last passed with: Python 3.11 on a CPU. `make demo`, `make test` and .ci/run install with
# them. requirements.txt keeps its ranges for your own environment, and `make test-latest` tests what these admit today.
# Written by `make constraints`; the markers leave a version out where it does not exist for an older Python.
"""
NOT_OURS = {"pip", "setuptools", "wheel", "gram-mini", "gram_mini"}


def main() -> None:
    lines = []
    for package in distributions():
        # 2.13.0+cpu is 2.13.0
        name, version = (package.metadata["Name"], package.version.split("+")[0])
        if name.lower() in NOT_OURS:
            continue
        python = (package.metadata["Requires-Python"] or "").replace(" ", "")
        needs = [
            minor
            for minor in range(11, 20)
            if f">=3.{minor}" in python or f">3.{minor - 1}" in python
        ]
        lines.append(
            f"{name}=={version}" + (f'; python_version >= "3.{needs[0]}"' if needs else "")
        )
    (Path(__file__).parent / "constraints.txt").write_text(
        HEADER + "\n".join(sorted(lines, key=str.lower)) + "\n"
    )


if __name__ == "__main__":
    main()
