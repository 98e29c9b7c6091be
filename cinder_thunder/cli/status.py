"""``thunder-status upgrade check``, the counterpart of ``cinder-status``.

Exit codes: 0, success; 1, a warning; 2, a failure that must be resolved before the upgrade; 255,
nothing could be checked.
"""

from __future__ import annotations

import sys
import warnings

from oslo_config import cfg

from cinder_thunder.cli.base import CINDER_CONFIG, WHERE_CINDER_IS, nothing_checked


def main(argv: list[str] | None = None) -> int:
    # Cinder imports it; nothing here uses it.
    warnings.filterwarnings("ignore", message=r"\s*Eventlet is deprecated")
    try:
        # A compute host does without a database driver.
        from oslo_upgradecheck import upgradecheck

        from cinder_thunder.cli import cloud
        from cinder_thunder.cli.doctor import upgrade
    except ModuleNotFoundError as error:
        return nothing_checked(f"it needs {error.name}, which is not installed: {WHERE_CINDER_IS}")
    config = cfg.ConfigOpts()
    cloud.register(config)
    arguments = sys.argv[1:] if argv is None else argv
    checks = upgrade.Checks(config)
    try:
        return int(upgradecheck.main(config, "cinder", checks, arguments, [CINDER_CONFIG]))
    except cfg.Error as error:
        return nothing_checked(str(error))


if __name__ == "__main__":
    sys.exit(main())
