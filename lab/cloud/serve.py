"""``python -m lab.cloud.serve ADDRESS PORT MODULE [ARGUMENT…]``: serve a WSGI module by waitress.

The OpenStack APIs load their configuration and parse ``sys.argv`` while their WSGI module is
imported, so it is set to the module's own arguments. Every request is logged in one line.
"""

from __future__ import annotations

import importlib
import sys

import waitress
from paste.translogger import TransLogger


def main() -> None:
    address, port, module, *arguments = sys.argv[1:]
    sys.argv = [module, *arguments]
    application = importlib.import_module(module).application
    # waitress refuses bodies above 1 GiB by default; images are larger.
    waitress.serve(
        TransLogger(application),
        host=address,
        port=int(port),
        threads=8,
        max_request_body_size=2**40,
    )


if __name__ == "__main__":
    main()
