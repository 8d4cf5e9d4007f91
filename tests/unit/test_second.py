"""The process that traces ahead, asked for in fresh interpreters: pytest has threads, which a fork should not have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from tests_support import environment, printed

needs_two_cores = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two cores"
)


def told(code: str) -> Any:
    """What a script, in which `Second` is known, prints as JSON."""
    head = "import json, multiprocessing, os, signal, time\nfrom fastddr.memory.second import Second, possible\n"
    return json.loads(printed(head + textwrap.dedent(code)))


@needs_two_cores
def test_each_question_is_answered_once_by_whoever_is_free() -> None:
    found = told(
        """
        def answer(number, seconds):
            time.sleep(seconds)
            return number * number, os.getpid()
        questions = [(number, 0.3) for number in range(6)]
        assert possible()
        second = Second(answer)
        second.expect(questions)
        second.expect(questions)
        began = time.monotonic()
        found = [second.answered(question) or answer(*question) for question in questions]
        took = time.monotonic() - began
        second.close()
        print(json.dumps([[square for square, _ in found], [pid == os.getpid() for _, pid in found],
                          len(multiprocessing.active_children()), took]))
        """
    )
    squares, here, left, took = found
    assert squares == [0, 1, 4, 9, 16, 25]
    # The first is asked for at once; after that both are at work.
    assert here[0]
    assert not here[1]
    assert 2 <= sum(here) <= 4
    assert left == 0
    assert took < 6 * 0.3


def test_what_fails_there_is_answered_here() -> None:
    found = told(
        """
        def answer(number):
            raise ValueError(number)
        second = Second(answer)
        second.expect([(1,), (2,), (3,)])
        found = [second.answered((number,)) for number in (2, 3, 1, 4)]
        second.close()
        print(json.dumps(found))
        """
    )
    assert found == [None] * 4


def test_a_process_that_is_killed_in_the_midst_of_an_answer_is_done_without() -> None:
    found = told(
        """
        def answer(number):
            os.kill(os.getpid(), signal.SIGKILL)
        second = Second(answer)
        second.expect([(1,), (2,), (3,)])
        time.sleep(0.5)
        found = [second.answered((number,)) for number in (1, 2, 3)]
        second.expect([(4,), (5,)])
        found += [second.answered((5,))]
        second.close()
        print(json.dumps(found))
        """
    )
    assert found == [None] * 4


def test_nobody_waits_for_an_answer_that_is_not_asked_for() -> None:
    found = told(
        """
        def answer(number):
            time.sleep(60)
        second = Second(answer)
        second.expect([(1,), (2,)])
        time.sleep(0.3)
        began = time.monotonic()
        second.close()
        print(json.dumps([time.monotonic() - began, len(multiprocessing.active_children())]))
        """
    )
    assert found[0] < 30
    assert found[1] == 0


def test_with_another_thread_nothing_is_forked() -> None:
    found = told(
        """
        import threading
        stop = threading.Event()
        threading.Thread(target=stop.wait).start()
        second = Second(abs)
        second.expect([(-1,), (-2,)])
        print(json.dumps([possible(), second.answered((-2,)), len(multiprocessing.active_children())]))
        second.close()
        stop.set()
        """
    )
    assert found == [False, None, 0]


@needs_two_cores
def test_nothing_is_forked_after_the_first_answer_here() -> None:
    """Autograd has worked by then."""
    found = told(
        """
        second = Second(abs)
        assert second.answered((-1,)) is None
        second.expect([(-1,), (-2,), (-3,)])
        print(json.dumps([second.answered((-2,)), len(multiprocessing.active_children())]))
        second.close()
        """
    )
    assert found == [None, 0]


@needs_two_cores
@pytest.mark.parametrize(
    "question",
    [
        (
            "--model",
            "resnet",
            "--resnet.stem",
            "stride1",
            "--precision",
            "fp32",
            "--image-size",
            "128",
            "--vram",
            "1.2",
        ),
        ("--image-size", "96", "--vram", "1.2"),
    ],
    ids=["a training", "the table"],
)
def test_the_plan_is_the_same_with_one_core_and_with_two(question: tuple[str, ...], tmp_path: Path) -> None:
    """And the second process does trace."""
    code = """
        import os, sys
        from fastddr.memory import predicting
        traced = predicting.run
        def noted(*arguments, **more):
            with open(sys.argv[1], "a") as file:
                file.write(f"{os.getpid()}\\n")
            return traced(*arguments, **more)
        predicting.run = noted
        if sys.argv[2] == "alone":
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
        from fastddr.__main__ import main
        raise SystemExit(main(["plan", *sys.argv[3:], "--json"]))
    """
    found = []
    for how in ("alone", "both"):
        log = tmp_path / how
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), str(log), how, *question],
            capture_output=True, text=True, check=True, timeout=300,
            env=environment() | {"FASTDDR_CACHE": str(tmp_path / f"cache-{how}")},
        )  # fmt: skip
        found.append((json.loads(done.stdout), len(set(log.read_text().split()))))
    (one, processes), (two, both) = found
    assert one == two
    assert (processes, both) == (1, 2)
