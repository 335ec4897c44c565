"""A worker's end is known, also where a wait for it was interrupted."""

import os
import signal
import threading
import time

import pytest

from gclib.course.threads import Worker


def test_a_worker_is_alive_until_its_work_is_done():
    go, seen = threading.Event(), []
    worker = Worker(lambda value: seen.append((value, go.wait(10))), 7, name="seven")
    assert not worker.is_alive()
    worker.start()
    worker.join(0.02)
    assert worker.is_alive() and not seen
    go.set()
    worker.join()
    assert not worker.is_alive() and seen == [(7, True)] and worker.daemon and worker.name == "seven"


@pytest.mark.skipif(os.name == "nt", reason="no signal goes to one thread there")
def test_an_interrupted_join_leaves_a_worker_alive():
    go = threading.Event()
    worker = Worker(go.wait, 10, name="waits")
    worker.start()
    main = threading.main_thread().ident
    threading.Timer(0.1, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        worker.join(10)
    assert worker.is_alive()
    go.set()
    worker.join(10)
    assert not worker.is_alive()


def test_what_is_thrown_ends_the_work():
    def for_ever():
        try:
            while True:
                time.sleep(0.001)
        except KeyError as error:
            seen.append(error)

    seen = []
    worker = Worker(for_ever, name="for ever")
    worker.start()
    assert worker.throw(KeyError) and not worker.is_alive() and len(seen) == 1
    assert worker.throw(KeyError) and len(seen) == 1  # to one that has ended nothing is thrown
