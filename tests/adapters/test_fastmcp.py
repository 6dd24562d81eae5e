"""A FastMCP server keeps OAuth state and cached answers in a `KVStoreStore`, across restarts.

Each server is a process of its own, driven by HTTP on loopback.
"""

import base64
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Final

import pytest
from support.platforms import needs_real_system
from support.processes import Child

from kvstore import KVStore

pytestmark = needs_real_system

pytest.importorskip(
    "key_value.aio", reason="py-key-value-aio is not installed; the extra [py-key-value] has it"
)
pytest.importorskip("fastmcp", reason="FastMCP is not installed")

# What each server begins and ends with. Its public address is that of a proxy before it.
SERVER: Final = """
import asyncio, os, socket, sys, threading
import uvicorn
from fastmcp import FastMCP
from kvstore.adapters.py_key_value import KVStoreStore

store = KVStoreStore(sys.argv[1])

{server}

async def serve():
    listening = socket.create_server(("127.0.0.1", 0))
    app = mcp.http_app(stateless_http=True, json_response=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    def end_when_told():
        os.write(1, b"%d\\n" % listening.getsockname()[1])
        sys.stdin.readline()
        server.should_exit = True
    threading.Thread(target=end_when_told, daemon=True).start()
    async with store:
        await server.serve(sockets=[listening])

asyncio.run(serve())
"""

CACHING: Final = """
from fastmcp.server.middleware.caching import ResponseCachingMiddleware

mcp = FastMCP("caching", middleware=[ResponseCachingMiddleware(cache_storage=store)])

@mcp.tool
def process_that_adds(a: int, b: int) -> str:
    return f"{a + b} by {os.getpid()}"
"""

OAUTH: Final = """
from fastmcp.server.auth import OAuthProxy
from fastmcp.server.auth.providers.jwt import StaticTokenVerifier

upstream = StaticTokenVerifier({"upstream token": {"client_id": "ada", "scopes": []}})
mcp = FastMCP("guarded", auth=OAuthProxy(
    upstream_authorization_endpoint="http://identity.example/authorize",
    upstream_token_endpoint=sys.argv[2],
    upstream_client_id="server",
    upstream_client_secret="secret",
    token_verifier=upstream,
    base_url="https://mcp.example",
    jwt_signing_key="a key that is the same after a restart",
    require_authorization_consent="external",
    client_storage=store,
))

@mcp.tool
def hello() -> str:
    return "hello"
"""

REDIRECT: Final = "http://localhost:1/callback"


class Answer:
    """What a server said: its status, where it leads to, and its body."""

    def __init__(self, status: int, location: str | None, body: bytes) -> None:
        self.status = status
        self.location = location or ""
        self.body = body

    @property
    def query(self) -> dict[str, str]:
        """The parameters of the address that it leads to."""
        return dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.location).query))

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """Asks the server that is running, which `port` tells; follows nothing."""

    def __init__(self) -> None:
        self.port = 0

    def ask(
        self, method: str, path: str, body: object = None, *, form: bool = False, token: str = ""
    ) -> Answer:
        """Send `body` as a form or as JSON; `token` authorizes."""
        headers = {"Accept": "application/json, text/event-stream"}
        sent = None
        if body is not None:
            assert isinstance(body, dict)
            sent = urllib.parse.urlencode(body) if form else json.dumps(body)
            headers["Content-Type"] = (
                "application/x-www-form-urlencoded" if form else "application/json"
            )
        if token:
            headers["Authorization"] = f"Bearer {token}"
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        with closing(connection):
            connection.request(method, path, sent, headers)
            answer = connection.getresponse()
            return Answer(answer.status, answer.getheader("Location"), answer.read())

    def call(self, tool: str, token: str = "", **arguments: object) -> Answer:
        """Call a tool of the server."""
        parameters = {"name": tool, "arguments": arguments}
        request = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": parameters}
        return self.ask("POST", "/mcp", request, token=token)


@contextmanager
def serving(server: str, path: Path, client: Client, *arguments: object) -> Iterator[Child]:
    """Run a server and lead the client to it; it is killed as the block ends, if not before."""
    script = SERVER.replace("{server}", server)
    with Child(script, path, *arguments, prelude="") as child:
        client.port = int(child.hear())
        yield child


@pytest.fixture
def client() -> Client:
    return Client()


@pytest.fixture
def identity_provider() -> Iterator[str]:
    """The address of a server that gives the upstream token to whoever asks."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            token = {"access_token": "upstream token", "token_type": "Bearer", "expires_in": 3600}
            body = json.dumps(token).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/token"
        server.shutdown()
        thread.join()


def test_an_answer_that_was_cached_is_given_after_a_restart(path: Path, client: Client) -> None:
    with serving(CACHING, path, client) as server:
        answer = client.call("process_that_adds", a=1, b=2)
        assert answer.status == 200
        [content] = answer.json()["result"]["content"]
        assert content["text"] == f"3 by {server.pid}"
        server.say()
        server.end()
    with serving(CACHING, path, client) as another:
        assert client.call("process_that_adds", a=1, b=2).json() == answer.json()
        [content] = client.call("process_that_adds", a=2, b=2).json()["result"]["content"]
        assert content["text"] == f"4 by {another.pid}"
    with KVStore(path) as store:
        calls = [record for record in store.values() if record["collection"] == "tools/call"]
        assert len(calls) == 2
        assert all(3_500 < (store.ttl(key) or 0) <= 3_601 for key in store if store[key] in calls)


def test_a_login_goes_on_after_a_crash_and_its_token_is_good_after_another(
    path: Path, client: Client, identity_provider: str
) -> None:
    """One flow of OAuth over three servers: the state of each step is in the store."""
    verifier = "v" * 64
    digest = hashlib.sha256(verifier.encode()).digest()
    challenge = base64.urlsafe_b64encode(digest).decode().rstrip("=")

    with serving(OAUTH, path, client, identity_provider) as server:
        registered = client.ask(
            "POST",
            "/register",
            {"redirect_uris": [REDIRECT], "token_endpoint_auth_method": "none"},
        )
        assert registered.status == 201, registered.body
        client_id = registered.json()["client_id"]
        asked = {
            "response_type": "code",
            "client_id": client_id,
            "redirect_uri": REDIRECT,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
            "state": "of the client",
        }
        leads_on = client.ask("GET", f"/authorize?{urllib.parse.urlencode(asked)}")
        assert leads_on.location.startswith("http://identity.example/authorize")
        server.kill()

    with serving(OAUTH, path, client, identity_provider) as server:
        back = {"code": "upstream code", "state": leads_on.query["state"]}
        leads_back = client.ask("GET", f"/auth/callback?{urllib.parse.urlencode(back)}")
        assert leads_back.location.startswith(REDIRECT), leads_back.body
        assert leads_back.query["state"] == "of the client"
        given = client.ask(
            "POST",
            "/token",
            {
                "grant_type": "authorization_code",
                "client_id": client_id,
                "code": leads_back.query["code"],
                "redirect_uri": REDIRECT,
                "code_verifier": verifier,
            },
            form=True,
        )
        assert given.status == 200, given.body
        server.kill()

    with serving(OAUTH, path, client, identity_provider):
        answer = client.call("hello", token=given.json()["access_token"])
        assert answer.status == 200, answer.body
        assert answer.json()["result"]["content"][0]["text"] == "hello"
        assert client.call("hello", token="another").status == 401
        assert client.call("hello").status == 401
