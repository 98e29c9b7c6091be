"""The contents of the packages, and what they install."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cinder_thunder.cli.base import WHERE_CINDER_IS
from os_brick_thunder.common import conf
from os_brick_thunder.common.state import Stack, StateFile

TREE = Path(__file__).parents[2]
#: Not part of the project: caches, and a developer's environment.
FOREIGN = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "venv", "env")
PACKAGES = {"cinder_thunder", "os_brick_thunder"}
#: The distribution; `thunder` on PyPI belongs to an unrelated project.
NAME = "openstack-thunder"
#: The folder of the migrations in the tree, and in an installation.
MIGRATIONS, INSTALLED = "alembic/", "cinder_thunder/migrations/"

#: Distributions that compute hosts do not need.
NOT_ON_COMPUTE_HOSTS = {"cinder", "sqlalchemy", "alembic", "oslo-db", "oslo-upgradecheck", "nova"}


def tool(*argv: str, cwd: Path, python: Path | str = sys.executable, path: str = "") -> str:
    """Run a Python tool.

    :param python: of an environment that has the tool; this environment has no Thunder, as
        PYTHONPATH is not passed on
    :param path: PYTHONPATH
    :returns: its output
    """
    done = run(*argv, cwd=cwd, python=python, path=path)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run(
    *argv: str, cwd: Path, python: Path | str = sys.executable, path: str = ""
) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path:
        env["PYTHONPATH"] = path
    if python != sys.executable:
        # Entry points are cached by path: keep them out of this user's cache.
        env["XDG_CACHE_HOME"] = str(cwd / "cache")
    return subprocess.run(
        [str(python), *argv], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built from it, as pip does."""
    folder = tmp_path_factory.mktemp("dist")
    shutil.copytree(TREE, folder / "tree", ignore=FOREIGN)
    tool("-m", "build", "--outdir", str(folder), "tree", cwd=folder)
    return folder


def needed(lines: Iterable[str]) -> Iterable[metadata.Distribution]:
    """The closure of these requirements, as far as it is installed here."""
    found: dict[tuple[str, str], metadata.Distribution] = {}
    todo = [(Requirement(line), "") for line in lines]
    while todo:
        requirement, of_extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": of_extra}):
            continue
        for extra in {"", *requirement.extras}:
            key = (canonicalize_name(requirement.name), extra)
            if key not in found:
                found[key] = metadata.distribution(requirement.name)
                todo += [(Requirement(line), extra) for line in found[key].requires or ()]
    return [distribution for (_, extra), distribution in found.items() if not extra]


