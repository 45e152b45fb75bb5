"""Unpack a wheel and hold its files against the tracked ones: nothing is missing, nothing was added.

python .ci/check_wheel.py WHEEL FOLDER
"""

import subprocess
import sys
import zipfile
from pathlib import Path

# What images are built with is no part of the package.
RECIPES = {"Dockerfile", "build", "requirements.in", "requirements.txt"}
ROOTS = ("kaito_flows", "flows", "tasks", "presets", "containers")


def main(wheel: Path, folder: Path) -> int:
    """Return 0 when they agree, else print the difference and return 1."""
    tracked = subprocess.run(["git", "ls-files", *ROOTS], capture_output=True, text=True, check=True).stdout.split()
    packed = [name for name in tracked if Path(name).name not in RECIPES]
    wanted = {name if name.startswith("kaito_flows/") else f"kaito_flows/{name}" for name in packed}
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    for name in sorted(wanted - held):
        sys.stdout.write(f"tracked, but not in the wheel: {name}\n")
    for name in sorted(held - wanted):
        sys.stdout.write(f"in the wheel, but not tracked: {name}\n")
    return int(wanted != held)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), Path(sys.argv[2])))
