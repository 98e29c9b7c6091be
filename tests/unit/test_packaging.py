"""What is packed, and what is there once it is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from os_brick_thunder import conf

TREE = Path(__file__).parents[2]
#: What is no part of the project: caches, and the environment of whoever works on it.
FOREIGN = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "venv", "env")
PACKAGES = {"cinder_thunder", "os_brick_thunder"}


def tool(*argv: str, cwd: Path, path: str = "") -> str:
    """Run a Python tool of this environment.

    :param path: where thunder is installed; without it there is none, not even the tree's
    :returns: its output
    """
    # Entry points are cached by path: not among the caches of this user.
    cache = {"XDG_CACHE_HOME": str(cwd / "cache")} if path else {}
    done = subprocess.run(
        [sys.executable, *argv],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **cache},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel built from that; as pip builds them."""
    folder = tmp_path_factory.mktemp("dist")
    shutil.copytree(TREE, folder / "tree", ignore=FOREIGN)
    tool("-m", "build", "--outdir", str(folder), "tree", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def prefix(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the wheel is installed; its dependencies are this environment's."""
    prefix = tmp_path_factory.mktemp("prefix")
    (wheel,) = dist.glob("*.whl")
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check", "install")
    tool(
        *pip, "--no-deps", "--no-index", "--no-compile", f"--prefix={prefix}", str(wheel), cwd=dist
    )
    return prefix


def site_packages(prefix: Path) -> str:
    (found,) = prefix.glob("lib/python*/site-packages")
    return str(found)


def sources(package: str) -> set[str]:
    return {str(path.relative_to(TREE)) for path in (TREE / package).rglob("*.py")}


def test_the_wheel_has_the_product_and_no_more(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.startswith("thunder-")} == PACKAGES
    for package in PACKAGES:
        assert sources(package) | {f"{package}/py.typed"} <= names


def test_the_sdist_has_what_a_build_needs_and_no_more(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.cfg", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert sources("alembic") <= names
    assert not {"lab", "tests", "bench", "doc"} & {name.split("/")[0] for name in names}


def test_the_files_that_an_operator_copies(prefix: Path) -> None:
    share = prefix / "share/thunder"
    found = {str(path.relative_to(share)) for path in share.rglob("*") if path.is_file()}
    migrations = sources("alembic") | {"alembic/script.py.mako"}
    etc = {str(path.relative_to(TREE)) for path in (TREE / "etc").rglob("*") if path.is_file()}
    generators = {name for name in etc if name.endswith("config-generator.conf")}
    assert found == migrations | etc - generators


@pytest.mark.parametrize(
    ("command", "argument", "said"),
    [
        ("thunder", "--version", "thunder 0.1.0\n"),
        ("thunder-agent", "--help", "usage: thunder-agent "),
    ],
)
def test_commands(prefix: Path, tmp_path: Path, command: str, argument: str, said: str) -> None:
    script = str(prefix / "bin" / command)
    assert tool(script, argument, cwd=tmp_path, path=site_packages(prefix)).startswith(said)


def test_thunder_run(prefix: Path, tmp_path: Path) -> None:
    """It is installed, and runs a program with our connector in os-brick's map.

    It has not imported os-brick for that: nova-compute would find eventlet in it, and not start.
    """
    program = tmp_path / "program.py"
    program.write_text(
        "#!/usr/bin/env python3\n"
        "import sys\n"
        "print({'os_brick', 'eventlet'} & set(sys.modules))\n"
        "from os_brick.initiator import connector\n"
        "print(sys.argv[1:], connector._connector_mapping_linux['ISCSI'])\n"
    )
    program.chmod(0o755)
    arguments = (str(prefix / "bin/thunder-run"), str(program), "--config-file", "x")
    said = tool(*arguments, cwd=tmp_path, path=site_packages(prefix))
    assert said == (
        "set()\n['--config-file', 'x'] os_brick_thunder.connector.ThunderISCSIConnector\n"
    )


@pytest.mark.parametrize("sample", ["thunder", "cinder"])
def test_samples_are_what_the_generator_prints(prefix: Path, tmp_path: Path, sample: str) -> None:
    generator = f"etc/{sample}/config-generator.conf"
    committed = f"etc/{sample}/thunder.conf.sample"
    (tmp_path / generator).parent.mkdir(parents=True)
    shutil.copy(TREE / generator, tmp_path / generator)
    tool(
        *("-m", "oslo_config.generator", "--config-file", generator),
        cwd=tmp_path,
        path=site_packages(prefix),
    )
    assert (tmp_path / committed).read_text() == (TREE / committed).read_text(), (
        f"options have changed: in an environment with thunder (pip install -e .), run "
        f"oslo-config-generator --config-file {generator}"
    )


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd-analyze here")
def test_systemd_reads_the_units(tmp_path: Path) -> None:
    """With programs that are there: those of the units are where they are installed only."""
    shutil.copytree(TREE / "etc/systemd", tmp_path, dirs_exist_ok=True)
    (tmp_path / "nova-compute.service").write_text("[Service]\nExecStart=/bin/false\n")
    for unit in (tmp_path / "thunder-agent.service", *tmp_path.glob("*.d/thunder.conf")):
        text = unit.read_text()
        assert "/usr/local/bin/thunder-" in text
        unit.write_text(re.sub(r"/usr/local/bin/[a-z-]+", "/bin/true", text))
    units = ["thunder-agent.service", "nova-compute.service"]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / unit) for unit in units)],
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, str(tmp_path) in done.stderr) == (0, False), done.stderr


def unit(name: str) -> dict[str, list[str]]:
    """The settings of a systemd unit; some are given more than once."""
    found: dict[str, list[str]] = {}
    for line in (TREE / "etc/systemd" / name).read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).extend(value.split())
    return found


def test_the_agent_restarts_under_guests() -> None:
    """What it built, and whatever its tools started, is left alone; what failed comes back."""
    agent = unit("thunder-agent.service")
    assert agent["KillMode"] == ["process"]
    assert agent["Restart"] == ["on-failure"]
    # systemd gives up on five starts in ten seconds.
    assert 5 * int(agent["RestartSec"][0]) > 10
    defaults = {option.name: option.default for option in conf.COMMON_OPTS + conf.AGENT_OPTS}
    assert Path(defaults["state_file"]).parent == Path("/var/lib", *agent["StateDirectory"])
    assert Path(defaults["socket"]).parent == Path("/run", *agent["RuntimeDirectory"])
    assert agent["StateDirectoryMode"] == agent["RuntimeDirectoryMode"] == ["0700"]


def test_the_order_of_units() -> None:
    agent, nova = unit("thunder-agent.service"), unit("nova-compute.service.d/thunder.conf")
    # Their restoring of LIO's configuration would undo the agent's exports.
    assert {"target.service", "rtslib-fb-targetctl.service"} <= set(agent["After"])
    # At shutdown the order is the reverse: no session goes while the agent works.
    assert {"iscsid.service", "open-iscsi.service"} <= set(agent["After"])
    assert set(agent["Wants"]) <= set(agent["After"])
    # Nova comes after it, and neither needs it nor waits until it is ready.
    assert nova["After"] == nova["Wants"] == ["thunder-agent.service"]
    assert agent["Type"] == ["exec"]
    assert not {"Requires", "BindsTo", "PartOf"} & (set(agent) | set(nova))
    # A drop-in adds commands unless it empties the list first.
    text = (TREE / "etc/systemd/nova-compute.service.d/thunder.conf").read_text()
    assert "\nExecStart=\nExecStart=/usr/local/bin/thunder-run " in text