@pytest.fixture(scope="module")
def environment(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment as on a compute host: the wheel, without extras, and its requirements.

    Those are linked from this environment instead of downloaded. pip, without an index, fails if
    one is missing; distributions that only Cinder's hosts need are not there.
    """
    environment = tmp_path_factory.mktemp("host") / "venv"
    venv.create(environment, symlinks=True)
    packages = site_packages(environment)
    (wheel,) = dist.glob("*.whl")
    (described,) = metadata.distributions(path=[str(wheel)])
    for distribution in needed(described.requires or ()):
        for file in distribution.files or ():
            if ".." not in file.parts:  # scripts and data
                link = packages / file
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(str(distribution.locate_file(file)))
    install(environment, "--no-index", str(wheel), cwd=dist)
    return environment


def install(environment: Path, *arguments: str, cwd: Path) -> None:
    pip = ("-m", "pip", f"--python={environment}", "--quiet", "--disable-pip-version-check")
    tool(*pip, "install", "--no-compile", *arguments, cwd=cwd)


def site_packages(environment: Path) -> Path:
    (found,) = environment.glob("lib/python*/site-packages")
    return found


def sources(package: str) -> set[str]:
    return {str(path.relative_to(TREE)) for path in (TREE / package).rglob("*.py")}


def test_the_wheel_has_the_product_and_nothing_else(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.startswith("openstack_thunder-")} == PACKAGES
    for package in PACKAGES:
        assert sources(package) | {f"{package}/py.typed"} <= names
    assert {name for name in names if name.startswith(INSTALLED)} == {
        name.replace(MIGRATIONS, INSTALLED) for name in migrations()
    }


def migrations() -> set[str]:
    return sources("alembic") | {f"{MIGRATIONS}script.py.mako"}


def test_every_package_is_listed() -> None:
    """setup.cfg has to name them all: ``find:`` cannot put alembic/ into cinder_thunder."""
    setup = configparser.ConfigParser()
    setup.read(TREE / "setup.cfg")
    listed = setup["options"]["packages"].split()
    found = {
        str(path.parent.relative_to(TREE)).replace("/", ".")
        for package in PACKAGES
        for path in (TREE / package).rglob("__init__.py")
    }
    own = {"cinder_thunder.migrations", "cinder_thunder.migrations.versions"}
    assert listed == sorted(found | own)


def test_the_migrations_do_not_shadow_the_library() -> None:
    assert not (TREE / "alembic/__init__.py").exists()


def test_no_message_names_a_distribution_for_pip() -> None:
    """The distributions with our packages' names on PyPI belong to others."""
    named = re.compile(r"pip install[^`\n]*\bthunder")
    texts = [
        TREE / "README.md",
        *(path for name in PACKAGES for path in (TREE / name).rglob("*.py")),
    ]
    assert not [str(path) for path in texts if named.search(path.read_text())]


def test_the_sdist_has_what_a_build_needs_and_nothing_else(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.cfg", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert sources("alembic") <= names
    assert not {"lab", "tests", "bench", "doc"} & {name.split("/")[0] for name in names}


def test_the_files_that_an_operator_copies(environment: Path) -> None:
    share = environment / "share/thunder"
    found = {str(path.relative_to(share)) for path in share.rglob("*") if path.is_file()}
    etc = {str(path.relative_to(TREE)) for path in (TREE / "etc").rglob("*") if path.is_file()}
    generators = {name for name in etc if name.endswith("config-generator.conf")}
    assert found == etc - generators


def test_a_compute_host_has_no_cinder(environment: Path) -> None:
    installed = {
        canonicalize_name(distribution.name)
        for distribution in metadata.distributions(path=[str(site_packages(environment))])
    }
    assert {NAME, "os-brick", "oslo-messaging"} <= installed
    assert not NOT_ON_COMPUTE_HOSTS & installed


@pytest.mark.parametrize(
    ("command", "argument", "said"),
    [
        ("thunder", "--version", "thunder 0.1.0\n"),
        ("thunder", "--help", "usage: thunder "),
        ("thunder-agent", "--help", "usage: thunder-agent "),
        ("thunder-failover", "--help", "usage: thunder-failover "),
        ("thunder-run", "--help", "usage: thunder-run "),
    ],
)
def test_commands(
    environment: Path, tmp_path: Path, command: str, argument: str, said: str
) -> None:
    script = str(environment / "bin" / command)
    assert tool(script, argument, cwd=tmp_path, python=environment / "bin/python").startswith(said)


def test_every_command_is_tested(environment: Path) -> None:
    (thunder,) = metadata.distributions(name=NAME, path=[str(site_packages(environment))])
    scripts = {entry.name for entry in thunder.entry_points.select(group="console_scripts")}
    assert scripts == {
        "thunder",
        "thunder-agent",
        "thunder-failover",
        "thunder-run",
        "thunder-status",
    }


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (("thunder", "image", "list"), 1, "thunder image list needs "),
        (("thunder-status", "upgrade", "check"), 255, "thunder-status: it needs "),
    ],
)
def test_what_a_compute_host_lacks(
    environment: Path, tmp_path: Path, command: tuple[str, ...], code: int, said: str
) -> None:
    script, *arguments = command
    python = environment / "bin/python"
    done = run(str(environment / "bin" / script), *arguments, cwd=tmp_path, python=python)
    assert done.returncode == code
    (line,) = done.stderr.splitlines()
    assert line.startswith(said)
    assert line.endswith(WHERE_CINDER_IS)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A virtual environment with all requirements of a Cinder host, but without Thunder."""
    environment = tmp_path / "venv"
    venv.create(environment, symlinks=True)
    here = sysconfig.get_path("purelib")
    (site_packages(environment) / "cinder.pth").write_text(f"{here}\n")
    return environment


@dataclass(frozen=True)
class Installation:
    """Thunder in one place, and how its command is started there."""

    python: Path
    thunder: tuple[str, ...]
    path: str = ""


def _into_environment(bare: Path, *arguments: str, cwd: Path) -> Installation:
    install(bare, "--no-deps", *arguments, cwd=cwd)
    return Installation(bare / "bin/python", (str(bare / "bin/thunder"),))


def from_wheel(dist: Path, bare: Path, folder: Path) -> Installation:
    return _into_environment(bare, *map(str, dist.glob("*.whl")), cwd=folder)


def from_sdist(dist: Path, bare: Path, folder: Path) -> Installation:
    return _into_environment(bare, *map(str, dist.glob("*.tar.gz")), cwd=folder)


def below_root(dist: Path, bare: Path, folder: Path) -> Installation:
    """As when a package of a Linux distribution is built."""
    (wheel,) = dist.glob("*.whl")
    where = ("--root", str(folder / "root"), "--prefix", "/usr")
    install(bare, "--no-deps", "--ignore-installed", *where, str(wheel), cwd=folder)
    (packages,) = (folder / "root/usr/lib").glob("python*/*-packages")
    return Installation(bare / "bin/python", (f"{folder}/root/usr/bin/thunder",), str(packages))


def editable(dist: Path, bare: Path, folder: Path) -> Installation:
    shutil.copytree(TREE, folder / "tree", ignore=FOREIGN)
    return _into_environment(bare, "--editable", str(folder / "tree"), cwd=folder)


def checkout(dist: Path, bare: Path, folder: Path) -> Installation:
    return Installation(bare / "bin/python", ("-m", "cinder_thunder.cli.thunder"), str(TREE))


@pytest.mark.parametrize("put", [from_wheel, from_sdist, below_root, editable, checkout])
def test_the_tables_are_made_wherever_thunder_is(
    put: Callable[[Path, Path, Path], Installation], dist: Path, bare: Path, tmp_path: Path
) -> None:
    config = tmp_path / "cinder.conf"
    config.write_text(f"[database]\nconnection = sqlite:///{tmp_path}/cinder.sqlite\n")
    found = put(dist, bare, tmp_path)

    def thunder(*arguments: str) -> str:
        command = (*found.thunder, *arguments)
        return tool(*command, cwd=tmp_path, python=found.python, path=found.path)

    upgrade = ("db", "upgrade", "--config-file", str(config))
    assert thunder(*upgrade).startswith("the tables were at revision None and are at ")
    assert thunder(*upgrade).startswith("the tables are at revision ")
    expected = "unknown" if put is checkout else "0.1.0"
    assert thunder("--version").startswith(f"thunder {expected}")


@pytest.mark.skipif(os.geteuid() != 0, reason="reads as root")
def test_stacks_of_a_compute_host(environment: Path, tmp_path: Path) -> None:
    """It needs no database, Cinder or agent, only the state file and the kernel."""
    store = StateFile(tmp_path / "state.json")
    store.put(Stack("vol-1", "stor1@thunder", "/dev/sdb", "cached", "img-1", 1, 2, 4096))
    config = tmp_path / "thunder.conf"
    config.write_text(f"[thunder]\nstate_file = {tmp_path}/state.json\n")
    listing = ("stack", "list", "--agent-config-file", str(config), "-f", "json")
    script, python = str(environment / "bin/thunder"), environment / "bin/python"
    (row,) = json.loads(tool(script, *listing, cwd=tmp_path, python=python))
    assert (row["Volume"], row["State"]) == ("vol-1", "creating, its device is not there")


def test_the_doctor_of_a_compute_host(environment: Path, tmp_path: Path) -> None:
    """It finds many faults here, but no missing Python module."""
    config = tmp_path / "thunder.conf"
    config.write_text(
        "[DEFAULT]\ntransport_url = fake://\n[thunder]\naddress = 127.0.0.1\n"
        f"pool_device = /dev/nothing\nsocket = {tmp_path}/agent.sock\n"
    )
    script, python = str(environment / "bin/thunder"), environment / "bin/python"
    command = ("doctor", "--agent-config-file", str(config), "-f", "json")
    done = run(script, *command, cwd=tmp_path, python=python)
    assert (done.returncode, done.stderr) == (1, "")
    rows = {row["Check"]: row for row in json.loads(done.stdout)}
    assert rows["address"]["Result"] == "ok"
    assert rows["cinder"]["Result"] == "skip"
    assert not [row for row in rows.values() if "ModuleNotFoundError" in row["Found"]]


def test_thunder_run(environment: Path, tmp_path: Path) -> None:
    """It runs a program with our connector in os-brick's map.

    It does not import os-brick for that, since os-brick imports eventlet, with which nova-compute
    would not start.
    """
    program = tmp_path / "program.py"
    program.write_text(
        "#!/usr/bin/env python3\n"
        "import sys\n"
        "print({'os_brick', 'eventlet'} & set(sys.modules))\n"
        "from os_brick.initiator import connector\n"
        "made = connector.InitiatorConnector.factory('ISCSI', None)\n"
        "print(sys.argv[1:], type(made).__name__)\n"
    )
    program.chmod(0o755)
    arguments = (str(environment / "bin/thunder-run"), str(program), "--config-file", "x")
    said = tool(*arguments, cwd=tmp_path, python=environment / "bin/python")
    assert said == "set()\n['--config-file', 'x'] ThunderISCSIConnector\n"


@pytest.mark.parametrize("sample", ["thunder", "cinder"])
def test_samples_are_what_the_generator_prints(
    environment: Path, tmp_path: Path, sample: str
) -> None:
    generator = f"etc/{sample}/config-generator.conf"
    committed = f"etc/{sample}/thunder.conf.sample"
    (tmp_path / generator).parent.mkdir(parents=True)
    shutil.copy(TREE / generator, tmp_path / generator)
    tool(
        *("-m", "oslo_config.generator", "--config-file", generator),
        cwd=tmp_path,
        python=environment / "bin/python",
    )
    assert (tmp_path / committed).read_text() == (TREE / committed).read_text(), (
        f"options have changed: where the tree is installed (pip install -e .), run "
        f"oslo-config-generator --config-file {generator}"
    )


def test_the_agents_sample_has_its_libraries_options() -> None:
    sample = (TREE / "etc/thunder/thunder.conf.sample").read_text()
    assert {"#transport_url = rabbit://", "#log_file = <None>"} <= set(sample.splitlines())
    assert "\n[oslo_messaging_rabbit]\n" in sample


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd-analyze here")
def test_systemd_reads_the_units(tmp_path: Path) -> None:
    """With programs that exist: those of the units exist only in an installation."""
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
    """A stop leaves its devices, and processes that its tools started; a failure restarts it."""
    agent = unit("thunder-agent.service")
    assert agent["KillMode"] == ["process"]
    assert agent["Restart"] == ["on-failure"]
    # systemd gives up after five starts within ten seconds.
    assert 5 * int(agent["RestartSec"][0]) > 10
    defaults = {option.name: option.default for option in conf.COMMON_OPTS + conf.AGENT_OPTS}
    assert Path(defaults["state_file"]).parent == Path("/var/lib", *agent["StateDirectory"])
    assert Path(defaults["socket"]).parent == Path("/run", *agent["RuntimeDirectory"])
    assert agent["StateDirectoryMode"] == agent["RuntimeDirectoryMode"] == ["0700"]


def test_the_order_of_units() -> None:
    agent, nova = unit("thunder-agent.service"), unit("nova-compute.service.d/thunder.conf")
    # They restore LIO's configuration, which would remove the agent's exports.
    assert {"target.service", "rtslib-fb-targetctl.service"} <= set(agent["After"])
    # Shutdown is in reverse order: sessions are closed after the agent has stopped.
    assert {"iscsid.service", "open-iscsi.service"} <= set(agent["After"])
    assert set(agent["Wants"]) <= set(agent["After"])
    # Nova starts after it, but neither requires it nor waits until it is ready.
    assert nova["After"] == nova["Wants"] == ["thunder-agent.service"]
    assert agent["Type"] == ["exec"]
    assert not {"Requires", "BindsTo", "PartOf"} & (set(agent) | set(nova))
    # A drop-in adds commands unless it empties the list first.
    text = (TREE / "etc/systemd/nova-compute.service.d/thunder.conf").read_text()
    assert "\nExecStart=\nExecStart=/usr/local/bin/thunder-run " in text
