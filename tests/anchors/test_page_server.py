"""The server of the page: who gets in, what is refused, what every tab hears."""

import contextlib
import functools
import http.client
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs the extra annotate")
pytest.importorskip("uvicorn", reason="needs the extra annotate")
pytest.importorskip("httpx2", reason="starlette's TestClient needs it")

import commands
from pages import AURORA, ELENA, NAME, desk_on, opened, served, settle
from session_models import tokenizer
from starlette.testclient import TestClient

from fused_losses.anchors.files import RecordFile, read_records
from fused_losses.anchors.page import server
from fused_losses.anchors.page.guard import POLICY
from fused_losses.anchors.page.server import Page, application

SECRET = "secret-of-this-test"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def desk(tmp_path):
    with opened(tmp_path / "anchors.jsonl") as found:
        yield found


def client_of(desk, host="127.0.0.1:8000", admitted=True, **options):
    client = TestClient(application(desk, SECRET, **options), base_url=f"http://{host}")
    if admitted:
        assert client.get(f"/?token={SECRET}").status_code == 200
    return client


@pytest.fixture
def client(desk):
    return client_of(desk)


def post(client, name, **body):
    return client.post(f"/api/{name}", json=body)


# Who gets in.


def test_only_the_secret_opens_the_page(desk):
    client = client_of(desk, admitted=False)
    for path in ("/", "/?token=", "/?token=secret-of-this-tesT", "/api/state", "/events", "/static/page.js"):
        assert client.get(path).status_code == 401
    assert post(client, "accept").status_code == 401
    answer = client.get(f"/?token={SECRET}")
    assert answer.status_code == 200 and "HttpOnly; SameSite=Strict" in answer.headers["set-cookie"]
    assert client.get("/").status_code == client.get("/api/state").status_code == 200
    assert len(desk.file.records) == 0


def test_the_secret_opens_nothing_but_the_page(desk):
    client = client_of(desk, admitted=False)
    assert client.get(f"/api/state?token={SECRET}").status_code == 401


