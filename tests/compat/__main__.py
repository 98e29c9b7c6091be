"""``make compat``: the driver on the newest release of every Cinder that Thunder supports.

Each has a virtual environment of its own in the lab's cache, with the os-brick of its series, and
with whatever else pip resolves for it and for setup.cfg. A minute each at first, seconds later.
"""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

TREE = Path(__file__).parents[2]
CACHE = Path(os.environ.get("THUNDER_LAB_CACHE", "/var/cache/thunder-lab"))
TOOLS = ("pytest>=8,<10", "pytest-timeout>=2.3,<3")
#: What is run: beside this folder, the tests of the driver on Cinder's real base class.
TESTS = (
    "tests/compat",
    "tests/unit/cinder_thunder/test_driver.py",
    "tests/unit/cinder_thunder/test_privileged.py",
)


@dataclass(frozen=True)
class Series:
    """A release of OpenStack: what pip is asked for.

    :ivar also: bounds that its upper constraints imply and its packages do not declare
    """

    name: str
    cinder: str
    os_brick: str
    also: tuple[str, ...] = ()


SUPPORTED = (
    # os-brick 6.11 imports oslo_utils.secretutils.md5, which oslo.utils has removed since.
    Series("2025.1", "cinder>=26,<27", "os-brick>=6.11,<6.12", ("oslo.utils<9",)),
    Series("2025.2", "cinder>=27,<28", "os-brick>=6.13,<6.14"),
    Series("2026.1", "cinder>=28,<29", "os-brick>=7.0,<7.1"),
    Series("2026.2", "cinder>=29,<30", "os-brick>=7.1,<7.2"),
)


def requirements() -> list[str]:
    """What setup.cfg requires on a host with Cinder."""
    setup = configparser.ConfigParser()
    setup.read(TREE / "setup.cfg")
    lines = [setup["options"]["install_requires"], setup["options.extras_require"]["cinder"]]
    return [line for text in lines for line in text.splitlines() if line]


def environment(series: Series) -> Path:
    """The series' virtual environment, up to date.

    :returns: its Python
    :raises subprocess.CalledProcessError: pip found no versions that fit together
    """
    folder = CACHE / f"compat-{series.name}"
    python = folder / "bin/python"
    if not python.exists():
        venv.create(folder, with_pip=True, symlinks=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    wanted = [series.cinder, series.os_brick, *series.also, *TOOLS, *requirements()]
    subprocess.run([*pip, "--upgrade", *wanted], check=True)
    return python


def passed(series: Series) -> bool:
    """Run the tests on a series, and print what they ran on."""
    try:
        python = environment(series)
    except subprocess.CalledProcessError:
        print(f"{series.name}: pip failed, see above", flush=True)
        return False
    versions = (
        "from importlib.metadata import version as v; "
        "print(f\"cinder {v('cinder')}, os-brick {v('os-brick')}\")"
    )
    found = subprocess.run([str(python), "-c", versions], capture_output=True, text=True)
    print(f"{series.name}: {found.stdout.strip()}", flush=True)
    tests = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    env = {**os.environ, "PYTHONPATH": str(TREE)}
    return subprocess.run(tests, cwd=TREE, env=env).returncode == 0


def main() -> int:
    failed = [series.name for series in SUPPORTED if not passed(series)]
    print(f"failed on {', '.join(failed)}" if failed else "passed on all", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
