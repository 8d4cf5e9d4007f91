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


#: A loaded machine may be seconds late with a fork: nothing here goes by the clock.
HEAD = """
import json, multiprocessing, os, signal, time
from fastddr.memory.second import Second, possible

def until(done):
    ends = time.monotonic() + 120
    while not done():
        assert time.monotonic() < ends
        time.sleep(0.01)
"""


def told(code: str) -> Any:
    """What a script, in which `Second` is known, prints as JSON."""
    return json.loads(printed(HEAD + textwrap.dedent(code)))


@needs_two_cores
def test_each_question_is_answered_once_by_whoever_is_free(tmp_path: Path) -> None:
    found = told(
        f"""
        def answer(number):
            with open({str(tmp_path / "answered")!r}, "a") as file:
                file.write(f"{{number}}\\n")
            time.sleep(0.5)
            return number * number, os.getpid()
        questions = [(number,) for number in range(6)]
        assert possible()
        second = Second(answer)
        second.hand_over(questions)
        second.hand_over(questions)
        until(lambda: any(second._taken))
        found = [second.answered(question) or answer(*question) for question in questions]
        second.close()
        print(json.dumps([[square for square, _ in found], [pid == os.getpid() for _, pid in found],
                          len(multiprocessing.active_children())]))
        """
    )
    squares, here, left = found
    assert squares == [0, 1, 4, 9, 16, 25]
    assert sorted((tmp_path / "answered").read_text().split()) == list("012345")
    # The first is asked for at once; after that both are at work.
    assert here[0]
    assert 1 <= 6 - sum(here) <= 4
    assert left == 0


@needs_two_cores
def test_what_fails_there_is_answered_here() -> None:
    found = told(
        """
        def answer(number):
            if number != 3:
                raise ValueError(number)
            return number
        second = Second(answer)
        second.hand_over([(0,), (1,), (2,), (3,)])
        until(lambda: all(second._taken[:3]))
        found = [second.answered((number,)) for number in range(5)]
        second.close()
        print(json.dumps(found))
        """
    )
    assert found == [None, None, None, 3, None]


@needs_two_cores
def test_a_process_that_is_killed_in_the_midst_of_an_answer_is_done_without() -> None:
    found = told(
        """
        def answer(number):
            os.kill(os.getpid(), signal.SIGKILL)
        second = Second(answer)
        second.hand_over([(1,), (2,), (3,)])
        until(lambda: not second._process.is_alive())
        found = [second.answered((number,)) for number in (1, 2, 3)]
        second.hand_over([(4,), (5,)])
        found += [second.answered((5,))]
        second.close()
        print(json.dumps(found))
        """
    )
    assert found == [None] * 4


@needs_two_cores
def test_nobody_waits_for_an_answer_that_is_not_asked_for() -> None:
    found = told(
        """
        def answer(number):
            time.sleep(60)
        second = Second(answer)
        second.hand_over([(1,), (2,)])
        until(lambda: any(second._taken))
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
        threading.Thread(target=stop.wait, daemon=True).start()
        second = Second(abs)
        second.hand_over([(-1,), (-2,)])
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
        second.hand_over([(-1,), (-2,), (-3,)])
        print(json.dumps([second.answered((-2,)), len(multiprocessing.active_children())]))
        second.close()
        """
    )
    assert found == [None, 0]


@needs_two_cores
def test_one_that_is_stuck_is_given_up() -> None:
    found = told(
        """
        from fastddr.memory import second as module
        module._PATIENCE = 0.5
        second = Second(lambda number: time.sleep(600))
        second.hand_over([(0,), (1,), (2,)])
        until(lambda: any(second._taken))
        found = [second.answered((number,)) for number in (1, 2)]
        second.close()
        print(json.dumps([found, len(multiprocessing.active_children())]))
        """
    )
    assert found == [[None, None], 0]


@needs_two_cores
def test_a_machine_that_gives_no_further_process_answers_alone() -> None:
    found = told(
        """
        def refused(*_, **__):
            raise BlockingIOError(11, "Resource temporarily unavailable")
        os.fork = refused
        second = Second(abs)
        second.hand_over([(-1,), (-2,)])
        found = [second.answered((-2,))]
        second.close()
        print(json.dumps(found))
        """
    )
    assert found == [None]


@needs_two_cores
def test_the_plan_is_the_same_with_one_core_and_with_two(tmp_path: Path) -> None:
    """And the second process does trace."""
    # Both ways in forks of one interpreter, which has imported what they need and has no thread.
    code = """
        import os
        from fastddr.__main__ import main
        from fastddr.memory import planning, predicting
        traced = predicting.run
        def noted(*arguments, **more):
            found = traced(*arguments, **more)
            with open("pids", "a") as file:
                file.write(f"{os.getpid()}\\n")
            return found
        predicting.run = noted
        question = "plan --model resnet --resnet.stem stride1 --resnet.depth 10 --image-size 128 --vram 1.2 --json"
        for how in ("alone", "both"):
            child = os.fork()
            if child == 0:
                os.mkdir(how)
                os.chdir(how)
                os.environ["FASTDDR_CACHE"] = os.path.abspath("cache")
                os.dup2(os.open("plan.json", os.O_WRONLY | os.O_CREAT), 1)
                if how == "alone":
                    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
                raise SystemExit(main(question.split()))
            if os.waitpid(child, 0)[1]:
                raise SystemExit(f"{how}: it failed")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, timeout=300, env=environment())
    assert done.returncode == 0, done.stderr
    found = []
    for how in ("alone", "both"):
        pids = set((tmp_path / how / "pids").read_text().split())
        found.append((json.loads((tmp_path / how / "plan.json").read_text()), len(pids)))
    (one, processes), (two, both) = found
    assert one == two
    assert (processes, both) == (1, 2)


@needs_two_cores
def test_what_would_keep_this_process_from_forking_is_asked_in_another() -> None:
    """As CUDA, where the name of the card is asked for."""
    here, apart, late, broken = told(
        """
        from fastddr.memory.second import apart
        def answered():
            Second.late = True
            return os.getpid()
        found = [os.getpid(), apart(answered), Second.late]
        def breaks():
            if os.getpid() != found[0]:
                os._exit(1)
            return "here"
        found.append(apart(breaks))
        Second.late = True
        assert apart(os.getpid) == found[0]
        print(json.dumps(found))
        """
    )
    assert here != apart
    assert not late
    assert broken == "here"