@pytest.mark.parametrize(
    "cookie", ["fused-losses=wrong", "fused-losses", "=;;;", "fused-losses=\xff", "other=" + SECRET]
)
def test_a_wrong_cookie(desk, cookie):
    client = client_of(desk, admitted=False)
    assert client.get("/api/state", headers={"Cookie": cookie.encode("latin-1")}).status_code == 401


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[", "0.0.0.0"])
def test_a_name_of_another_server_is_refused(client, host):
    """DNS rebinding: the browser believes that evil.example is this machine."""
    answer = client.get("/api/state", headers={"Host": host})
    assert answer.status_code == 403 and "Host" in answer.json()["error"]


@pytest.mark.parametrize("host", ["127.0.0.1:9", "localhost:8000", "localhost", "[::1]:8000", "LOCALHOST:1"])
def test_names_of_loopback_are_served(client, host):
    assert client.get("/api/state", headers={"Host": host}).status_code == 200


def test_a_server_for_others_answers_to_any_name_with_the_secret(desk):
    client = client_of(desk, "gpu7.example:8000", hosts=None)
    assert client.get("/api/state").status_code == 200
    assert client_of(desk, "gpu7.example:8000", admitted=False, hosts=None).get("/api/state").status_code == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:9999"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Origin": "http://127.0.0.1:8000", "Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
def test_another_site_changes_nothing(client, desk, headers, status):
    answer = client.post("/api/accept", content=b"{}", headers={"Content-Type": "application/json"} | headers)
    assert answer.status_code == status and len(desk.file.records) == (status == 200)


def test_another_site_reads_nothing(client):
    assert client.get("/api/state", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert "access-control-allow-origin" not in client.get("/api/state").headers


@pytest.mark.parametrize("path", ["/", "/static/page.js", "/api/state", "/nothing", "/api/likeliest?position=x"])
def test_every_answer_has_the_policy(client, path):
    headers = client.get(path).headers
    assert headers["content-security-policy"] == POLICY and "unsafe" not in POLICY
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"


def test_files_of_the_page_only(client):
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for name in ("page.js", "page.css", "parts.css", "icon.svg"):
        assert client.get(f"/static/{name}").status_code == 200
    for path in (
        "/static/../server.py",
        "/static/%2e%2e/server.py",
        "/static/server.py",
        "/static//etc/passwd",
        "/static/",
    ):
        assert client.get(path).status_code == 404


def test_the_page_asks_no_other_server_and_writes_no_markup():
    for path in (ROOT / "fused_losses/anchors/page/static").iterdir():
        text = path.read_text()
        assert "://" not in text.replace("http://www.w3.org/2000/svg", ""), path.name
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "onclick=", "style="):
            assert word not in text, (path.name, word)


# What is asked for.


def test_from_the_first_answer_to_the_record(client, desk):
    state = client.get("/api/state").json()
    assert state["tokens"][NAME]["text"] == " Elena" and state["tasks"][0] == {
        "title": "What is your name?",
        "records": 0,
    }
    found = client.get(f"/api/likeliest?position={NAME}&version={state['version']}").json()["candidates"]
    assert [choice["text"] for choice in found[:2]] == [" Elena", " Aurora"] and len(found) == 10
    assert client.get("/api/suspicious?after=-1").json() == {"position": NAME}
    changed = post(client, "replace", version=state["version"], position=NAME, token_id=found[1]["id"], confidence=0.9)
    assert (changed.status_code, changed.json()) == (200, {"message": ""})
    assert "".join(token["text"] for token in settle(desk)["tokens"]) == AURORA + "<|end|>"
    assert post(client, "undo").status_code == post(client, "redo").status_code == 200
    settle(desk)
    done = post(client, "accept").json()
    (record,) = read_records(desk.file.path, tokenizer())
    assert done == {"id": record.id} and record.anchors[0].confidence == 0.9
    assert post(client, "open", index=0, anew=True).status_code == 200
    assert post(client, "ask", text="And you?").status_code == 200
    assert settle(desk)["current"] == 2
    assert post(client, "stop").status_code == 200


@pytest.mark.parametrize(
    ("name", "body", "said"),
    [
        ("replace", b"{", "not JSON"),
        ("replace", b"\xff", "not JSON"),
        ("replace", b"[" * 100_000, "not JSON"),
        ("replace", b"[]", "expected an object, got list"),
        ("replace", b"{}", "position: expected a value, got none"),
        ("replace", b'{"position": 3}', "expected one of token_id and text"),
        ("replace", b'{"position": 3, "text": "a", "token_id": 1}', "expected one of token_id and text"),
        ("replace", b'{"position": "3", "text": "a"}', "position: expected an integer, got '3'"),
        ("replace", b'{"position": true, "text": "a"}', "position: expected an integer, got 'True'"),
        ("replace", b'{"position": 99, "text": "a"}', "position: expected 0"),
        ("replace", b'{"position": -1, "text": "a"}', "position: expected 0"),
        ("replace", b'{"position": 3, "token_id": 999999}', "replacement"),
        ("replace", b'{"position": 3, "text": ""}', "replacement"),
        ("replace", b'{"position": 3, "text": "\\ud800"}', "text"),
        ("replace", b'{"position": 3, "text": "a", "confidence": NaN}', "confidence"),
        ("replace", b'{"position": 3, "text": "a", "confidence": 2}', "confidence"),
        (
            "replace",
            b'{"position": 3, "text": "a", "confidence": 0.5, "target_probability": 0.5}',
            "target_probability",
        ),
        ("replace", b'{"position": 3, "text": "a", "\\u001b[2J": 1}', "expected one of version, position"),
        ("open", b'{"index": 99}', "index: expected 0"),
        ("open", b'{"index": -1}', "index: expected 0"),
        ("open", b'{"index": 0, "discard": 1}', "discard: expected true or false"),
        ("ask", b'{"text": " "}', "prompt: expected text"),
        ("ask", b'{"text": ["a"]}', "text: expected text"),
        ("undo", b"{}", "nothing to undo"),
        ("unmark", b'{"position": 0}', "no anchor"),
        ("keep", b"{}", "nothing to mark"),
        ("continue", b"{}", "finished"),
    ],
)
def test_a_malformed_request_gets_one_line_and_changes_nothing(client, desk, name, body, said):
    before = [token["id"] for token in desk.state()["tokens"]]
    answer = client.post(f"/api/{name}", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and said in answer.json()["error"] and "\n" not in answer.json()["error"]
    assert [token["id"] for token in settle(desk)["tokens"]] == before


def test_a_request_that_is_too_long(client):
    answer = client.post("/api/ask", json={"text": "a" * (1 << 20)})
    assert answer.status_code == 413


def test_another_tab_has_changed_the_answer(desk):
    one, other = client_of(desk), client_of(desk)
    version = one.get("/api/state").json()["version"]
    assert post(one, "replace", version=version, position=NAME, text="Aurora").status_code == 200
    late = post(other, "replace", version=version, position=NAME, text="Paris")
    assert late.status_code == 409 and late.json()["stale"]
    lost = post(other, "open", index=1)
    assert lost.status_code == 409 and lost.json()["unsaved"]
    assert one.get("/api/state").json()["tokens"][NAME] == other.get("/api/state").json()["tokens"][NAME]


def test_a_full_disk_is_said(client, desk, monkeypatch):
    def full(record):
        raise OSError("anchors.jsonl: the record cannot be written (No space left on device)")

    monkeypatch.setattr(desk.file, "append", full)
    answer = post(client, "accept")
    assert answer.status_code == 503 and "No space left" in answer.json()["error"]


# What is heard.


class Tab:
    """A browser's connection to /events."""

    def __init__(self, page):
        self.connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=30)
        self.cookie = f"fused-losses-{page.port}={page.secret}"
        self.connection.request("GET", "/events", headers={"Cookie": self.cookie})
        self.response = self.connection.getresponse()
        assert self.response.headers["content-type"].startswith("text/event-stream")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.response.close()
        self.connection.close()

    def next(self):
        lines = []
        while (line := self.response.readline().decode().rstrip("\n")) or not lines:
            lines.append(line)
        fields = dict(line.partition(": ")[::2] for line in lines)
        return fields["event"], json.loads(fields["data"])

    def until(self, kind, what=lambda data: True):
        while True:
            name, data = self.next()
            if name == kind and what(data):
                return data


def test_every_tab_hears_the_same(desk):
    with served(desk) as page, Tab(page) as one, Tab(page) as other:
        tabs = [one, other]
        for tab in tabs:
            assert [tab.next()[0], tab.next()[0]] == ["tasks", "state"]
        desk.replace(NAME, " Aurora")
        heard = []
        for tab in tabs:
            begun = tab.until("state")
            assert begun["generating"] and len(begun["tokens"]) == NAME + 1
            tokens = [tab.until("token")["token"]["text"] for _ in range(11)]
            heard.append(("".join(tokens), tab.until("state", lambda state: not state["generating"])))
        assert heard[0] == heard[1] and heard[0][0] == AURORA[len("My name is Aurora") :] + "<|end|>"


def test_text_of_a_model_is_one_line_of_an_event(tmp_path):
    said = "My\n\nevent: state\ndata: {}\r\n</script><img src=x onerror=alert(1)>\u2028"
    with opened(tmp_path / "a.jsonl", said) as desk, served(desk) as page, Tab(page) as tab:
        state = tab.until("state")
        whole = [token["text"] for token in state["tokens"] if token.get("part", [1])[0] == 1]
        assert "".join(whole) == said + "<|end|>"


def test_it_ends_with_open_tabs(desk):
    with contextlib.ExitStack() as stack:
        with served(desk) as page:
            tab = stack.enter_context(Tab(page))
            tab.until("state")
        assert tab.response.read() == b""


# The command.


@pytest.fixture
def refused(capsys):
    return functools.partial(commands.refused, capsys, "annotate")


def test_another_address_needs_a_flag(refused, tmp_path):
    output = str(tmp_path / "a.jsonl")
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.com"):
        assert "add --allow-remote" in refused("--demo", "--output", output, "--host", host)


def test_a_port_that_is_taken(refused, tmp_path):
    page = Page()
    page.socket.listen()
    said = refused("--demo", "--output", str(tmp_path / "a.jsonl"), "--port", str(page.port))
    page.socket.close()
    assert f"127.0.0.1 port {page.port}: cannot be opened" in said


def test_a_file_that_another_page_has_open_is_refused_before_the_model_is_loaded(refused, tmp_path):
    with RecordFile(tmp_path / "a.jsonl"):
        assert "another page or process has it open" in refused("--demo", "--output", str(tmp_path / "a.jsonl"))


def test_prompts_that_are_wrong_are_refused_before_the_model_is_loaded(refused, tmp_path):
    (tmp_path / "p.jsonl").write_text("{")
    said = refused("--demo", "--output", str(tmp_path / "a.jsonl"), "--prompts", str(tmp_path / "p.jsonl"))
    assert "p.jsonl:1: expected one JSON value" in said and not (tmp_path / "a.jsonl").exists()


def test_without_the_extra_the_remedy_is_said(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "starlette" else object())
    said = refused("--demo", "--output", str(tmp_path / "a.jsonl"))
    assert said == "annotate needs starlette; install with: pip install 'fused_losses[annotate]'"


CRASH = """
import sys, time
from pages import *
desk = desk_on(Path(sys.argv[1]))
desk.begin(); settle(desk)
desk.replace(NAME, " Aurora"); settle(desk)
desk.accept(); settle(desk)
desk.replace(NAME, " Aurora"); settle(desk)
print("ready", flush=True)
time.sleep(600)
"""


def test_a_killed_page_loses_no_record_and_no_correction(tmp_path):
    path = tmp_path / "a.jsonl"
    folders = os.pathsep.join([str(ROOT), str(ROOT / "tests/support"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", CRASH, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": folders},
    )
    try:
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(ValueError, match="another page or process has it open"):
            RecordFile(path)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        process.stdout.close()
    (record,) = read_records(path, tokenizer())
    assert record.completion.text == AURORA + "<|end|>"
    with opened(path) as desk:
        state = desk.state()
        assert (state["current"], state["done"], state["unsaved"]) == (1, 1, True)
        assert state["tokens"][NAME]["anchor"]["was"] == " Elena"


def test_the_printed_address_of_a_server_for_others(monkeypatch):
    monkeypatch.setattr(server.socket, "gethostname", lambda: "gpu7")
    page = Page("0.0.0.0")
    page.socket.close()
    assert page.address == f"http://gpu7:{page.port}/?token={page.secret}" and len(page.secret) >= 32


def test_a_desk_may_be_opened_again_after_a_server(tmp_path):
    desk = desk_on(tmp_path / "a.jsonl", ELENA)
    with served(desk):
        desk.begin()
    assert settle(desk)["finished"]
    desk.close()
    RecordFile(tmp_path / "a.jsonl").close()
