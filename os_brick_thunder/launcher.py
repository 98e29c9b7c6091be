"""``thunder-run COMMAND [ARG…]``: runs a Python program with our connector registered.

No file of the program is changed, as with ``opentelemetry-instrument``. Typical use:
``thunder-run nova-compute --config-file /etc/nova/nova.conf``.
"""

from __future__ import annotations

import runpy
import shutil
import sys

from os_brick_thunder.register import register

USAGE = """usage: thunder-run COMMAND [ARG…]

Run a Python program with thunder's iSCSI connector registered in os-brick.
COMMAND is a Python script on the PATH or a path, or -m MODULE.

  thunder-run nova-compute --config-file /etc/nova/nova.conf
  thunder-run -m nova.cmd.compute
"""


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    register()
    if arguments[0] == "-m":
        if len(arguments) == 1:
            print("thunder-run: -m requires a module name", file=sys.stderr)
            return 2
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return 0
    script = shutil.which(arguments[0])
    if script is None:
        print(f"thunder-run: {arguments[0]}: not found on the PATH", file=sys.stderr)
        return 127
    with open(script, "rb") as file:
        first = file.readline(200)
    if not first.startswith(b"#!") or b"python" not in first:
        print(f"thunder-run: {script} is not a Python script: use -m MODULE", file=sys.stderr)
        return 126
    sys.argv = [script, *arguments[1:]]
    runpy.run_path(script, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
