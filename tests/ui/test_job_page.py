"""A job's page: live plots, steering, candidates, exports."""

from __future__ import annotations

import pytest
from playwright.sync_api import Locator, Page, expect

from api.views import JobView
from tests.ui.conftest import StartService, Tab
from tests.ui.service import Service, browser_spec

STARTS = 5  # base, three experts, uniform


@pytest.fixture
def job(service: Service) -> JobView:
    return service.submit()


def open_job(tab: Tab, service: Service, job: JobView, query: str = "") -> Page:
    tab.open(f"{service.url}#/jobs/{job.id}{query}")
    expect(tab.page.get_by_role("heading", level=1)).to_have_text(job.name)
    return tab.page


def state(page: Page, text: str) -> None:
    expect(page.locator("#job-state")).to_have_text(text)


def rows(page: Page) -> Locator:
    return page.get_by_role("group", name="Table of candidates").locator("tbody tr")


def test_a_point_appears_without_reload(service: Service, tab: Tab, job: JobView) -> None:
    service.evaluate(job, 3)
    page = open_job(tab, service, job)
    tab.front_points(3)
    expect(page.locator("#stream")).to_have_text("Live")
    page.evaluate("window.mark = 1")
    service.allow(4)
    tab.front_points(7)
    expect(page.get_by_text("7 / 40")).to_be_visible()
    expect(page.get_by_role("log")).to_contain_text("#6:")
    expect(rows(page).filter(has_text="#6")).to_contain_text("0.")
    assert page.evaluate("window.mark") == 1


def test_the_zoom_stays_while_points_arrive(service: Service, tab: Tab, job: JobView) -> None:
    service.evaluate(job, 8)
    page = open_job(tab, service, job)
    tab.front_points(8)
    page.evaluate("Plotly.relayout(document.querySelector('.plot-front'), {'xaxis.range': [0.5, 0.9]})")
    service.allow(2)
    tab.front_points(10)
    assert page.evaluate("document.querySelector('.plot-front').layout.xaxis.range") == [0.5, 0.9]


def test_axes_say_which_way_is_better(service: Service, tab: Tab, job: JobView) -> None:
    service.evaluate(job, 8)
    page = open_job(tab, service, job)
    tab.front_points(8)
    title = page.locator(".plot-front .xtitle")
    expect(title).to_contain_text("← better")
    page.get_by_label("Objective on the x axis").select_option("continent")
    expect(title).to_contain_text("continent · accuracy")
    expect(title).to_contain_text("better →")
    expect(page.locator(".plot-front")).to_contain_text("uniform")


def test_pause_and_resume(service: Service, tab: Tab) -> None:
    job = service.submit(budget={"evaluations": 500})
    service.evaluate(job, 6)
    page = open_job(tab, service, job)
    tab.front_points(6)
    page.get_by_role("button", name="Pause").click()
    state(page, "Pausing…")
    with service.steady():  # the evaluation under way is finished
        state(page, "Paused")
    expect(page.locator("#announcer")).to_contain_text("Paused")
    done = service.store.get_job(job.id).progress.completed
    expect(page.get_by_text(f"{done} / 500")).to_be_visible()
    page.get_by_role("button", name="Resume").click()
    state(page, "Running")
    service.allow(3)
    expect(page.get_by_role("log")).to_contain_text(f"#{done + 2}:")
    tab.front_points(done + 3)


