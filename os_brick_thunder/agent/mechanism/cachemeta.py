"""The metadata of a new cache, written with cache_restore(8)."""

from __future__ import annotations

import tempfile

from os_brick_thunder.common.run import Runner, run


def restore(device: str, xml: str, runner: Runner = run) -> None:
    """Write metadata to a device.

    :param xml: from :func:`os_brick_thunder.agent.policy.cachemap.metadata_xml`
    :raises errors.ProcessError:
    """
    with tempfile.NamedTemporaryFile("w", prefix="thunder-cache-", suffix=".xml") as file:
        file.write(xml)
        file.flush()
        runner(
            "cache_restore", "--quiet", "--metadata-version", "2",
            "--input", file.name, "--output", device,
        )  # fmt: skip
