"""The processes in which templates run: their text equals that of this process, and every way they can end."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import jinja2
import psutil
import pytest
from templates import CHATML, tokenizer

from tunery import processes
from tunery.errors import Unavailable
from tunery.rows import dialect, renderer, sandbox
from tunery.rows.messages import Message
from tunery.rows.template import ChatTemplate

NOW = datetime(2026, 3, 1, 12, 30, 5, 77, tzinfo=timezone(timedelta(hours=5, minutes=45), "NPT"))
DIVIDING = (
    "{% set x = ('f' * 4000000) | int(base=16) %}{% set y = ('f' * 2000000) | int(base=16) %}"
    + "{% set z = x // y %}" * 300
)
"""Divisions of large numbers, which take seconds each and count as no round of a loop."""


def render(source: str, **variables: Any) -> str:
    environment = sandbox.Environment()
    return environment.render(environment.from_string(source), variables, NOW)


def renderers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "tunery.rows.renderer" in " ".join(child.cmdline())]


@pytest.fixture(autouse=True)
def no_others() -> None:
    sandbox._POOL.close()


@pytest.mark.parametrize(
    ("source", "variables"),
    [
        (CHATML, {"messages": [{"role": "user", "content": "🗼 é\r\n\x00"}], "add_generation_prompt": True}),
        ("{{ strftime_now('%c %x %A %j %f %z %Z 日') }}", {}),
        ("{{ x }} {{ x is mapping }} {{ y }} {{ y[1] }} {{ z }}", {"x": {1: (2, None)}, "y": (1, 2.5e-9), "z": {3}}),
        ("{{ '\\ud800' }}{{ 'x' * 3000000 }}", {}),
        ("", {}),
    ],
)
def test_the_text_is_what_it_would_be_in_this_process(source: str, variables: dict[str, Any]) -> None:
    here = dialect.Environment()

    assert render(source, **variables) == here.render(here.from_string(source), variables, NOW)


def test_a_naive_time_stays_naive() -> None:
    environment = sandbox.Environment()
    template = environment.from_string("{{ strftime_now('%H:%M|%z|%Z') }}")

    assert environment.render(template, {}, datetime(2026, 1, 2, 3, 4)) == "03:04||"  # noqa: DTZ001


def test_many_renderings_arrive_in_order() -> None:
    environment = sandbox.Environment()
    template = environment.from_string("{{ n }}{% if n == bad %}{{ raise_exception('no ' ~ n) }}{% endif %}")
    batch = [{"n": n} for n in range(50)]

    assert environment.render_all(template, batch, NOW) == [str(n) for n in range(50)]
    with pytest.raises(jinja2.TemplateError, match=r"^no 33$"):
        environment.render_all(template, [{**variables, "bad": 33} for variables in batch], NOW)
    assert environment.render_all(template, batch[:2], NOW) == ["0", "1"]
    assert environment.render_all(template, [], NOW) == []


@pytest.mark.parametrize(
    ("source", "variables"),
    [
        ("{{ raise_exception('no system role') }}", {}),
        ("{{ a.b.c }}", {}),
        ("{{ x['k'].y }}", {"x": {}}),
        ("{{ 1 / 0 }}", {}),
        ("{{ 'a' + 1 }}", {}),
        ("{{ ''.__class__.x }}", {}),
        ("{{ 'abc'.index('d') }}", {}),
        ("{{ '{b}'.format(a=1) }}", {}),
        ("{{ '\\ud800'.encode() }}", {}),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", {}),
        ("{% if %}", {}),
        ("a\n{{ x | nothing }}", {}),
        ("{% for %}", {}),
    ],
)
def test_errors_are_those_of_this_process(source: str, variables: dict[str, Any]) -> None:
    here = dialect.Environment()
    with pytest.raises(Exception) as wanted:
        here.render(here.from_string(source), variables, NOW)

    with pytest.raises(Exception) as found:
        render(source, **variables)

    if not isinstance(wanted.value, UnicodeError):  # its constructor takes five arguments of several types
        assert type(found.value) is type(wanted.value)
    assert isinstance(wanted.value, RecursionError) or str(wanted.value) in str(found.value)
    assert getattr(found.value, "lineno", None) == getattr(wanted.value, "lineno", None)


def test_one_process_serves_row_after_row() -> None:
    assert [render("{{ x }}", x=x) for x in "abc"] == ["a", "b", "c"]

    assert len(renderers()) == 1


def test_a_template_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "WALL_SECONDS", 1.0)
    began = time.monotonic()

    with pytest.raises(sandbox.LimitExceeded, match=r"too long \(limit: 1 s\)"):
        render(DIVIDING)

    assert time.monotonic() - began < 5
    assert renderers() == []
    assert render("{{ x }}", x=1) == "1"


def test_a_template_that_eats_memory_is_refused_and_its_process_replaced() -> None:
    with pytest.raises(sandbox.LimitExceeded, match="512 MiB"):
        render(
            "{% set ns = namespace(x=[]) %}{% for i in range(9) %}{% set ns.x = [ns.x, ['a'] * 16000000] %}{% endfor %}"
        )

    assert renderers() == []


def test_processor_time_is_limited_by_the_kernel() -> None:
    process_ = sandbox._Process()
    process_.request(sandbox.Environment().from_string("x"), [{}], NOW)
    limits = psutil.Process(process_._popen.pid).rlimit(psutil.RLIMIT_CPU)
    process_.close()

    assert renderer.CPU_SECONDS <= limits[0] <= 2 * renderer.CPU_SECONDS + 1


def test_a_process_killed_from_outside_is_not_the_templates_fault() -> None:
    environment = sandbox.Environment()
    template = environment.from_string("{{ x }}")
    for child in renderers():
        child.kill()

    assert environment.render(template, {"x": 1}, NOW) == "1"


def test_a_template_that_ends_its_process_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_START", "import sys; sys.stdin.read()")

    with pytest.raises(sandbox.LimitExceeded, match="ended its process"):
        render("x")


def test_no_template_is_blamed_where_no_process_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(tokenizer(), {"default": CHATML}, {})
    before = open_descriptors()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    sandbox._POOL.close()

    with pytest.raises(Unavailable, match="renders chat templates"):
        template.render([Message(role="user", content="q")])

    assert open_descriptors() <= before


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_after_a_fork_each_has_renderers_of_its_own() -> None:
    environment = sandbox.Environment()
    template = environment.from_string("{{ x }}")
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            texts = [environment.render(template, {"x": f"child{n}"}, NOW) for n in range(50)]
            os.write(write_end, b"ok" if texts == [f"child{n}" for n in range(50)] else b"no")
        finally:
            sandbox._POOL.close()
            os._exit(0)
    ours = [environment.render(template, {"x": f"parent{n}"}, NOW) for n in range(50)]
    os.waitpid(pid, 0)

    assert os.read(read_end, 9) == b"ok"
    assert ours == [f"parent{n}" for n in range(50)]
    os.close(read_end)
    os.close(write_end)


def test_threads_do_not_read_each_others_texts() -> None:
    environment = sandbox.Environment()
    template = environment.from_string("{{ x }}")

    def many(name: int) -> bool:
        return all(environment.render(template, {"x": f"{name} {n}"}, NOW) == f"{name} {n}" for n in range(100))

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(many, range(12)))
    assert len(renderers()) <= sandbox._MAX_IDLE


def test_an_interrupted_request_leaves_no_half_read_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interruption is Ctrl-C, or a signal handler that raises."""
    # A shell starts background commands with the signal ignored.
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()

    with pytest.raises(KeyboardInterrupt):
        render(DIVIDING)

    assert render("{{ x }}", x=1) == "1"
    timer.join()
    signal.signal(signal.SIGINT, usual)