def test_a_spent_budget_is_raised_to_resume(service: Service, tab: Tab) -> None:
    job = service.submit(budget={"evaluations": 40, "requests": 6, "money": 5})
    page = open_job(tab, service, job)
    service.allow(40)
    state(page, "Paused")
    expect(page.get_by_text("the budget of 6 requests is spent").first).to_be_visible()
    page.get_by_role("button", name="Resume").click()
    dialog = page.get_by_role("dialog")
    requests, money = dialog.get_by_label("Requests"), dialog.get_by_label("Money")
    expect(requests).to_have_value("6")
    expect(money).to_have_value("5")
    expect(dialog).to_contain_text("6 spent so far")
    expect(dialog).to_contain_text("0.12 spent so far")
    for bad, why in (("6", "Must be above the 6 spent so far."), ("", "This is needed.")):
        requests.fill(bad)
        money.fill("2.5")
        dialog.get_by_role("button", name="Resume").click()
        expect(requests).to_be_focused()
        expect(requests).to_have_attribute("aria-invalid", "true")
        expect(dialog.locator(".problem:visible")).to_contain_text(why)
        expect(money).to_have_value("2.5")
    assert service.store.get_job(job.id).state == "paused"
    requests.fill("9")
    expect(dialog.locator(".problem:visible")).to_have_count(0)
    dialog.get_by_role("button", name="Resume").click()
    expect(dialog).to_have_count(0)
    expect(page.get_by_text("9 / 40")).to_be_visible()
    expect(page.get_by_text("the budget of 9 requests is spent").first).to_be_visible()
    budget = service.store.get_job(job.id).spec["budget"]
    assert (budget["requests"], budget["money"], budget["tokens"]) == (9, 2.5, None)


def test_cancel_asks_first(service: Service, tab: Tab, job: JobView) -> None:
    page = open_job(tab, service, job)
    state(page, "Running")
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.get_by_role("button", name="Keep it").click()
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.get_by_role("button", name="Cancel the job").click()
    state(page, "Cancelled")
    expect(page.get_by_role("button", name="Enqueue")).to_be_hidden()
    assert service.store.get_job(job.id).state == "cancelled"


def test_delete(service: Service, tab: Tab) -> None:
    job = service.submit(budget={"evaluations": 6})
    tab.expected.append("404")  # what the page was asking for when the job went
    service.finish(job)
    page = open_job(tab, service, job)
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Delete the job").click()
    expect(page.get_by_role("heading", name="No jobs yet")).to_be_visible()
    assert service.store.list_jobs().items == []


def test_open_a_candidate_from_the_plot(service: Service, tab: Tab, job: JobView) -> None:
    service.evaluate(job, 12)
    page = open_job(tab, service, job)
    tab.front_points(12)
    spot = page.evaluate(
        """() => {
            const plot = document.querySelector(".plot-front");
            const at = plot.data.findIndex((one) => one.customdata?.includes(1));
            const { xaxis, yaxis } = plot._fullLayout;
            const i = plot.data[at].customdata.indexOf(1);
            const box = plot.getBoundingClientRect();
            const x = box.left + xaxis._offset + xaxis.l2p(plot.data[at].x[i]);
            return [x, box.top + yaxis._offset + yaxis.l2p(plot.data[at].y[i])];
        }"""
    )
    page.mouse.move(spot[0] - 2, spot[1] - 2)
    page.mouse.click(*spot)
    panel = page.locator(".candidate-card")
    expect(panel.get_by_role("heading", level=3)).to_have_text("#1 · language")
    assert page.url.endswith("?candidate=1")
    heat = panel.get_by_role("table", name="Coefficients of task_arithmetic")
    expect(heat.locator("tbody th")).to_have_text(["input", *(f"layer {n}" for n in range(6)), "output"])
    expect(heat.locator("thead th")).to_have_text(["language", "polarity", "continent"])
    expect(heat.locator("tbody tr").first.locator("td")).to_have_text(["1.00", "0.00", "0.00"])
    expect(panel).to_contain_text("60 items · mean")
    expect(panel).to_contain_text("of 60 items score 1")


def test_heat_map_by_keyboard(service: Service, tab: Tab, job: JobView) -> None:
    service.evaluate(job, 7)
    page = open_job(tab, service, job, "?candidate=6")
    cells = page.locator(".heat td[data-value]")
    cells.first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".heatmap .readout")).to_contain_text("layer 0 · polarity: 0.")
    expect(page.locator(".heat td:focus")).to_have_attribute("data-row", "1")


