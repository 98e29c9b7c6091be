"""Calls that are served together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from cinder_thunder.concurrency import Together


class Server:
    """Answers with the double, once it may."""

    def __init__(self) -> None:
        self.served: list[list[int]] = []
        self.busy, self.may = threading.Event(), threading.Event()

    def __call__(self, requests: Sequence[int]) -> list[int]:
        self.served.append(sorted(requests))
        self.busy.set()
        assert self.may.wait(20)
        if 13 in requests:
            raise ValueError("13 of them")
        return [2 * each for each in requests]


def test_what_arrives_meanwhile_is_served_at_once() -> None:
    server = Server()
    together = Together(server)
    with ThreadPoolExecutor(5) as pool:
        answers = [pool.submit(together, 1)]
        assert server.busy.wait(20)
        answers += [pool.submit(together, each) for each in (2, 3, 4)]
        while len(together._waiting) < 3:
            time.sleep(0.01)
        server.may.set()
        assert [each.result(20) for each in answers] == [2, 4, 6, 8]
    assert server.served == [[1], [2, 3, 4]]
    assert together(5) == 10


def test_an_error_is_of_all_who_were_served_together_and_of_no_other() -> None:
    server = Server()
    together = Together(server)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(together, 1)
        assert server.busy.wait(20)
        others = [pool.submit(together, each) for each in (13, 14)]
        while len(together._waiting) < 2:
            time.sleep(0.01)
        server.may.set()
        assert first.result(20) == 2
        for each in others:
            with pytest.raises(ValueError, match="13 of them"):
                each.result(20)
    assert together(3) == 6


def test_nobody_waits_for_a_thread_that_is_killed_before_it_serves() -> None:
    class Killed(BaseException):
        pass

    killed = True

    def exclusive(call: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            if killed:
                raise Killed
            call()

        return run

    server = Server()
    server.may.set()
    together = Together(server, exclusive)
    with pytest.raises(Killed):
        together(1)
    killed = False
    assert together(2) == 4


def test_too_few_answers_are_an_error() -> None:
    def none(_requests: Sequence[int]) -> list[int]:
        return []

    with pytest.raises(ValueError, match="shorter"):
        Together(none)(1)
