"""Who may look: the dashboard, its events and the metrics need local access or a login."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import httpx
import pytest

from node.dashboard.live_view import MAX_NUM_CONNECTIONS
from node.gateway.access import COOKIE, LOGIN_LIFETIME_S, MAX_NUM_LOGIN_ATTEMPTS, Logins
from node.gateway.errors import ApiError
from node.gateway.serve import ListenError, bind
from tests.gateway.conftest import RunningGateway, wait_until
from tests.gateway.fake_backend import ALICE, KEY, REVOKED_KEY, FakeBackend

ELSEWHERE = {"host": "pod.example:8000"}


@pytest.fixture
def browser(gateway: RunningGateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, timeout=10) as client:
        yield client


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1", "127.9.9.9:80", "[::1]:8000"])
def test_this_machine_needs_no_login(browser: httpx.Client, host: str) -> None:
    assert browser.get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        ELSEWHERE,
        {"host": "localhost.evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "localhost@evil.example"},
        {"host": "[::1"},
        {"x-forwarded-for": "127.0.0.1"},
        {"forwarded": "for=127.0.0.1"},
    ],
)
def test_a_rebound_name_or_a_proxy_needs_one(browser: httpx.Client, headers: dict[str, str]) -> None:
    page = browser.get("/", headers=headers)
    assert (page.status_code, page.headers["location"]) == (303, "/login")
    assert "team-pod" not in browser.get("/login", headers=headers).text
    assert browser.get("/events", headers=headers).status_code == 401
    assert browser.get("/metrics", headers=headers).status_code == 401
    assert browser.get("/healthz", headers=headers).text == "ok\n"


def test_login_and_logout(gateway: RunningGateway, browser: httpx.Client) -> None:
    answer = browser.post("/login", data={"key": KEY}, headers=ELSEWHERE)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert f"max-age={LOGIN_LIFETIME_S}" in cookie
    login = ELSEWHERE | {"cookie": f"{COOKIE}={answer.cookies[COOKIE]}"}
    browser.cookies.clear()
    assert "Log out" in browser.get("/", headers=login).text
    assert browser.get("/metrics", headers=login).status_code == 200
    gateway.backend.revoked.add(ALICE.key_id)
    assert browser.get("/", headers=login).status_code == 303
    assert f'{COOKIE}=""' in browser.post("/logout", headers=login).headers["set-cookie"]


def test_a_refused_key_says_why_and_shows_itself_nowhere(browser: httpx.Client) -> None:
    answer = browser.post("/login", data={"key": REVOKED_KEY}, headers=ELSEWHERE)
    assert answer.status_code == 401
    assert "it was revoked" in answer.text
    assert REVOKED_KEY not in answer.text
    assert "set-cookie" not in answer.headers


def test_attempts_are_limited(browser: httpx.Client) -> None:
    for _ in range(MAX_NUM_LOGIN_ATTEMPTS):
        assert browser.post("/login", data={"key": "guess"}).status_code == 401
    answer = browser.post("/login", data={"key": KEY})
    assert answer.status_code == 429
    assert 0 < int(answer.headers["retry-after"]) <= 61


def test_forms_from_other_sites_and_broken_ones(browser: httpx.Client) -> None:
    foreign = {"origin": "https://evil.example"}
    assert browser.post("/login", data={"key": KEY}, headers=foreign).status_code == 403
    assert browser.post("/logout", headers=foreign).status_code == 403
    assert browser.post("/login", content=b"key=" + b"x" * 20_000).status_code == 413
    assert browser.post("/login", content=b"a=1&" * 50).status_code == 400
    assert browser.post("/login", content=b"\xff").status_code == 400


def test_cookies_expire_and_cannot_be_made_up() -> None:
    now_s = 1000.0
    logins = Logins(FakeBackend(), now_s=lambda: now_s)
    cookie = logins.cookie(ALICE)
    assert logins.is_valid(cookie)
    for made_up in (
        "",
        "a.b.c.d",
        "9" * 9 + cookie[4:],
        cookie[:-1],
        Logins(FakeBackend()).cookie(ALICE),
        "é.é",
    ):
        assert not logins.is_valid(made_up)
    now_s += LOGIN_LIFETIME_S
    assert not logins.is_valid(cookie)


def test_attempts_are_counted_per_address_and_forgotten() -> None:
    now_s = 1000.0
    logins = Logins(FakeBackend(), now_s=lambda: now_s)

    def attempt_all(address: str) -> None:
        for _ in range(MAX_NUM_LOGIN_ATTEMPTS):
            logins.count_attempt(address)

    attempt_all("a")
    attempt_all("b")
    with pytest.raises(ApiError):
        logins.count_attempt("a")
    now_s += 61
    attempt_all("a")


def test_every_answer_forbids_framing_and_foreign_scripts(browser: httpx.Client) -> None:
    for path in ("/", "/login", "/healthz", "/v1/models", "/nowhere", "/static/dashboard.css"):
        headers = browser.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script(?! src=)|\son\w+=|\sstyle=", browser.get("/").text)


def test_names_of_others_are_text(gateway: RunningGateway, browser: httpx.Client) -> None:
    """Every string another member can choose, in every place where it is shown."""
    evil = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>"
    view = gateway.backend.view
    node = replace(view.nodes[0], name=evil, member_name=evil, device=evil, address=evil, note=evil)
    shard = replace(node.shards[0], model_name=evil)
    gateway.backend.view = replace(
        view,
        pod_name=evil,
        node_name=evil,
        member_name=evil,
        members=(replace(view.members[0], name=evil, role=evil),),
        nodes=(replace(node, shards=(shard,)), replace(node, shards=())),
        models=(replace(view.models[0], name=evil, dtype=evil, reason=evil),),
        requests=(replace(view.requests[0], member_name=evil, model_name=evil, route_text=evil),),
        ledger=replace(view.ledger, num_violations=1, first_violation=evil),
    )
    page = browser.get("/").text
    assert "<script>" not in page
    assert "<img src=x" not in page
    assert page.count("&lt;script&gt;") >= 15


def test_metrics_say_what_the_dashboard_says(browser: httpx.Client) -> None:
    browser.post(
        "/v1/chat/completions",
        json={"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]},
        headers={"authorization": f"Bearer {KEY}"},
    )
    browser.get("/nowhere/at/all")
    # Counted after the answer has left, so perhaps a moment after it was read here.
    for line in (
        'pod_output_tokens_total{model="tiny"} 20.0',
        'pod_http_requests_total{route="/v1/chat/completions",status="200"} 1.0',
        'pod_http_requests_total{route="other",status="404"} 1.0',
    ):
        wait_until(line, lambda line=line: line in browser.get("/metrics").text)
    text = browser.get("/metrics").text
    balance = re.search(r'pod_balance_microcredits\{account="bob"\} (\S+)', text)
    assert balance is not None
    assert float(balance[1]) == -312_345_678
    assert "pod_books_sum_microcredits 0.0" in text
    stage = '{model="smollm2-135m",node="ada-desktop"}'
    for name, value in (("compute", 0.5), ("queue", 0.25), ("hop", 0.125)):
        assert f"pod_stage_{name}_seconds_sum{stage} {value}" in text
        assert f"pod_stage_{name}_seconds_count{stage} 128.0" in text
    key = {"authorization": f"Bearer {KEY}"}
    assert browser.get("/metrics", headers=ELSEWHERE | key).status_code == 200


def test_open_dashboards_are_limited_and_end_with_the_node(gateway: RunningGateway) -> None:
    open_lines: list[Iterator[str]] = []  # a response is closed when its iterator is forgotten
    with ExitStack() as stack:
        limits = httpx.Limits(max_connections=MAX_NUM_CONNECTIONS + 1)
        client = stack.enter_context(httpx.Client(base_url=gateway.url, timeout=10, limits=limits))
        for _ in range(MAX_NUM_CONNECTIONS):
            response = stack.enter_context(client.stream("GET", "/events"))
            lines = response.iter_lines()
            assert next(lines) == "event: view"
            open_lines.append(lines)
        assert client.get("/events").json()["error"]["code"] == "too_many_dashboards"
    wait_until("the places are free again", lambda: _opens(gateway))


def _opens(gateway: RunningGateway) -> bool:
    with httpx.stream("GET", f"{gateway.url}/events", timeout=10) as response:
        return response.status_code == 200


def test_a_taken_port_is_one_clear_line() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ListenError, match=f"port {port} on 127.0.0.1 is taken") as caught:
            bind("127.0.0.1", port)
    assert "\n" not in str(caught.value)
    with pytest.raises(ListenError, match="not an address of this machine"):
        bind("192.0.2.1", 0)
    with pytest.raises(ListenError, match="70000 is not a port"):
        bind("127.0.0.1", 70_000)