def test_it_ends_with_its_parent_though_it_is_busy() -> None:
    script = (
        f"from datetime import datetime\nfrom tunery.rows.sandbox import Environment\ne = Environment()\n"
        f"t = e.from_string({DIVIDING!r})\nprint('ready', flush=True)\ne.render(t, {{}}, datetime.now())"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"ready\n"
    children = psutil.Process(parent.pid).children()
    assert len(children) == 1
    assert processes.wait_until(lambda: children[0].cpu_times().user > 0.3, seconds=20, alive=lambda: True)

    parent.kill()
    parent.communicate()

    assert processes.wait_until(lambda: not processes.is_alive(children[0].pid), seconds=5, alive=lambda: True)


def test_many_templates_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_MAX_TEMPLATES", 3)

    assert [render(f"{n}") for n in range(8)] == [str(n) for n in range(8)]
    assert len(renderers()) <= 1


def open_descriptors() -> int:
    return psutil.Process().num_fds()


def test_nothing_is_left_open() -> None:
    render("x")
    gc.collect()  # collects what other tests left
    before = open_descriptors()

    for _ in range(3):
        sandbox._POOL.close()
        render("x")
    gc.collect()

    # Each would leave one or more; threads that other tests began may have one open for a moment.
    assert open_descriptors() < before + 3


def test_the_moment_survives_with_its_zone() -> None:
    assert renderer._moment(*sandbox._moment(NOW)) == NOW
    assert renderer._moment(*sandbox._moment(NOW)).tzname() == "NPT"
    assert renderer._moment(*sandbox._moment(datetime(2026, 1, 1, tzinfo=UTC))).tzname() == "UTC"
