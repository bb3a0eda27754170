"""The list of jobs: filters, pages, live progress."""

from __future__ import annotations

from playwright.sync_api import expect

from tests.ui.conftest import StartService, Tab
from tests.ui.service import Service, browser_spec


def test_an_empty_list_says_how_to_begin(service: Service, tab: Tab) -> None:
    tab.open(service.url.removesuffix("ui/"))  # leads to the UI
    expect(tab.page.get_by_role("heading", name="No jobs yet")).to_be_visible()
    expect(tab.page.get_by_text("mergeopt submit job.yaml")).to_be_visible()
    tab.page.get_by_role("main").get_by_role("link", name="New job").last.click()
    expect(tab.page.get_by_role("heading", name="New job")).to_be_visible()


def test_progress_is_live(service: Service, tab: Tab) -> None:
    page = tab.page
    tab.open(f"{service.url}#/jobs")
    expect(page.get_by_role("heading", name="No jobs yet")).to_be_visible()
    job = service.submit(name="a new job")  # somebody else's
    row = page.locator(f"[data-job='{job.id}']")
    expect(row).to_contain_text("Running")
    expect(row).to_contain_text("0 / 40 evaluations")
    service.allow(7)
    expect(row).to_contain_text("7 / 40 evaluations")
    best = service.store.get_job(job.id).best
    expect(row).to_contain_text(f"{best[0]:.4f}")
    service.allow(40)
    expect(row).to_contain_text("Completed")
    row.click()
    expect(page.get_by_role("heading", level=1)).to_have_text("a new job")


def test_filters_by_state_and_name(start_service: StartService, tab: Tab) -> None:
    service = start_service(work=False)
    jobs = [service.submit(name=name) for name in ("apple pie", "apple cake", "plum cake")]
    service.store.request(jobs[1].id, "cancel")
    page = tab.page
    tab.open(f"{service.url}#/jobs")
    rows = page.locator(".job-row")
    expect(rows).to_have_count(3)
    expect(rows.first).to_contain_text("plum cake")  # newest first
    page.get_by_label("Filter by name").fill("apple")
    expect(rows).to_have_count(2)
    page.get_by_label("Filter by state").select_option("Cancelled")
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text("apple cake")
    page.reload()  # the address keeps the filters
    expect(rows).to_have_count(1)
    page.get_by_label("Filter by name").fill("plum")
    expect(page.get_by_role("heading", name="No job matches")).to_be_visible()


def test_loads_more(start_service: StartService, tab: Tab) -> None:
    service = start_service(work=False)
    for number in range(53):
        service.store.create_job(browser_spec(name=f"job {number}"))
    tab.open(f"{service.url}#/jobs")
    rows = tab.page.locator(".job-row")
    expect(rows).to_have_count(50)
    tab.page.get_by_role("button", name="Load more").click()
    expect(rows).to_have_count(53)
    expect(rows.last).to_contain_text("job 0")
    expect(tab.page.get_by_role("button", name="Load more")).to_be_hidden()
