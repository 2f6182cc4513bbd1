"""Print launch/constraints.txt anew from the packages of the running environment.

    bash launch/setup.sh dev
    .venv/bin/python launch/lock.py > constraints.new && mv constraints.new launch/constraints.txt

Versions only: no local builds (`+cpu`), no paths. A version that does not support the oldest Python of pyproject.toml
is pinned where it does, and pip chooses elsewhere.
"""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

OLDEST = (3, 10, 0)
NOT_PINNED = {"dist-agc", "pip"}
APART = Path(sys.prefix, "pictures")  # timm and torchvision, see launch/setup.sh
HEADER = """\
# Every package of the development environment at the version it was tested with, on Python 3.11.
# torch is pinned because a range lets pip take another build. Made by launch/lock.py."""


def marker(requires_python: str | None) -> str:
    lower = re.search(r">=\s*(3(?:\.\d+){1,2})", requires_python or "")
    version = tuple(map(int, lower[1].split("."))) if lower else ()
    if not lower or version <= OLDEST[: len(version)]:
        return ""
    return f' ; python{"_full" if len(version) == 3 else ""}_version >= "{lower[1]}"'


def main() -> None:
    pins = {}
    for found in distributions(path=[*sys.path, str(APART)]):
        name = re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower()
        if name not in NOT_PINNED:
            pins[name] = f"{name}=={found.version.split('+')[0]}{marker(found.metadata['Requires-Python'])}"
    print(HEADER, *(pins[name] for name in sorted(pins)), sep="\n")


if __name__ == "__main__":
    main()
