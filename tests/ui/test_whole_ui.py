"""What holds on every page: phones, keyboards, themes, hostile names, tokens, lost connections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from playwright.sync_api import Page, expect

from optimizer.ports import Candidate
from optimizer.space import make_space
from tests.ui.conftest import OpenTab, StartService, Tab
from tests.ui.service import Service, browser_problem, browser_spec, running_service

HOSTILE = "<img src=x onerror=window.hacked=1><script>window.hacked=1</script>"


def overflow(page: Page) -> int:
    return int(page.evaluate("document.documentElement.scrollWidth - window.innerWidth"))


def test_no_page_overflows_a_phone(service: Service, phone: Tab) -> None:
    page = phone.page
    job = service.submit(name="a rather long name of a job that does not fit a phone " * 2)
    service.evaluate(job, 10)
    phone.open(f"{service.url}#/jobs")
    expect(page.locator(".job-row")).to_have_count(1)
    assert overflow(page) <= 0
    phone.open(f"{service.url}#/jobs/{job.id}?candidate=3")
    phone.front_points(10)
    expect(page.locator(".heat")).to_be_visible()
    page.get_by_role("heading", name="Job spec").click()
    assert overflow(page) <= 0
    page.get_by_role("button", name="Enqueue").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    assert overflow(page) <= 0
    page.keyboard.press("Escape")
    phone.open(f"{service.url}#/new")
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_text("problems to put right")).to_be_visible()
    assert overflow(page) <= 0


def test_by_keyboard_alone(service: Service, tab: Tab) -> None:
    page, keys = tab.page, tab.page.keyboard
    job = service.submit()
    service.evaluate(job, 6)
    tab.open(f"{service.url}#/jobs")
    page.reload()  # puts the focus at the beginning
    expect(page.locator(".job-row")).to_have_count(1)
    keys.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    keys.press("Enter")
    expect(page.locator("main")).to_be_focused()
    for name in ("Filter by name", "Filter by state"):
        keys.press("Tab")
        expect(page.get_by_label(name)).to_be_focused()
    keys.press("Tab")
    keys.press("Tab")
    expect(page.locator(".job-name")).to_be_focused()
    assert page.evaluate("getComputedStyle(document.querySelector('.job-row')).outlineStyle") == "solid"
    keys.press("Enter")
    tab.front_points(6)
    expect(page.locator("main")).to_be_focused()
    keys.press("Tab")
    keys.press("Tab")
    expect(page.get_by_role("button", name="Pause")).to_be_focused()
    keys.press("Tab")
    keys.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    keys.press("Escape")
    expect(page.get_by_role("button", name="Cancel", exact=True)).to_be_focused()
    choose = page.get_by_role("button", name="Show candidate 4")
    choose.focus()
    keys.press("Enter")
    expect(page.locator(".candidate-card h3")).to_have_text("#4 · uniform")
    assert job.id in page.url


def test_a_dialog_goes_with_the_page_that_opened_it(service: Service, tab: Tab) -> None:
    page = tab.page
    service.submit()
    tab.open(f"{service.url}#/jobs")
    page.locator(".job-name").click()
    page.get_by_role("button", name="Enqueue").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    page.go_back()  # what a phone's users close a dialog by
    expect(page.locator(".job-name")).to_be_visible()
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_names_and_labels_are_never_markup(service: Service, tab: Tab) -> None:
    page = tab.page
    candidates = [{"label": HOSTILE, "coefficients": {"language": 0.5}}]
    job = service.submit(name=HOSTILE, warm_starts={"candidates": candidates})
    service.evaluate(job, 8)
    tab.open(f"{service.url}#/jobs")
    expect(page.locator(".job-name")).to_have_text(HOSTILE)
    tab.open(f"{service.url}#/jobs/{job.id}?candidate=0")
    tab.front_points(8)
    expect(page.get_by_role("heading", level=1)).to_have_text(HOSTILE)
    expect(page.locator(".candidate-card h3")).to_contain_text(HOSTILE)
    expect(page.locator(".plot-front .textpoint").filter(has_text="<img")).to_have_count(1)
    tab.open(f"{service.url}#/new?clone={job.id}")
    expect(page.get_by_role("heading", level=1)).to_contain_text(HOSTILE)
    assert page.evaluate("window.hacked") is None
    assert page.locator("main img, main script").count() == 0


def test_the_theme_follows_the_system_and_the_button(service: Service, open_tab: OpenTab) -> None:
    tab = open_tab(color_scheme="dark")
    page = tab.page
    tab.open(f"{service.url}#/jobs")
    root = page.locator("html")
    expect(root).to_have_attribute("data-theme", "dark")
    page.emulate_media(color_scheme="light")
    expect(root).to_have_attribute("data-theme", "light")
    page.get_by_role("button", name="Switch to the dark theme").click()
    expect(root).to_have_attribute("data-theme", "dark")
    page.reload()
    expect(root).to_have_attribute("data-theme", "dark")
    expect(page.get_by_role("button", name="Switch to the light theme")).to_be_visible()


def test_asks_for_a_token(start_service: StartService, open_tab: OpenTab) -> None:
    tab = open_tab()
    tab.expected.append("401")
    service = start_service(require_token="always")
    _, secret = service.store.create_token("me")
    job = service.submit(name="guarded")
    page = tab.page
    tab.open(f"{service.url}#/jobs")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("needs an access token")
    dialog.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("heading", name="An access token is needed")).to_be_visible()
    expect(page.get_by_text("guarded")).to_have_count(0)  # without a token nothing is shown
    page.get_by_role("button", name="Try again").click()
    dialog.get_by_label("Token").fill("wrong")
    dialog.get_by_role("button", name="Continue").click()
    expect(dialog).to_contain_text("was not accepted")
    dialog.get_by_label("Token").fill(secret)
    dialog.get_by_role("button", name="Continue").click()
    expect(page.locator(".job-name")).to_have_text("guarded")
    page.reload()  # the token stays for the tab
    page.locator(".job-name").click()
    service.allow(3)
    tab.front_points(3)
    expect(page.locator("#stream")).to_have_text("Live")
    assert service.store.get_job(job.id).progress.completed == 3


def test_a_lost_connection_shows_and_heals(tmp_path: Path, open_tab: OpenTab) -> None:
    tab = open_tab()
    tab.expected.append("ERR_")
    page = tab.page
    stream = page.locator("#stream")
    with running_service(tmp_path) as service:
        job = service.submit()
        service.evaluate(job, 6)
        tab.open(f"{service.url}#/jobs/{job.id}")
        tab.front_points(6)
        expect(stream).to_have_text("Live")
    expect(stream).to_have_text("Reconnecting…")
    with running_service(tmp_path, port=service.port) as service:
        service.evaluate(job, 5)
        expect(stream).to_have_text("Live")
        tab.front_points(11)
        numbers = page.locator(".log li").filter(has_text="language").all_inner_texts()
        assert len(numbers) == len(set(numbers)) == 11  # none lost, none twice


def test_the_end_of_a_long_log_is_found(start_service: StartService, tab: Tab) -> None:
    service = start_service(work=False)
    job = service.submit()
    lease = service.store.claim("test", 60, job.id)
    assert lease is not None
    spec = browser_spec()
    problem = browser_problem(spec)
    service.store.start(lease, problem)
    space = make_space(spec, problem)
    recipe = space.recipe(space.uniform())

    def candidate(index: int) -> Candidate:  # a generation each, so that each has an event
        return Candidate(
            index=index,
            generation=index,
            told=0,
            origin="algorithm",
            label=None,
            genome=space.uniform(),
            recipe=recipe.to_json(),
            fingerprint=recipe.fingerprint,
            duplicate_of=0 if index else None,
        )

    service.store.add_candidates(lease, [candidate(index) for index in range(2345)])
    tab.open(f"{service.url}#/jobs/{job.id}")
    log = tab.page.locator(".log li")
    expect(log).to_have_count(200)
    expect(log.last).to_contain_text("Proposed #2344 (generation 2344)")
    service.store.set_state(lease, "paused", "enough")
    expect(log.last).to_contain_text("The job is paused: enough")


TRICKY: list[Any] = [
    "yes", "No", "null", "~", "1", "1e3", "0x1f", "", " ", "a: b", "# no", "- x", "{}", "[a]", "a\nb", "tab\t", "é ☃",
    "'", '"', "\\", "*a", "&a", "!t", "%d", "@", "`", "a ", " a", "2026-01-01", "12:30", "on", "y", "=", "<<", "?", "|",
    None, True, 0, -1.5, 1e-9, 1e300, [], {}, [[]], [{}], [[1], [2, 3]], {"a": {}}, {"yes": {"1": [{"b": [{"c": 1}]}]}},
]  # fmt: skip


@pytest.mark.parametrize("nested", [False, True])
def test_yaml_is_written_so_that_it_reads_back(service: Service, tab: Tab, nested: bool) -> None:
    data: dict[str, Any] = {
        "items": [{"v": value, "w": [value, {"x": value}]} if nested else value for value in TRICKY]
    }
    data |= {str(value): value for value in TRICKY if isinstance(value, str)}
    tab.open(f"{service.url}#/jobs")
    write = "async (data) => (await import('/ui/js/core/yaml.js')).toYaml(data)"
    assert yaml.safe_load(tab.page.evaluate(write, data)) == data


def test_events_are_read_whatever_the_chunks(service: Service, tab: Tab) -> None:
    tab.open(f"{service.url}#/jobs")
    text = ': hi\nretry: 5\n\nid: 1\nevent: a\ndata: {"x":\ndata: 1}\n\nid: 2\r\ndata:no space\r\n\r\ndata: last\n\n'
    read = """async ([text, size]) => {
        const { parser } = await import("/ui/js/core/stream.js");
        const got = [];
        const feed = parser((message) => got.push(message));
        for (let at = 0; at < text.length; at += size) feed(text.slice(at, at + size));
        return got;
    }"""
    wanted = [{"id": "1", "data": '{"x":\n1}'}, {"id": "2", "data": "no space"}, {"id": "2", "data": "last"}]
    for size in (1, 2, 3, 7, 1000):
        assert tab.page.evaluate(read, [text, size]) == wanted
