"""The dashboard of a real node in a real browser: rows, the sum, and a request seen without reloading."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.conftest import MODEL, LocalPod

pytestmark = [pytest.mark.processes, pytest.mark.browser]

TIMEOUT_MS = 15_000


def test_a_request_is_seen_live_and_the_books_balance(pod: LocalPod, page: Page, artefacts: Path) -> None:
    page.goto(pod.nodes[2].api_url)
    expect(page.locator("#connection")).to_have_text("live", timeout=TIMEOUT_MS)
    members = page.get_by_role("table", name="Members").locator("tbody tr")
    expect(members).to_have_count(3)
    for node in pod.nodes:
        expect(page.get_by_role("table", name="Nodes").get_by_role("row", name=node.member)).to_contain_text(
            MODEL
        )
    expect(page.locator("tr.sum td.strong")).to_have_text("0")
    requests = page.get_by_role("table", name="Recent requests").locator("tbody tr")
    newest_before = requests.first.get_attribute("data-key") if requests.count() else ""
    # Asked at another node than the one that shows it.
    done = pod.client(1).completions.create(model=MODEL, prompt="Hello", temperature=0, max_tokens=5)
    assert done.usage is not None
    newest = page.locator(f'tbody tr[data-key]:not([data-key="{newest_before}"])', has_text="settled").first
    expect(newest).to_contain_text(MODEL, timeout=TIMEOUT_MS)
    expect(newest).to_contain_text(str(done.usage.completion_tokens))
    expect(page.locator("tr.sum td.strong")).to_have_text("0")
    page.screenshot(path=artefacts / "dashboard-of-a-pod.png", full_page=True)
