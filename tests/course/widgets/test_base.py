"""The base of all widgets: controls that are named and found, threads that are waited for, runs that end in words."""

import threading

import pytest
from helpers.page import text_of

from gclib.course.widgets.base import Lab, LiveLab, button, on_change, slider
from gclib.course.widgets.keyboard import Keyboard


def test_controls_are_named_found_and_worked_from_the_keyboard():
    lab, moved = Lab(), []
    size = slider("Size", [("none", 0), 1024, 0.25, "all"], 1024, "How many")
    on_change(lambda: moved.append(size.value), size)
    lab.arrange([size], lab.status, classes={"size": size, "lab": lab})
    assert [words for words, _ in size.options] == ["none", "1,024", "0.25", "all"]
    assert size.style.description_width == lab.label_width
    assert "gclib-size" in size._dom_classes and "gclib-lab" in lab._dom_classes
    assert isinstance(lab.children[-1], Keyboard)  # the lines for the keyboard
    size.value = "all"
    assert moved == ["all"]


@pytest.mark.parametrize(("argument", "name"), [("", "passage tokens"), ("length", "length")])
def test_a_start_that_is_no_option_is_refused(argument, name):
    with pytest.raises(ValueError, match=f"^{name} must be one of 16, 32, got 17"):
        slider("Passage tokens", [16, 32], 17, argument=argument)


def test_one_thread_of_a_name_at_a_time_and_all_are_waited_for():
    lab, go, calls = Lab(), threading.Event(), []
    for number in range(3):
        lab._start("work", lambda number: (go.wait(60), calls.append(number)), number)
    assert lab._is_busy("work")
    lab.wait(0.01)
    go.set()
    lab.wait()
    assert calls == [0] and not lab._is_busy("work")


class Endless:
    """A run that goes on until it is stopped."""

    def __init__(self):
        ended = threading.Event()
        self.run, self.stop = ended.wait, ended.set


class EndlessLab(LiveLab):
    """Go and Stop for it."""

    def __init__(self):
        self.go = button("Go", lambda: self._begin(Endless(), 0.01))
        super().__init__(self.go, stop="End it", progress="None is known")

    def _follow(self, run):
        self._say("It goes on.")

    def _ended(self, run):
        self._say("It has ended.")


def test_a_run_is_followed_and_stopped_and_its_buttons_come_back():
    lab = EndlessLab()
    lab._on_stop()  # nothing runs yet
    lab.go.click()
    assert lab._is_busy("run") and lab.go.disabled and not lab.stop.disabled
    lab.stop.click()
    lab.wait()
    assert text_of(lab.status) == "It has ended." and not lab.go.disabled and lab.stop.disabled
