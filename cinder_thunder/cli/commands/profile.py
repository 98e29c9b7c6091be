"""``thunder image profile show|record|reset``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from cliff.show import ShowOne

from cinder_thunder.cli import names
from cinder_thunder.cli.cloud import database
from cinder_thunder.cli.commands.image import ImageCommand
from cinder_thunder.db.values import ProfileDetails
from cinder_thunder.policy import profiles
from os_brick_thunder.common.policy.profile import Profile, profiled


class ImageProfileShow(ImageCommand, ShowOne):
    """Show what boots read of an image, and in which order.

    "order" is the image from its start to its end: 0 is what a boot reads in its first tenth, 9 in
    its last, "." what it does not read. Of each boot, the oldest first: "coverage" is how much of
    what it read was in the profile of the boots before it, "waste" how much of that profile it did
    not read, "prefetch_waste" how much of what its host had fetched because of it. States: "empty",
    nothing is known yet; "live", the first boots go on; "open", further boots are recorded;
    "settled", boots agree, and one in twenty is recorded.
    """

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        found = database(parsed_args.config_file)
        image_id = names.image(found, parsed_args.image)
        (size,) = [image.size for image in found.images.all() if image.id == image_id]
        known = found.profiles.show(image_id) or ProfileDetails(profiles.EMPTY, 0, "", 0, ())
        fields = shown(image_id, size, known)
        return tuple(fields), tuple(fields.values())


def shown(image_id: str, size: int, known: ProfileDetails) -> dict[str, Any]:
    """A profile as the command prints it; sizes in bytes."""
    profile = Profile.decode(known.body, size) if known.body else None
    boots = known.boots
    fetched = [boot.wasted / boot.prefetched if boot.prefetched else None for boot in boots]
    return {
        "image": image_id,
        "state": known.state,
        "version": known.version,
        "boots": len(boots),
        "hosts": ", ".join(sorted({boot.host for boot in boots})),
        "recording": known.recorders,
        "size": size,
        "bytes": profiled(known.body, size).length,
        "coverage": _each(boot.coverage for boot in boots),
        "waste": _each(boot.waste for boot in boots),
        "prefetch_waste": _each(fetched),
        "order": profiles.strip(profile, size) if profile else "",
    }


def _each(shares: Iterable[float | None]) -> str:
    """Shares in per cent; "-" for one that is not known."""
    return ", ".join(map(profiles.percent, shares))


class ImageProfileRecord(ImageCommand):
    """Have boots of an image recorded again, until they agree: it boots in another way by now.

    The profile stays in use meanwhile.
    """

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        found = database(parsed_args.config_file)
        image_id = names.image(found, parsed_args.image)
        found.profiles.open(image_id)  # of an image without a profile all boots are recorded
        self.app.stdout.write(f"boots of image {image_id} are recorded until they agree\n")


class ImageProfileReset(ImageCommand):
    """Forget the profile of an image, and the boots that it was made of.

    Hosts that have it keep it; others fill the image from its start until a boot was recorded.
    """

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        found = database(parsed_args.config_file)
        image_id = names.image(found, parsed_args.image)
        done = found.profiles.reset(image_id)
        said = "is forgotten" if done else "was not known"
        self.app.stdout.write(f"the boot profile of image {image_id} {said}\n")
