"""A Flask app keeps its sessions and its cache in a `KVStoreCache`, across restarts and crashes.

Each server is a process of its own, driven by HTTP on loopback. Time goes by for its store alone:
`ahead` is by how many seconds its clock is.
"""

import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
from support.processes import Child

pytest.importorskip("cachelib", reason="cachelib is not installed; the extra [cachelib] has it")
pytest.importorskip("flask", reason="Flask is not installed")

SERVER: Final = """
import os, sys, threading, time
import kvstore.clock
ahead = int(sys.argv[2]) * 10**9
kvstore.clock.time_ns = lambda: time.time_ns() + ahead

from flask import Flask, flash, get_flashed_messages, session
from kvstore import StoreLockedError
from kvstore.adapters.cachelib import KVStoreCache
from werkzeug.serving import make_server

app = Flask("app")

{routes}

server = make_server("127.0.0.1", 0, app, threaded=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.write(1, b"%d\\n" % server.server_port)
sys.stdin.readline()
server.shutdown()
"""

LIFETIME: Final = 3600

SESSIONS: Final = f"""
from datetime import timedelta
from flask_session import Session

app.config.update(
    SESSION_TYPE="cachelib",
    SESSION_CACHELIB=KVStoreCache(sys.argv[1]),
    PERMANENT_SESSION_LIFETIME=timedelta(seconds={LIFETIME}),
)
Session(app)

@app.get("/login/<name>")
def login(name):
    session["name"] = name
    session["visits"] = (0, b"bytes")
    flash("welcome", "news")
    return "in"

@app.get("/")
def home():
    count, kind = session.get("visits", (0, None))
    session["visits"] = (count + 1, kind)
    name = session.get("name", "nobody")
    return f"{{name}} {{count}} {{kind}} {{get_flashed_messages(with_categories=True)}}"

@app.get("/logout")
def logout():
    session.clear()
    return "out"
"""

CACHE: Final = f"""
from flask_caching import Cache

cache = Cache(app, config={{
    "CACHE_TYPE": "kvstore.adapters.cachelib.KVStoreCache",
    "CACHE_ARGS": [sys.argv[1]],
    "CACHE_DEFAULT_TIMEOUT": {LIFETIME},
}})
calls = 0

@app.get("/page")
@cache.cached()
def page():
    global calls
    calls += 1
    return f"page of process {{os.getpid()}}, call {{calls}}"

@cache.memoize()
def total(*numbers):
    return {{"of": numbers, "sum": sum(numbers), "by": os.getpid()}}

@app.get("/total/<int:a>/<int:b>")
def show_total(a, b):
    return str(total(a, b))

@app.get("/forget")
def forget():
    cache.delete_memoized(total)
    return "forgotten"

@app.get("/clear")
def clear():
    cache.clear()
    return "cleared"
"""


class Browser:
    """Keeps the cookie of one session, and asks the server that `port` tells."""

    def __init__(self) -> None:
        self.port = 0
        self.cookie = ""

    def get(self, path: str) -> str:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", headers={"Cookie": self.cookie}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            given = answer.headers.get("Set-Cookie")
            if given is not None:
                self.cookie = given.partition(";")[0]
            text: str = answer.read().decode()
        return text


@pytest.fixture
def browser() -> Browser:
    return Browser()


@contextmanager
def serving(routes: str, path: Path, *browsers: Browser, ahead: int = 0) -> Iterator[Child]:
    """Run a server, `ahead` of the time by so many seconds, and lead the browsers to it."""
    with Child(SERVER.format(routes=routes), path, ahead, prelude="") as server:
        port = int(server.hear())
        for each in browsers:
            each.port = port
        yield server


def test_a_session_outlives_restarts_and_a_crash_and_then_expires(
    path: Path, browser: Browser
) -> None:
    pytest.importorskip("flask_session", reason="Flask-Session is not installed")
    stranger = Browser()
    with serving(SESSIONS, path, browser, stranger) as server:
        assert browser.get("/login/Ada") == "in"
        assert browser.get("/") == "Ada 0 b'bytes' [('news', 'welcome')]"
        assert stranger.get("/") == "nobody 0 None []"
        server.say()
        server.end()
    with serving(SESSIONS, path, browser) as server:
        assert browser.get("/") == "Ada 1 b'bytes' []"
        server.kill()
    with serving(SESSIONS, path, browser, stranger, ahead=LIFETIME - 60):
        assert browser.get("/") == "Ada 2 b'bytes' []"  # which is a visit: it lives on from here
        assert stranger.get("/") == "nobody 1 None []"
    with serving(SESSIONS, path, browser, ahead=2 * LIFETIME - 120):
        assert browser.get("/") == "Ada 3 b'bytes' []"
    with serving(SESSIONS, path, browser, ahead=3 * LIFETIME):
        assert browser.get("/") == "nobody 0 None []"


def test_a_session_that_is_cleared_is_gone_after_a_restart(path: Path, browser: Browser) -> None:
    pytest.importorskip("flask_session", reason="Flask-Session is not installed")
    with serving(SESSIONS, path, browser):
        browser.get("/login/Ada")
        cookie = browser.cookie
        browser.get("/logout")
    browser.cookie = cookie
    with serving(SESSIONS, path, browser):
        assert browser.get("/").startswith("nobody")


def test_a_second_worker_is_refused_as_it_starts(path: Path, browser: Browser) -> None:
    pytest.importorskip("flask_session", reason="Flask-Session is not installed")
    with serving(SESSIONS, path, browser) as first:
        browser.get("/login/Ada")
        with Child(SERVER.format(routes=SESSIONS), path, 0, prelude="") as second:
            assert second.wait() == 1
            told = second.errors()
        assert f"{first.pid}" in told
        assert "KVStoreCache is for a server of one process" in told
        assert browser.get("/").startswith("Ada")


def test_a_cached_page_outlives_a_restart_and_then_expires(path: Path, browser: Browser) -> None:
    pytest.importorskip("flask_caching", reason="Flask-Caching is not installed")
    with serving(CACHE, path, browser) as server:
        page, total = browser.get("/page"), browser.get("/total/1/2")
        assert page == f"page of process {server.pid}, call 1"
        assert total == f"{{'of': (1, 2), 'sum': 3, 'by': {server.pid}}}"
        assert (browser.get("/page"), browser.get("/total/1/2")) == (page, total)
        assert browser.get("/total/3/4") != total
    with serving(CACHE, path, browser, ahead=LIFETIME - 60):
        assert (browser.get("/page"), browser.get("/total/1/2")) == (page, total)
    with serving(CACHE, path, browser, ahead=LIFETIME + 60) as server:
        page, total = browser.get("/page"), browser.get("/total/1/2")
        assert page == f"page of process {server.pid}, call 1"
        browser.get("/forget")
        assert browser.get("/total/1/2") == total  # worked out anew
        browser.get("/clear")
        assert browser.get("/page") == f"page of process {server.pid}, call 2"
