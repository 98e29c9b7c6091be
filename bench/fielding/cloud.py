"""The cloud as this bench uses it, and openstacksdk behind that.

The openstack command is built on openstacksdk, so whoever has it has this, too, and both take their
credentials from the same places. The command itself would not do: each call of it takes more than a
second of a core, so hundreds of servers would neither be requested at once nor looked at often.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from bench.fielding.figures import Facts

#: Everything that is created has this in its metadata, with the run's name.
TAG = "thunder-field"
#: Instead of a network's name: what Nova's API calls these.
NO_NETWORK, AUTO = "none", "auto"
#: Seconds for one request.
_REQUEST = 120.0
_GIB = 1 << 30


class CloudError(Exception):
    """A request was refused or not answered; what it says may have names and ids in it."""


class Invalid(Exception):
    """What was asked for cannot be run. Nothing was created."""


@dataclass(frozen=True)
class Wanted:
    """Names or ids of what servers are made of.

    :ivar network: :data:`NO_NETWORK` or :data:`AUTO`, too
    :ivar group: a security group; empty: the project's default one
    """

    types: tuple[str, ...]
    image: str
    flavor: str
    network: str
    gib: int
    group: str = ""


@dataclass(frozen=True)
class Seen:
    """A volume or server as the cloud lists it.

    :ivar reason: why a server is in error, as Nova says
    :ivar host: Nova's hostId of a server's host
    """

    status: str
    reason: str = ""
    host: str = ""
    addresses: tuple[str, ...] = ()


class Cloud(Protocol):
    """All raise :exc:`CloudError`. ``run`` is what everything's name begins with."""

    def check(self, wanted: Wanted) -> Facts:
        """Look everything up, and keep the ids.

        :raises Invalid: something does not exist or does not fit
        """

    def create_volume(self, run: str, kind: str) -> str:
        """Request a volume of the image; returns its id."""

    def create_server(self, run: str, number: int, volume: str) -> str:
        """Request a server that boots from a volume; returns its id."""

    def volumes(self, run: str) -> dict[str, Seen]:
        """Those of a run, by id."""

    def servers(self, run: str) -> dict[str, Seen]:
        """Those of a run, by id."""

    def delete_volume(self, volume: str) -> None:
        """Request the deletion; absent is success."""

    def delete_server(self, server: str) -> None:
        """Request the deletion; absent is success."""

    def console(self, server: str) -> str:
        """What a server has written to its console so far; empty before it has one."""


def connect() -> OpenStack:
    """Log in with the credentials of the environment.

    :raises Invalid: there is no client, there are no credentials, or they are refused
    """
    try:
        import openstack
    except ImportError:
        raise Invalid(
            "openstacksdk is missing: `pip install openstacksdk`, or use the Python that the "
            "openstack command is installed for"
        ) from None
    # Many threads ask at once: connections that its pool has no room for are closed, and that is
    # all right.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    try:
        with _translated():
            connection = openstack.connect(api_timeout=_REQUEST, app_name="bench.field")
            connection.authorize()
    except CloudError as error:
        raise Invalid(
            f"cannot log in: {error}\nSet OS_CLOUD to a cloud of clouds.yaml, or the OS_… variables"
            " of an openrc file, as for the openstack command."
        ) from None
    return OpenStack(connection)


@contextmanager
def _translated() -> Iterator[None]:
    from keystoneauth1.exceptions import ClientException
    from openstack.exceptions import SDKException

    try:
        yield
    except (SDKException, ClientException, OSError) as error:  # OSError: those of requests, too
        raise CloudError(str(error)) from error


