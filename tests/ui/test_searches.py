"""What searches add to the pages: phases, baselines, partial evaluations, ranges of parameters, jobs to begin with."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Page, expect

from api.views import JobView
from optimizer.errors import LeaseLost
from optimizer.fitness.aggregate import aggregate
from optimizer.ports import Candidate, Evaluation, Lease
from optimizer.problem import PlannedPhase, Problem
from optimizer.recipe import Leaf, Merge, PlannedLayer, Recipe
from optimizer.space import MergeSpace, make_space
from optimizer.spec import AlgorithmSpec
from tests.ui.conftest import StartService, Tab
from tests.ui.service import Service, browser_problem, browser_spec, score
from tests.ui.test_new_job_page import item, open_filled_form, section

EXPERTS = ("language", "polarity", "continent")
PHASES = [
    PlannedPhase(algorithm=AlgorithmSpec(name="baselines"), evaluations=10, why="to know what the search must beat"),
    PlannedPhase(algorithm=AlgorithmSpec(name="m2n2"), evaluations=20),
    PlannedPhase(algorithm=AlgorithmSpec(name="cma_es", options={"sigma0": 0.1}), evaluations=10, keep_experts=2),
]


class Job:
    """A job whose controller is the test."""

    def __init__(self, service: Service) -> None:
        self.store = service.store
        spec = browser_spec(algorithm={"name": "random"})
        self.view: JobView = self.store.create_job(spec)[0]
        lease = self.store.claim("test", 3600, self.view.id)
        assert lease is not None
        self.lease: Lease = lease
        self.problem: Problem = browser_problem(spec).model_copy(update={"phases": PHASES})
        self.store.start(lease, self.problem)
        space = make_space(spec, self.problem)
        assert isinstance(space, MergeSpace)
        self.space = space
        self.made = 0

    def soup(self, *weights: float, **changes: Any) -> int:
        """Record and score a merge with one weight for each expert."""
        genome = self.space.point(dict(zip(EXPERTS, weights, strict=True)))
        return self.add(self.space.recipe(genome), genome=genome, **changes)

    def add(self, recipe: Recipe, **changes: Any) -> int:
        """Record and score a merge."""
        index, self.made = self.made, self.made + 1
        fields: dict[str, Any] = {"generation": 0, "told": 0, "origin": "algorithm", "label": None, "genome": None}
        candidate = Candidate(
            index=index, recipe=recipe.to_json(), fingerprint=recipe.fingerprint, **(fields | changes)
        )
        self.store.add_candidates(self.lease, [candidate])
        scores = score(self.problem, candidate.recipe, index)
        values = tuple(aggregate(self.problem.objectives, scores))
        self.store.add_evaluation(self.lease, Evaluation(index, values, items=scores))
        return index


def give_up(service: Service, lease: Lease) -> None:
    with suppress(LeaseLost):  # the test has ended the job
        service.store.release(lease)


@pytest.fixture
def job(start_service: StartService) -> Iterator[Callable[[], tuple[Service, Job]]]:
    with ExitStack() as stack:

        def make() -> tuple[Service, Job]:
            service = start_service(work=False)
            made = Job(service)
            stack.callback(give_up, service, made.lease)
            return service, made

        yield make


def open_job(tab: Tab, service: Service, job: Job, query: str = "") -> Page:
    tab.open(f"{service.url}#/jobs/{job.view.id}{query}")
    expect(tab.page.get_by_role("heading", level=1)).to_have_text(job.view.name)
    return tab.page


def test_phases_and_why(job: Callable[[], tuple[Service, Job]], tab: Tab) -> None:
    service, made = job()
    page = open_job(tab, service, made)
    phases = page.locator(".phases li")
    expect(phases).to_have_count(3)
    expect(phases.first).to_contain_text("baselines")
    expect(phases.first).to_contain_text("under way")
    expect(phases.first).to_contain_text("to know what the search must beat")
    expect(phases.last).to_contain_text("10 evaluations · among 2 experts · sigma0 = 0.1")
    made.soup(0.5, 0.5, 0.5, phase=1)
    expect(phases.first).to_contain_text("over")  # while the page is open
    expect(phases.nth(1)).to_have_attribute("aria-current", "step")
    expect(page.locator(".candidate-card")).to_contain_text("Choose a candidate")
    page.get_by_role("button", name="Show candidate 0").click()
    expect(page.locator(".facts")).to_contain_text("2 of 3, m2n2")


def test_a_job_with_one_algorithm_has_no_list_of_phases(service: Service, tab: Tab) -> None:
    one = service.submit(algorithm={"name": "random"})
    service.evaluate(one, 6)
    tab.open(f"{service.url}#/jobs/{one.id}")
    tab.front_points(6)
    expect(tab.page.get_by_role("heading", name="Pareto front")).to_be_visible()
    expect(tab.page.get_by_role("heading", name="Phases")).to_be_hidden()


def test_baselines_beside_the_best_candidate(job: Callable[[], tuple[Service, Job]], tab: Tab) -> None:
    service, made = job()
    made.soup(0, 0, 0, origin="warm_start", label="base", generation=-1)
    made.soup(1, 0, 0, origin="warm_start", label="language", generation=-1)
    made.soup(0.6, 0.5, 0.5, label="greedy soup")
    made.soup(0.9, 0.9, 0.9)  # has no name: no baseline
    page = open_job(tab, service, made)
    table = page.locator(".baselines")
    rows = table.locator("tbody tr")
    expect(rows).to_have_count(5)
    expect(rows.nth(0)).to_contain_text("best candidate")
    expect(rows.nth(2)).to_contain_text("greedy soup · best baseline")
    made.soup(0.55, 0.55, 0.55, phase=2, label="iterate 3")  # a name of another phase makes no baseline
    expect(rows.nth(0)).to_contain_text("iterate 3 · best candidate")
    values = {index: service.store.get_candidate(made.view.id, index).values for index in (2, 4)}
    best, baseline = values[4], values[2]
    assert best is not None
    assert baseline is not None
    gains = rows.nth(1).locator(".gain")
    for place, sign in enumerate((-1, -1, 1)):
        gain = sign * (best[place] - baseline[place])
        expect(gains.nth(place)).to_have_attribute("data-tone", "ok" if gain > 0 else "bad")
    rows.filter(has_text="greedy soup").last.get_by_role("button").click()
    expect(page.locator(".candidate-card h3")).to_have_text("#2 · greedy soup")
    # Names of any phase are drawn.
    names = page.locator(".plot-front .textpoint")
    expect(names.filter(has_text="greedy soup")).to_have_count(1)


def test_partial_evaluations_are_hidden_until_asked_for(job: Callable[[], tuple[Service, Job]], tab: Tab) -> None:
    service, made = job()
    made.soup(0.5, 0.5, 0.5)
    page = open_job(tab, service, made)
    tab.front_points(1)
    tick = page.get_by_label("Partial")
    expect(tick).to_be_hidden()
    best = page.locator(".stat").filter(has_text="Best language").locator("dd")
    before = best.inner_text()
    made.soup(0.8, 0.4, 0.4, items=20)  # better at language, were it to count
    expect(page.locator(".table-box").last).to_contain_text("20 items")
    expect(tick).to_be_visible()
    tab.front_points(1)
    tick.check()
    tab.front_points(2)
    assert page.evaluate("document.querySelector('.plot-front').data[0].marker.symbol") == "circle-open"
    expect(best).to_have_text(before)
    page.get_by_label("Which candidates").select_option("On some items only")
    page.get_by_role("button", name="Show candidate 1").click()
    expect(page.locator(".candidate-card")).to_contain_text("measured on 20 items of each objective")
    tab.open(f"{service.url}#/jobs")
    open_job(tab, service, made)
    tab.front_points(1)


def ranges(problem: Problem, breaks: list[int], coefficients: list[list[float]]) -> Recipe:
    inputs = [Leaf(model=name) for name in EXPERTS]
    root = Merge(
        operator="task_arithmetic", base=Leaf(model="base"), inputs=inputs, breaks=breaks, coefficients=coefficients
    )
    return Recipe(models=problem.models, root=root)


def test_ranges_are_as_high_as_they_are_long(job: Callable[[], tuple[Service, Job]], tab: Tab) -> None:
    service, made = job()
    whole = service.store.get_job(made.view.id).parameters
    assert whole == 14 * 16
    table = np.round(np.linspace(-0.5, 1, 9), 3).reshape(3, 3).tolist()
    made.add(ranges(made.problem, [16, 112], table), phase=1)
    page = open_job(tab, service, made, "?candidate=0")
    expect(page.locator(".ranges rect")).to_have_count(9)
    heights = page.evaluate("[...document.querySelectorAll('.ranges rect')].map((one) => one.height.baseVal.value)")
    shares = np.array(heights).reshape(3, 3)
    np.testing.assert_allclose(shares / shares.sum(axis=0), np.repeat([[16], [96], [112]], 3, axis=1) / whole)
    page.locator(".ranges rect").nth(4).hover()
    expect(page.locator(".heatmap .readout").first).to_have_text("parameters 16 to 112 · polarity: 0.25000")
    page.get_by_text("Numbers", exact=True).click()
    numbers = page.get_by_role("table", name="Coefficients of task_arithmetic")
    expect(numbers.locator("tbody tr").nth(1).locator("td")).to_have_text(["0.06", "0.25", "0.44"])
    expect(page.get_by_role("img", name="in 3 ranges of the parameters")).to_be_visible()


def test_hundreds_of_ranges(job: Callable[[], tuple[Service, Job]], tab: Tab) -> None:
    service, made = job()
    count = 224
    table = np.random.default_rng(0).normal(size=(count, 3)).round(3).tolist()
    made.add(ranges(made.problem, list(range(1, count)), table), phase=1)
    page = open_job(tab, service, made, "?candidate=0")
    expect(page.locator(".ranges rect")).to_have_count(3 * count)
    page.get_by_label("Mean coefficients").check()
    expect(page.locator(".parallel .name")).to_have_count(6)


def test_rearranged_layers(job: Callable[[], tuple[Service, Job]], tab: Tab) -> None:
    service, made = job()
    plan = [PlannedLayer(layer=2), PlannedLayer(layer=0, node=Leaf(model="polarity", layer=5), scale=0.5)]
    made.add(Recipe(models=made.problem.models, root=Leaf(model="language"), layers=plan))
    page = open_job(tab, service, made, "?candidate=0")
    rows = page.get_by_role("group", name="Layers of the merged model").locator("tbody tr")
    expect(rows).to_have_count(2)
    expect(rows.first).to_contain_text("layer 2 of language")
    expect(rows.last).to_contain_text("layer 5 of polarity")
    expect(rows.last).to_contain_text("0.5")


def test_phases_in_the_form(start_service: StartService, tab: Tab) -> None:
    service = start_service(work=False)
    page = open_filled_form(tab, service)
    expect(section(page, "Algorithm")).to_be_visible()
    page.get_by_role("heading", name="Phases", exact=True).click()
    phases = section(page, "Phases")
    for number, name in enumerate(("random", "cma_es"), start=1):
        phases.get_by_role("button", name="Add phase").click()
        item(page, f"Phase {number}").get_by_label("Name").select_option(name)
    expect(section(page, "Algorithm")).to_be_hidden()
    item(page, "Phase 1").get_by_label("Share").fill("0.25")
    item(page, "Phase 2").get_by_label("Sigma0").fill("0.3")
    item(page, "Phase 2").get_by_label("Keep experts").fill("1")
    section(page, "Job").get_by_label("Asynchronous").check()
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("from the form")
    spec = service.store.get_job(service.store.list_jobs().items[0].id).spec
    assert [phase["algorithm"]["name"] for phase in spec["phases"]] == ["random", "cma_es"]
    assert spec["phases"][0]["share"] == 0.25
    assert (spec["phases"][1]["algorithm"]["options"], spec["phases"][1]["keep_experts"]) == ({"sigma0": 0.3}, 1)
    assert spec["asynchronous"] is True
    assert "algorithm" not in spec
    page.get_by_role("button", name="Clone").click()
    expect(item(page, "Phase 2").get_by_label("Sigma0")).to_have_value("0.3")
    expect(section(page, "Algorithm")).to_be_hidden()
    phases = section(page, "Phases")
    for _ in range(2):
        phases.get_by_role("button", name="Remove phase 1").click()
    expect(section(page, "Algorithm")).to_be_visible()


def test_a_space_and_a_job_to_begin_with(job: Callable[[], tuple[Service, Job]], tab: Tab) -> None:
    service, made = job()
    made.soup(0.5, 0.5, 0.5)
    made.store.set_state(made.lease, "completed")
    page = open_filled_form(tab, service)
    merge = section(page, "Merge")
    merge.get_by_label("Space").check()
    merge.get_by_label("Name").select_option("layer_swap")
    merge.get_by_label("Borders").fill("3")
    page.get_by_role("button", name="Show as YAML").click()
    expect(page.get_by_label("Job spec as YAML or JSON")).to_have_value(
        # only what differs from the defaults
        re.compile(r"space:\s+name: layer_swap\s+options:\s+borders: 3")
    )
    page.get_by_role("tab", name="Form").click()
    page.get_by_role("button", name="Validate").click()
    expect(page.get_by_text("The job spec is valid").first).to_be_visible()
    merge.get_by_label("Space").uncheck()  # what is not asked for is not sent
    page.get_by_role("button", name="Add expert").click()
    expert = item(page, "Expert 3")
    expert.get_by_label("Name").fill("continent")
    expert.get_by_label("Path").fill("models/continent")
    page.get_by_role("heading", name="Warm starts", exact=True).click()
    starts = section(page, "Warm starts")
    starts.get_by_role("button", name="Add job").click()
    choice = starts.get_by_role("combobox")
    expect(choice.locator("option").last).to_contain_text("three word tasks · completed, 1 candidate on the front")
    choice.select_option(made.view.id)
    page.get_by_role("button", name="Validate").click()
    expect(page.get_by_text("The job spec is valid").first).to_be_visible()
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("from the form")
    spec = service.store.get_job(service.store.list_jobs().items[0].id).spec
    assert spec["merge"]["space"] is None
    (start,) = spec["warm_starts"]["candidates"]
    assert start["label"] == f"job {made.view.id[:4]}… candidate 0"
