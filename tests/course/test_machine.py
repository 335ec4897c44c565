"""The check of the reader's computer: facts from here, findings for machines that are made up."""

from dataclasses import replace

import psutil
import pytest

from gclib.course.machine import CORE, COURSE, Machine, judge, look, read_pins, report
from gclib.memory.devices import ram_bytes
from gclib.support.words import GiB

VERSIONS = {name: "1.2.3" for name in CORE + COURSE}
GOOD = Machine(
    system="Linux x86_64",
    python=(3, 11, 7),
    cores=2,
    ram_bytes=16 * GiB,
    free_ram_bytes=8 * GiB,
    free_disk_bytes=20 * GiB,
    installed=VERSIONS,
    pinned=VERSIONS,
)
TOPICS = ["Python", "Packages", "Memory", "Processor cores", "Disk", "GPU"]


def finding(topic, **changes):
    return {f.topic: f for f in judge(replace(GOOD, **changes))}[topic]


def test_a_good_machine_has_nothing_to_mend():
    findings = judge(GOOD)
    assert [f.topic for f in findings] == TOPICS
    assert {f.state for f in findings} == {"works"}
    assert report(findings).endswith("Everything in the course works here.")


@pytest.mark.parametrize(
    ("topic", "changes", "state", "says"),
    [
        ("Python", {"python": (3, 10, 14)}, "will not work", "3.11 or newer"),
        ("Python", {"python": (3, 13, 0)}, "works", "New enough"),
        ("Packages", {"installed": VERSIONS | {"torch": "1.2.4"}}, "limited", "torch 1.2.4 (tested: 1.2.3)"),
        ("Packages", {"installed": VERSIONS | {"torch": "1.2.3+cpu"}}, "works", "tests passed"),
        ("Packages", {"pinned": {}}, "limited", "constraints.txt"),
        (
            "Packages",
            {"installed": {n: v for n, v in VERSIONS.items() if n != "peft"}},
            "limited",
            "Chapters 06 and 13 stop",
        ),
        ("Memory", {"free_ram_bytes": GiB}, "will not work", "Close other programs"),
        ("Memory", {"free_ram_bytes": 3 * GiB}, "limited", "one notebook"),
        ("Processor cores", {"cores": 1}, "limited", "longer"),
        ("Disk", {"free_disk_bytes": GiB // 2}, "limited", "room"),
        ("GPU", {"gpus": (("A card", 24 * GiB),)}, "works", "counters"),
    ],
)
def test_each_shortcoming_is_told_in_words(topic, changes, state, says):
    found = finding(topic, **changes)
    assert found.state == state
    assert says in found.meaning


def test_a_missing_package_is_named_and_stops_the_course():
    installed = {name: v for name, v in VERSIONS.items() if name != "ipywidgets"}
    found = finding("Packages", installed=installed)
    assert found.state == "will not work"
    assert "ipywidgets" in found.meaning
    assert "torch" not in found.meaning
    assert report([found]).endswith("Mend this first, then run the cell again: Packages.")


def test_a_limited_machine_can_still_take_the_course():
    assert "can take the course" in report(judge(replace(GOOD, cores=1)))


def test_room_is_looked_for_where_things_are_cached(monkeypatch, tmp_path):
    seen, room = [], psutil.disk_usage(str(tmp_path))
    monkeypatch.setattr(psutil, "disk_usage", lambda path: (seen.append(path), room)[1])
    monkeypatch.setenv("GCLIB_CACHE", str(tmp_path / "not" / "yet"))
    assert look().free_disk_bytes == room.free and seen == [str(tmp_path)]
    assert str(tmp_path / "not" / "yet") in finding("Disk").meaning


def test_looking_finds_this_machine_and_the_tested_packages():
    machine = look()
    assert machine.ram_bytes <= psutil.virtual_memory().total
    assert 0 < machine.free_ram_bytes <= machine.ram_bytes
    assert machine.cores >= 1
    assert set(machine.installed) == set(CORE + COURSE)
    assert set(machine.installed) <= set(machine.pinned)


def test_memory_is_the_containers_where_that_is_less(tmp_path):
    total, free = ram_bytes(tmp_path)
    assert (total, free <= total) == (psutil.virtual_memory().total, True)
    (tmp_path / "memory.max").write_text(f"{GiB}\n")
    (tmp_path / "memory.current").write_text(f"{GiB // 4}\n")
    assert ram_bytes(tmp_path) == (GiB, GiB - GiB // 4)
    (tmp_path / "memory.max").write_text("max\n")
    assert ram_bytes(tmp_path)[0] == total


def test_pins_are_read_and_a_line_that_is_none_is_refused(tmp_path):
    path = tmp_path / "constraints.txt"
    path.write_text("# a comment\n\nHugging_Face.hub==1.2  # why\ntorch==2.13.0\n")
    assert read_pins(path) == {"hugging-face-hub": "1.2", "torch": "2.13.0"}
    assert read_pins(tmp_path / "nowhere.txt") == {}
    path.write_text("torch>=2\n")
    with pytest.raises(ValueError, match=r"path must hold lines of the form name==version, got 'torch>=2'"):
        read_pins(path)
