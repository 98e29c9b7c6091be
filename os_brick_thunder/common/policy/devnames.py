"""Names of the device-mapper devices of a host."""

from __future__ import annotations

from dataclasses import dataclass

PREFIX = "thunder-"
UUID_PREFIX = "THUNDER-"
VOL_PREFIX = f"{PREFIX}vol-"
FAILOVER_PREFIX = f"{PREFIX}failover-"
POOL = "thunder-pool"
POOL_METADATA = "thunder-pool-metadata"
POOL_DATA = "thunder-pool-data"
#: LV that holds the pool when a volume group is given.
POOL_LV = "thunder-pool"
#: A thin device without blocks rather than dm's "zero" target: that fails readahead, which a
#: multipath device above takes for a failed path (Linux 6.1, drivers/md/dm-zero.c).
ZERO = "thunder-zero"
ZERO_ID = 0
ZERO_LENGTH = 1 << 50


def path(name: str) -> str:
    return f"/dev/mapper/{name}"


@dataclass(frozen=True)
class VolumeNames:
    volume_id: str

    @property
    def vol(self) -> str:
        return f"{VOL_PREFIX}{self.volume_id}"

    @property
    def failover(self) -> str:
        return f"{FAILOVER_PREFIX}{self.volume_id}"

    @property
    def cached(self) -> str:
        return f"{PREFIX}cached-{self.volume_id}"

    @property
    def meta(self) -> str:
        return f"{PREFIX}meta-{self.volume_id}"

    @property
    def local(self) -> str:
        return f"{PREFIX}local-{self.volume_id}"

    @property
    def all(self) -> tuple[str, ...]:
        """All devices that a volume may have, each before those that it uses."""
        return self.vol, self.failover, self.cached, self.local, self.meta


@dataclass(frozen=True)
class ImageNames:
    image_id: str

    @property
    def base(self) -> str:
        return f"{PREFIX}base-{self.image_id}"

    @property
    def source(self) -> str:
        return f"{PREFIX}source-{self.image_id}"

    @property
    def paths(self) -> str:
        return f"{PREFIX}paths-{self.image_id}"

    @property
    def storage(self) -> str:
        return f"{PREFIX}storage-{self.image_id}"

    @property
    def export(self) -> str:
        return f"{PREFIX}export-{self.image_id}"

    def verity(self, disk: str) -> str:
        """Checks what is read of the image on another host's disk (``/dev/sdX``)."""
        return f"{PREFIX}verity-{self.image_id}-{_base(disk)}"

    def verified(self, disk: str) -> str:
        """The same, with the hash tree behind the image."""
        return f"{PREFIX}verified-{self.image_id}-{_base(disk)}"


def _base(device: str) -> str:
    return device.rpartition("/")[2]
