"""Parsing the checker's lines on a console."""

from __future__ import annotations

from lab.guests.checked import Checked, boots, checked, found

CONSOLE = """\
tiny: boot 3
tiny login:
tiny: vda found seq=412
tiny: vdb appeared 1073741824
tiny: vdb fresh
tiny: vda seq=413 writes=1 reads=66 longest=8 stall_now=0 wrong=0
tiny: vdb seq=20 writes=20 reads=104 longest=31 stall_now=0 wrong=2
tiny: vda seq=460 writes=48 reads=160 longest=12 stall_now=7 wrong=0
tiny: vda seq=50"""


def test_the_last_whole_line_of_each_disk_counts() -> None:
    assert checked(CONSOLE) == Checked(seq=460, writes=48, reads=160, longest=12, wrong=0)
    assert checked(CONSOLE, "vdb") == Checked(seq=20, writes=20, reads=104, longest=31, wrong=2)
    assert checked(CONSOLE, "vdc") is None


def test_what_a_disk_had() -> None:
    assert found(CONSOLE) == 412
    assert found(CONSOLE, "vdb") == 0
    assert found("tiny: boot 1\n") is None


def test_boots() -> None:
    assert boots(CONSOLE) == 3
    assert boots("tiny: boot 1\ntiny login:\ntiny: boot 2\n") == 2
    assert boots("SeaBIOS") == 0
