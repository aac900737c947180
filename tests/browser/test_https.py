"""The dashboard over HTTPS in a real browser: it warns of an authority it does not know; a login works."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Error, expect

from node.tls.certificates import make_authority
from node.tls.shown import server_context
from tests.gateway.conftest import RunningGateway, run_gateway
from tests.gateway.fake_backend import KEY, FakeBackend
from tests.tls.conftest import certified, now_ms

pytestmark = pytest.mark.browser


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[RunningGateway]:
    context, file = server_context(), tmp_path / "https.pem"
    certified(make_authority(bytes(32), "team", now_ms()), ["pod.example.lan"]).save(file)
    context.load_cert_chain(file)
    yield from run_gateway(FakeBackend(), tls=context)


def test_login_live_view_and_logout(gateway: RunningGateway, browser: Browser) -> None:
    url = f"https://pod.example:{gateway.port}"
    stranger = browser.new_context().new_page()
    with pytest.raises(Error, match="ERR_CERT_AUTHORITY_INVALID"):
        stranger.goto(url)
    stranger.context.close()
    # Chromium has no option to add an authority for one run; who verifies is tested in tests/tls.
    context = browser.new_context(ignore_https_errors=True)
    page = context.new_page()
    page.goto(url)
    expect(page).to_have_url(f"{url}/login")
    page.get_by_label("API key").fill(KEY)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("heading", name="team-pod")).to_be_visible()
    expect(page.locator("#connection")).to_have_text("live")
    (cookie,) = context.cookies()
    assert (cookie["secure"], cookie["httpOnly"], cookie["sameSite"]) == (True, True, "Strict")
    # A page of another site cannot log anybody out: neither cookie nor action goes through.
    elsewhere = context.new_page()
    elsewhere.goto("about:blank")
    elsewhere.set_content(f'<form method="post" action="{url}/logout"><button>Win</button></form>')
    with elsewhere.expect_response(f"{url}/logout") as answered:
        elsewhere.get_by_role("button").click()
    assert answered.value.status == 403
    page.reload()
    expect(page.get_by_role("heading", name="team-pod")).to_be_visible()
    page.get_by_role("button", name="Log out").click()
    expect(page).to_have_url(f"{url}/login")
    context.close()