def test_recipe_is_shown(service: Service, tab: Tab, job: JobView) -> None:
    service.evaluate(job, 7)
    page = open_job(tab, service, job, "?candidate=6")
    page.get_by_text("Recipe", exact=True).click()
    expect(page.get_by_label("Recipe as JSON")).to_contain_text('"operator": "task_arithmetic"')


def test_a_failed_candidate_says_why(start_service: StartService, tab: Tab) -> None:
    service = start_service(fail_every=6)
    job = service.submit()
    service.evaluate(job, 8)
    page = open_job(tab, service, job)
    tab.front_points(7)
    expect(page.locator(".stat").filter(has_text="Failed")).to_contain_text("1")
    page.get_by_label("Which candidates").select_option("Failed")
    expect(rows(page)).to_have_count(1)
    page.get_by_role("button", name="Show candidate 5").click()
    expect(page.locator(".candidate-card")).to_contain_text("3 of 60 items have no finite score")
    expect(page.locator(".candidate-card").get_by_role("button", name="Export")).to_be_hidden()


def test_the_table_sorts_filters_and_pages(service: Service, tab: Tab) -> None:
    job = service.submit(budget={"evaluations": 70})
    service.finish(job)
    page = open_job(tab, service, job)
    state(page, "Completed")
    expect(rows(page)).to_have_count(50)
    expect(rows(page).first).to_contain_text("#69")
    page.get_by_role("button", name="Next", exact=True).click()
    expect(rows(page)).to_have_count(20)
    expect(rows(page).first).to_contain_text("#19")
    page.get_by_role("button", name="Newer").click()
    expect(rows(page).first).to_contain_text("#69")
    page.get_by_role("button", name="language", exact=True).click()
    header = page.get_by_role("group", name="Table of candidates").get_by_role("columnheader", name="language")
    expect(header).to_have_attribute("aria-sort", "ascending")
    best = min(range(70), key=lambda index: (service.store.get_candidate(job.id, index).values or [0.0])[0])
    expect(rows(page).first).to_contain_text(f"#{best}")
    page.get_by_label("Which candidates").select_option("On the front")
    expect(rows(page)).to_have_count(service.store.get_job(job.id).progress.front)


def test_parallel_coordinates_of_the_front(service: Service, tab: Tab, job: JobView) -> None:
    service.finish(job)
    page = open_job(tab, service, job)
    state(page, "Completed")
    front = service.store.front(job.id).front
    lines = page.locator(".parallel .line")
    expect(lines).to_have_count(len(front))
    page.get_by_label("Mean coefficients").check()
    expect(page.locator(".parallel .name")).to_have_count(6)
    lines.first.dispatch_event("click")
    expect(page.locator(".parallel .line.selected")).to_have_count(1)
    expect(page.locator(".candidate-card")).to_contain_text("on the front")


def test_best_so_far(service: Service, tab: Tab, job: JobView) -> None:
    service.finish(job)
    page = open_job(tab, service, job)
    state(page, "Completed")
    curve = service.store.progression(job.id)
    page.wait_for_function(
        "n => document.querySelector('.plot-best').data?.every((one) => one.y.length === n + 1)", arg=len(curve.index)
    )
    drawn = page.evaluate("document.querySelector('.plot-best').data.map((one) => one.y.at(-1))")
    assert drawn == [curve.loss[-1], *curve.best[-1]]


def test_enqueue(service: Service, tab: Tab, job: JobView) -> None:
    service.evaluate(job, 6)
    page = open_job(tab, service, job)
    tab.front_points(6)
    page.get_by_role("button", name="Enqueue").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Label").fill("my own")
    dialog.get_by_label("language").fill("0.6, x")
    dialog.get_by_role("button", name="Enqueue").click()
    expect(dialog.get_by_role("alert")).to_contain_text("language: enter numbers")
    dialog.get_by_label("language").fill("0.6")
    dialog.get_by_label("polarity").fill("0.4")
    dialog.get_by_role("button", name="Enqueue").click()
    expect(dialog).to_have_count(0)
    service.allow(2)
    expect(rows(page).filter(has_text="my own · user")).to_contain_text("0.")
    rows(page).filter(has_text="my own").get_by_role("button").click()
    expect(page.locator(".heat tbody tr").nth(3)).to_contain_text("0.60")


