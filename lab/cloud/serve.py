"""``python -m lab.cloud.serve ADDRESS PORT MODULE [ARGUMENT…]``: a WSGI module under waitress.

The OpenStack APIs load their configuration while their WSGI module is imported and parse
``sys.argv`` then, so that must be the module's own. Every request is logged, a line each.
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
