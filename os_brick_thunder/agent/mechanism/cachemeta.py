"""A cache's metadata, written beforehand through cache_restore(8)."""

from __future__ import annotations

import tempfile

from os_brick_thunder.common.run import Runner, run


def restore(device: str, xml: str, runner: Runner = run) -> None:
    """Write metadata (``policy.cachemap.metadata_xml``) to a device."""
    with tempfile.NamedTemporaryFile("w", prefix="thunder-cache-", suffix=".xml") as file:
        file.write(xml)
        file.flush()
        runner(
            "cache_restore", "--quiet", "--metadata-version", "2",
            "--input", file.name, "--output", device,
        )  # fmt: skip
