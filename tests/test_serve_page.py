"""The web page in a real headless Chromium, over a real endpoint."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serve_process import Server, create, make_endpoint_tree, make_jsonl, make_line, running, wait_for, wait_over

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None and "CI" not in os.environ, reason="no chromium on this machine; CI installs it"
)
WAIT_MS = 30_000
MARKUP = "<img src=x onerror=\"document.title='broken'\">"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("page")
    with running(Server(folder, make_endpoint_tree(str(folder / "store")))) as started:
        yield started


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser: sync_api.Browser, server: Server) -> Iterator[sync_api.Page]:
    """Signed in; at its end nothing was asked of elsewhere and no script had failed."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, color_scheme="light")
    opened, asked, faults = context.new_page(), [], []
    opened.set_default_timeout(WAIT_MS)
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.goto(home(server))
    opened.fill("#key", server.keys["acme"])
    opened.click("#key-form button")
    opened.wait_for_selector("#start-form:visible")
    yield opened
    context.close()
    assert all(url.startswith((home(server), "data:", f"blob:{home(server)}")) for url in asked)
    assert not faults


def home(server: Server) -> str:
    return server.url.removesuffix("/v1") + "/"


def picture(page: sync_api.Page, name: str) -> None:
    """For people to look at, where they ask for it."""
    if folder := os.environ.get("BATCHGEN_PICTURES"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def test_a_wrong_key_is_told_and_shows_nothing(browser: sync_api.Browser, server: Server) -> None:
    page = browser.new_page()
    page.goto(home(server))
    page.fill("#key", "sk-wrong")
    page.click("#key-form button")
    page.get_by_role("alert").get_by_text("Incorrect API key").wait_for(timeout=WAIT_MS)
    assert page.is_hidden("#start")
    assert page.is_hidden("#list")
    page.close()


def test_upload_start_and_look_at_the_first_results(page: sync_api.Page) -> None:
    lines = [make_line(f"row-{number}") for number in range(120)]
    lines[0]["body"]["messages"][0]["content"] = MARKUP
    lines[0]["custom_id"] = MARKUP
    page.set_input_files("#file", {"name": "in.jsonl", "mimeType": "application/jsonl", "buffer": make_jsonl(lines)})
    page.click("#go")
    page.locator("#facts").get_by_text("completed", exact=True).wait_for()
    page.locator("#latency-plot svg").wait_for()
    page.click("#first")
    page.locator(".result").nth(9).wait_for()
    assert page.locator(".result").count() == 10
    assert page.locator(".result .small").first.inner_text().startswith(MARKUP), (
        "shown as text, not made part of the page"
    )
    assert page.title() == "batchgen"
    with page.expect_download() as download:
        page.click("#output")
    assert len(Path(download.value.path()).read_bytes().splitlines()) == 120
    picture(page, "finished")
    page.emulate_media(color_scheme="dark")
    picture(page, "finished-dark")


def test_a_large_file_goes_in_parts(page: sync_api.Page, tmp_path: Path) -> None:
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url))
    path = tmp_path / "large.jsonl"  # Playwright gives larger ones by their path only
    path.write_bytes(make_jsonl([make_line(f"r{number}", user="y" * 10_000) for number in range(1800)]))
    page.set_input_files("#file", path)
    page.click("#go")
    page.locator("#facts").get_by_text("completed", exact=True).wait_for()
    page.locator("#facts").get_by_text("1,800").first.wait_for()
    assert sum(url.endswith("/parts") for url in sent) == 3
    assert not [url for url in sent if url.endswith("/v1/files")]


def test_a_running_batch_shows_rates_and_is_cancelled(page: sync_api.Page, server: Server) -> None:
    batch = create(server.client(), [make_line(f"slow-{number}", model="slow") for number in range(400)])
    page.locator(f'#list button[title="{batch.id}"]').click()
    page.locator("#rate-plot polyline").wait_for()
    picture(page, "running")
    page.set_viewport_size({"width": 390, "height": 844})
    picture(page, "running-narrow")
    page.click("#cancel")
    wait_over(server.client(), batch.id)
    page.locator("#facts").get_by_text("cancelled", exact=True).wait_for()


def test_what_is_wrong_with_a_file_is_told(page: sync_api.Page) -> None:
    page.set_input_files(
        "#file", {"name": "bad.jsonl", "mimeType": "application/jsonl", "buffer": b'{"custom_id": 1}\n'}
    )
    page.click("#go")
    page.locator("#error-table").get_by_text("line 1").first.wait_for()
    picture(page, "refused")


def test_a_download_that_fails_and_a_reply_that_is_no_json_are_told(page: sync_api.Page, server: Server) -> None:
    batch = create(server.client(), [make_line("lost")])
    wait_over(server.client(), batch.id)
    page.locator(f'#list button[title="{batch.id}"]').click()
    page.locator("#facts").get_by_text("completed", exact=True).wait_for()
    page.route("**/content", lambda route: route.fulfill(status=503, body="<html>busy</html>"))
    page.click("#output")
    page.get_by_role("alert").get_by_text("The endpoint answered 503.").wait_for()
    page.route("**/v1/files", lambda route: route.fulfill(status=502, body="<html>gone</html>"))
    page.set_input_files("#file", {"name": "a.jsonl", "mimeType": "application/jsonl", "buffer": b"{}"})
    page.click("#go")
    page.get_by_role("alert").get_by_text("The endpoint answered 502.").wait_for()
    assert page.is_enabled("#go"), "it can be tried again"


def test_another_tenants_batch_is_not_shown(page: sync_api.Page, server: Server) -> None:
    batch = create(server.client("globex"), [make_line("theirs")])
    wait_for(server.client("globex"), batch.id, {"completed"})
    page.reload()
    page.wait_for_selector("#start-form:visible")
    assert page.locator(f'#list button[title="{batch.id}"]').count() == 0


def test_the_page_is_open_and_its_policy_is_strict(server: Server) -> None:
    for path, kind in (("", "text/html"), ("page.css", "text/css"), ("page.js", "text/javascript")):
        answer = httpx.get(home(server) + path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_a_report_is_its_tenants_only(server: Server) -> None:
    batch = create(server.client(), [make_line("mine")])
    wait_over(server.client(), batch.id)
    url = f"{server.url}/batches/{batch.id}/report"
    found = httpx.get(url, headers={"authorization": f"Bearer {server.keys['acme']}"})
    assert found.json()["rows"]["ok"] == 1
    assert found.json().keys() == {"state", "made_at", "rows", "job", "histograms", "timeline", "errors"}
    assert httpx.get(url, headers={"authorization": f"Bearer {server.keys['globex']}"}).status_code == 404
    assert httpx.get(url).status_code == 401


def test_the_report_of_a_batch_that_is_over_is_its_last(server: Server) -> None:
    """A page asks for it once; one that was made while the batch ran would stay there."""
    client = server.client()
    batch = create(client, [make_line(f"r{row}") for row in range(300)])
    url, headers = f"{server.url}/batches/{batch.id}/report", {"authorization": f"Bearer {server.keys['acme']}"}
    give_up_at = time.monotonic() + 60
    while client.batches.retrieve(batch.id).status != "completed":
        assert httpx.get(url, headers=headers).status_code in (200, 409)
        assert time.monotonic() < give_up_at
    assert httpx.get(url, headers=headers).json()["rows"]["ok"] == 300