def enqueue_genome(page: Page, numbers: str) -> Locator:
    page.get_by_role("button", name="Enqueue").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("button", name="Genome").click()
    dialog.get_by_role("textbox", name="Genome").fill(numbers)
    dialog.get_by_role("button", name="Enqueue").click()
    return dialog


def test_a_candidate_that_does_not_fit_is_refused_in_the_dialog(service: Service, tab: Tab, job: JobView) -> None:
    tab.expected.append("422")
    service.evaluate(job, 6)
    page = open_job(tab, service, job)
    tab.front_points(6)
    expect(enqueue_genome(page, "1, 2, 3").get_by_role("alert")).to_contain_text("the genome has 3 numbers")


def test_a_candidate_that_turns_out_not_to_fit_is_rejected_visibly(start_service: StartService, tab: Tab) -> None:
    service = start_service(work=False)
    page = open_job(tab, service, service.submit())
    expect(enqueue_genome(page, "1, 2, 3")).to_have_count(0)  # nobody knows the search space yet
    start_service()
    expect(page.locator(".toast").filter(has_text="rejected")).to_contain_text("3 numbers")
    expect(page.get_by_role("log")).to_contain_text("An enqueued candidate was rejected")


def test_export_reaches_completed(service: Service, tab: Tab, job: JobView) -> None:
    service.evaluate(job, 6)
    page = open_job(tab, service, job, "?candidate=4")
    page.locator(".candidate-card").get_by_role("button", name="Export").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_label("Candidate number")).to_have_value("4")
    dialog.get_by_label("Head of").select_option("polarity")
    dialog.get_by_role("button", name="Start the export").click()
    entry = page.locator("[data-export]")
    expect(entry).to_have_attribute("data-state", "completed")
    expect(entry).to_contain_text("candidate-4")
    expect(entry).to_contain_text("with the head of polarity")
    assert [one.state for one in service.store.list_exports(job.id)] == ["completed"]


def test_export_of_a_pending_candidate_is_refused_in_the_dialog(service: Service, tab: Tab, job: JobView) -> None:
    tab.expected.append("409")
    service.evaluate(job, 6)
    page = open_job(tab, service, job)
    tab.front_points(6)
    page.get_by_role("group", name="Actions").get_by_role("button", name="Export").click()
    page.get_by_label("Candidate number").fill("6")
    page.get_by_role("button", name="Start the export").click()
    expect(page.get_by_role("dialog").get_by_role("alert")).to_be_visible()


def test_spec_and_findings(service: Service, tab: Tab, job: JobView) -> None:
    page = open_job(tab, service, job)
    state(page, "Running")
    page.get_by_text("Compatibility: 1 finding").click()
    expect(page.get_by_text("has a head of its own")).to_be_visible()
    page.get_by_role("heading", name="Job spec").click()
    expect(page.get_by_label("Job spec", exact=True).last).to_contain_text("name: three word tasks")
    page.get_by_role("button", name="JSON").click()
    expect(page.get_by_label("Job spec", exact=True).last).to_contain_text('"name": "three word tasks"')


def test_a_job_that_nobody_has_begun(start_service: StartService, tab: Tab) -> None:
    service = start_service(work=False)
    page = open_job(tab, service, service.submit())
    state(page, "Queued")
    expect(page.get_by_text("No candidate here yet.")).to_be_visible()
    page.get_by_role("button", name="Pause").click()
    state(page, "Paused")


def test_one_objective_is_drawn_over_the_candidates(service: Service, tab: Tab) -> None:
    job = service.submit(objectives=browser_spec().objectives[:1])
    service.evaluate(job, 6)
    page = open_job(tab, service, job)
    tab.front_points(6)
    expect(page.locator(".plot-front .xtitle")).to_have_text("candidate number")


