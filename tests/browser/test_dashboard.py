"""The dashboard in a real browser, over the fake backend: rows, sum, live updates, login, narrow screens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.gateway.conftest import RunningGateway, run_gateway
from tests.gateway.fake_backend import KEY, FakeBackend, example_request

pytestmark = pytest.mark.browser


@pytest.fixture
def gateway() -> Iterator[RunningGateway]:
    yield from run_gateway(FakeBackend())


def test_rows_and_sum(gateway: RunningGateway, page: Page, artefacts: Path) -> None:
    page.goto(gateway.url)
    expect(page.locator("#connection")).to_have_text("live")
    members = page.get_by_role("table", name="Members")
    expect(members.locator("tbody tr")).to_have_count(3)
    expect(members.get_by_role("row", name="alice")).to_contain_text("812.345678")
    expect(members.get_by_role("row", name="bob")).to_contain_text("−312.345678")
    expect(members.get_by_role("row", name="Treasury")).to_contain_text("500.000000")
    expect(members.get_by_role("row", name="Issuance")).to_contain_text("−1,000.000000")
    expect(members.locator("tr.sum td.strong")).to_have_text("0")
    treasury = page.get_by_role("region", name="Treasury")
    for fact in ("Policy2-e4b8d", "Levy2.5%", "Dividends50% of it every 7d", "Dividends paid4.200000"):
        expect(treasury).to_contain_text(fact)
    nodes = page.get_by_role("table", name="Nodes")
    expect(nodes.get_by_role("row", name="bo-macbook")).to_contain_text("smollm2-135m [10:20)")
    expect(page.locator(".strips rect.loaded")).to_have_count(3)
    assert page.locator(".strips rect.loaded").nth(1).get_attribute("x") == "10"
    page.screenshot(path=artefacts / "dashboard.png", full_page=True)


def test_a_change_is_seen_without_reloading(gateway: RunningGateway, page: Page) -> None:
    page.goto(gateway.url)
    rows = page.get_by_role("table", name="Recent requests").locator("tbody tr")
    expect(rows).to_have_count(1)
    expect(page.locator("#connection")).to_have_text("live")
    view = gateway.backend.view
    alice, bob, carol = view.members
    spent = 22_195_000
    members = (
        replace(alice, balance_microcredits=alice.balance_microcredits - spent),
        replace(bob, balance_microcredits=bob.balance_microcredits + spent),
        carol,
    )
    nodes = (replace(view.nodes[0], live=False), *view.nodes[1:])
    requests = (example_request(2), *view.requests)
    gateway.call(lambda: gateway.backend.show(replace(view, members=members, nodes=nodes, requests=requests)))
    expect(rows).to_have_count(2)
    expect(page.locator("tr.sum td.strong")).to_have_text("0")
    expect(page.get_by_role("row", name="alice owner")).to_contain_text("790.150678")
    expect(page.get_by_role("row", name="alice owner").locator("td.changed")).to_have_count(1)
    expect(page.locator("#news")).to_contain_text("2 of 3 nodes live")
    expect(page.get_by_role("table", name="Nodes").locator("tr.dead")).to_contain_text("ada-desktop")


def test_books_that_do_not_balance_are_shown_so(gateway: RunningGateway, page: Page) -> None:
    gateway.backend.view = replace(gateway.backend.view, treasury_microcredits=500_000_001)
    page.goto(gateway.url)
    expect(page.locator("tr.sum.bad td.strong")).to_have_text("0.000001")
    expect(page.locator(".figures .bad")).to_contain_text("books do not balance")


def test_hostile_names_stay_text(gateway: RunningGateway, page: Page) -> None:
    """In the first page and in what arrives live, which a script puts into the page."""
    evil = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"
    view = gateway.backend.view
    gateway.backend.view = replace(view, members=(replace(view.members[0], name=evil), *view.members[1:]))
    page.goto(gateway.url)
    expect(page.locator("#connection")).to_have_text("live")
    expect(page.get_by_role("table", name="Members").locator("tbody th").first).to_have_text(evil)
    requests = (replace(example_request(2), member_name=evil), *view.requests)
    gateway.call(lambda: gateway.backend.show(replace(view, requests=requests)))
    expect(page.get_by_role("table", name="Recent requests").locator("tbody th").first).to_have_text(evil)
    assert page.title() == "team-pod · gpu-pod"


def test_from_elsewhere_one_logs_in(gateway: RunningGateway, page: Page, artefacts: Path) -> None:
    page.goto(f"http://pod.example:{gateway.port}/")
    expect(page).to_have_url(f"http://pod.example:{gateway.port}/login")
    page.screenshot(path=artefacts / "login.png")
    page.get_by_label("API key").fill(KEY)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("heading", name="team-pod")).to_be_visible()
    expect(page.locator("#connection")).to_have_text("live")
    page.get_by_role("button", name="Log out").click()
    page.goto(f"http://pod.example:{gateway.port}/")
    expect(page.get_by_role("button", name="Log in")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_never_scrolls_sideways(
    gateway: RunningGateway, browser: Browser, artefacts: Path, scheme: str
) -> None:
    view = gateway.backend.view
    long = "a-member-with-a-very-long-name-and-no-place-to-break" * 2
    gateway.backend.view = replace(view, members=(replace(view.members[0], name=long), *view.members[1:]))
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    for width in (390, 860, 900, 1280):
        page.set_viewport_size({"width": width, "height": 844})
        page.goto(gateway.url)
        expect(page.locator("#connection")).to_have_text("live")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.screenshot(path=artefacts / f"dashboard-{scheme}-{width}.png", full_page=True)
    context.close()
