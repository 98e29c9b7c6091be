"""Asks many hosts at once, for commands."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

#: Hosts that are asked at the same time.
_CONCURRENCY = 16


def ask_all(hosts: Sequence[str], ask: Callable[[str], None]) -> dict[str, Future[None]]:
    """Ask all hosts, a few at a time, in daemon threads.

    An executor's threads are joined when the process ends, also after an interrupt.
    """
    answers: dict[str, Future[None]] = {host: Future() for host in hosts}
    left = iter(list(answers))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                host = next(left, None)
            if host is None:
                return
            try:
                ask(host)
                answers[host].set_result(None)
            except Exception as error:
                answers[host].set_exception(error)

    for _ in range(min(_CONCURRENCY, len(answers))):
        threading.Thread(target=work, name="asking", daemon=True).start()
    return answers