class OpenStack:
    """A project of an OpenStack cloud."""

    def __init__(self, connection: Any) -> None:
        self._cloud = connection
        self._wanted: Wanted | None = None
        self._image = self._flavor = ""
        self._networks: Any = NO_NETWORK

    def check(self, wanted: Wanted) -> Facts:
        cloud, problems = self._cloud, list[str]()

        def find(what: str, name: str, finder: Callable[[str], Any]) -> Any:
            try:
                with _translated():
                    found = finder(name)
            except CloudError as error:
                problems.append(f"{what} {name!r}: {error}")
                return None
            if found is None:
                problems.append(f"there is no {what} {name!r}")
            return found

        image = find("image", wanted.image, lambda name: cloud.image.find_image(name))
        flavor = find("flavor", wanted.flavor, lambda name: cloud.compute.find_flavor(name))
        if wanted.network in (NO_NETWORK, AUTO):
            self._networks = wanted.network
        else:
            found = find("network", wanted.network, lambda n: cloud.network.find_network(n))
            self._networks = [{"uuid": found.id}] if found else NO_NETWORK
        if wanted.group:
            find("security group", wanted.group, lambda n: cloud.network.find_security_group(n))
        for kind in wanted.types:
            find("volume type", kind, self._find_type)
        problems += _misfits(image, wanted.gib) if image else []
        if problems:
            raise Invalid("\n".join(problems))
        self._wanted, self._image, self._flavor = wanted, image.id, flavor.id
        return Facts(
            image.size or 0,
            str(image.disk_format),
            flavor.vcpus,
            flavor.ram,
            self._versions(),
        )

    def _find_type(self, name: str) -> Any:
        # find_type() of some versions ends with an error where it should find nothing.
        types = self._cloud.block_storage.types()
        return next((each for each in types if name in (each.name, each.id)), None)

    def _versions(self) -> dict[str, str]:
        from openstack import version

        found = {"python": platform.python_version(), "openstacksdk": version.__version__}
        for name in ("compute", "block_storage"):
            with suppress(CloudError), _translated():
                data = getattr(self._cloud, name).get_endpoint_data()
                if data is not None and data.max_microversion:
                    found[f"{name} API"] = ".".join(map(str, data.max_microversion))
        return found

    def create_volume(self, run: str, kind: str) -> str:
        assert self._wanted is not None
        with _translated():
            # All have the same name: it is the only one that Cinder's list can be asked for.
            volume = self._cloud.block_storage.create_volume(
                name=run,
                size=self._wanted.gib,
                image_id=self._image,
                volume_type=kind,
                metadata={TAG: run},
            )
        return str(volume.id)

    def create_server(self, run: str, number: int, volume: str) -> str:
        assert self._wanted is not None
        root = {
            "uuid": volume,
            "source_type": "volume",
            "destination_type": "volume",
            "boot_index": 0,
            "delete_on_termination": False,
        }
        group = self._wanted.group
        with _translated():
            server = self._cloud.compute.create_server(
                name=f"{run}-{number}",
                flavor_id=self._flavor,
                networks=self._networks,
                block_device_mapping=[root],
                metadata={TAG: run},
                **({"security_groups": [{"name": group}]} if group else {}),
            )
        return str(server.id)

    def volumes(self, run: str) -> dict[str, Seen]:
        with _translated():
            every = list(self._cloud.block_storage.volumes(details=True, name=run))
        return {str(v.id): Seen(v.status) for v in every if _is_tagged(v, run)}

    def servers(self, run: str) -> dict[str, Seen]:
        with _translated():
            every = list(self._cloud.compute.servers(details=True, name=f"^{run}-"))
        return {
            str(server.id): Seen(
                server.status,
                (server.fault or {}).get("message", ""),
                server.host_id or "",
                tuple(a["addr"] for each in (server.addresses or {}).values() for a in each),
            )
            for server in every
            if _is_tagged(server, run)
        }

    def delete_volume(self, volume: str) -> None:
        with _translated():
            self._cloud.block_storage.delete_volume(volume, ignore_missing=True)

    def delete_server(self, server: str) -> None:
        with _translated():
            self._cloud.compute.delete_server(server, ignore_missing=True)

    def console(self, server: str) -> str:
        from openstack.exceptions import ConflictException, NotFoundException

        with _translated():
            try:
                answer = self._cloud.compute.get_server_console_output(server)
            except (ConflictException, NotFoundException):  # it is still starting
                return ""
        return str((answer or {}).get("output") or "")


def _is_tagged(found: Any, run: str) -> bool:
    return bool((found.metadata or {}).get(TAG) == run)


def _misfits(image: Any, gib: int) -> list[str]:
    least = max(image.min_disk or 0, -(-(image.virtual_size or 0) // _GIB))
    found = []
    if image.status != "active":
        found.append(f"the image is {image.status}, not active")
    if least > gib:
        found.append(f"the image needs a volume of {least} GiB: --size {least}")
    return found