def test_no_such_job(service: Service, tab: Tab) -> None:
    tab.expected.append("404")
    tab.open(f"{service.url}#/jobs/doesnotexist")
    expect(tab.page.get_by_role("heading", name="Not found")).to_be_visible()
    tab.page.get_by_role("link", name="All jobs").click()
    expect(tab.page.get_by_role("heading", name="No jobs yet")).to_be_visible()


def test_what_is_best_is_shown_on_test_items_too(service: Service, tab: Tab) -> None:
    spec = browser_spec(budget={"evaluations": 6}).model_dump(mode="json")
    for objective in spec["objectives"][:2]:
        objective["test"] = {"path": objective["data"]["path"], "split": "test"}
    job = service.submit(budget={"evaluations": 6}, objectives=spec["objectives"])
    service.evaluate(job, 6)
    page = open_job(tab, service, job)
    tab.front_points(6)
    expect(page.get_by_text("Verified")).to_be_visible()
    service.allow(1)
    expect(page.get_by_role("log")).to_contain_text("on test items: language")
    service.allow(20)
    state(page, "Completed")
    progress = service.store.get_job(job.id).progress
    assert progress.verified == progress.to_verify > 0
    expect(page.locator(".stat", has_text="Verified")).to_contain_text(f"{progress.verified} / {progress.to_verify}")
    front = service.store.front(job.id).front[0]
    assert front.verification is not None
    row = rows(page).filter(has=page.get_by_role("button", name=f"Show candidate {front.index}", exact=True))
    expect(row).to_contain_text("overfitted")
    expect(row).to_contain_text(f"test {front.verification.test['language'].value:.4f}")
    row.click()
    panel = page.locator(".candidate-card")
    expect(panel.get_by_role("heading", name="On items the search never saw")).to_be_visible()
    expect(panel).to_contain_text("Overfitted: language, polarity")
    table = panel.locator(".verification table")
    expect(table.locator("tbody th")).to_have_text(["language", "polarity", "continent"])
    found = front.verification.test["language"]
    expect(table.locator("tbody tr").first).to_contain_text(f"{found.low:.4f} to {found.high:.4f}")
    expect(panel.get_by_role("heading", name="Scores of the test items")).to_be_visible()
    bars = page.evaluate("document.querySelector('.plot-front').data.filter((one) => one.error_y).length")
    assert bars == 1


def test_estimates_have_error_bars_until_all_items_are_measured(service: Service, tab: Tab) -> None:
    fitness = {"estimation": {"method": "regression", "items": 20}, "verification": {"candidates": 2}}
    job = service.submit(budget={"evaluations": STARTS + 4}, fitness=fitness, algorithm={"name": "random"})
    service.evaluate(job, STARTS + 4)
    page = open_job(tab, service, job)
    tab.front_points(STARTS + 4)
    estimated = next(c for c in service.store.list_candidates(job.id).items if c.estimated)
    assert estimated.errors is not None
    assert estimated.values is not None
    shown = f"{estimated.values[0]:.4f} ± {1.96 * estimated.errors[0]:.4f}"
    row = rows(page).filter(has=page.get_by_role("button", name=f"Show candidate {estimated.index}", exact=True))
    expect(row).to_contain_text(shown)
    row.click()
    panel = page.locator(".candidate-card")
    expect(panel.locator(".badge", has_text="estimated")).to_be_visible()
    expect(panel).to_contain_text(shown)
    service.allow(20)
    state(page, "Completed")
    checked = next(c for c in service.store.list_candidates(job.id).items if c.estimated and c.verification)
    assert checked.verification is not None
    tab.open(f"{service.url}#/jobs/{job.id}?candidate={checked.index}")
    expect(panel.get_by_role("heading", name="On all items")).to_be_visible()
    found = checked.verification.search["language"]
    expect(panel.locator(".verification table")).to_contain_text(f"{found.low:.4f} to {found.high:.4f}")
