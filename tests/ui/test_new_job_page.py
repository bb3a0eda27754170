"""A new job: the form made from the schema, pasted YAML, messages beside the fields, clones."""

from __future__ import annotations

import json
from typing import Any

import yaml
from playwright.sync_api import Locator, Page, expect

from tests.ui.conftest import StartService, Tab
from tests.ui.service import Service, browser_spec


def open_form(tab: Tab, service: Service) -> Page:
    tab.open(f"{service.url}#/new")
    expect(tab.page.get_by_role("heading", name="New job", level=1)).to_be_visible()
    return tab.page


def section(page: Page, name: str) -> Locator:
    """A part of the form, by its heading."""
    return page.locator(".section").filter(has=page.get_by_role("heading", name=name, exact=True))


def item(page: Page, title: str) -> Locator:
    return page.locator(".item").filter(has=page.get_by_role("heading", name=title, exact=True))


def fill_form(page: Page) -> None:
    """Fill in what a job needs: a base, two experts, two objectives, a budget."""
    section(page, "Job").get_by_label("Name").fill("from the form")
    section(page, "Base").get_by_label("Path").fill("models/base")
    for number, name in enumerate(("language", "polarity"), start=1):
        if number > 1:
            page.get_by_role("button", name="Add expert").click()
            page.get_by_role("button", name="Add objective").click()
        expert = item(page, f"Expert {number}")
        expert.get_by_label("Name").fill(name)
        expert.get_by_label("Path").fill(f"models/{name}")
        objective = item(page, f"Objective {number}")
        objective.get_by_label("Name").fill(name)
        objective.get_by_label("Evaluator").select_option("text_classification")
        objective.get_by_role("textbox", name="Path").fill(f"data/{name}")
        objective.get_by_label("Metric").select_option("loss")
        objective.get_by_label("Head").select_option(name)
    section(page, "Budget").get_by_label("Evaluations").fill("30")


def open_filled_form(tab: Tab, service: Service, **changes: Any) -> Page:
    """Open the form with what `fill_form` fills in, and fields of the spec as given, by way of the text."""
    page = open_form(tab, service)
    whole = browser_spec()
    spec = browser_spec(
        **{"name": "from the form", "experts": whole.experts[:2], "objectives": whole.objectives[:2]} | changes
    )
    page.get_by_role("tab", name="YAML or JSON").click()
    page.get_by_label("Job spec as YAML or JSON").fill(spec.model_dump_json())
    page.get_by_role("button", name="Validate").click()
    page.get_by_role("button", name="Open in the form").click()
    return page


def test_submit_through_the_form(start_service: StartService, tab: Tab) -> None:
    service = start_service(work=False)
    page = open_form(tab, service)
    fill_form(page)
    merge = section(page, "Merge")
    merge.get_by_label("Operator").first.select_option("ties")
    merge.get_by_label("Density: fixed or searched").select_option("range")
    merge.get_by_label("Density: lowest").fill("0.2")
    merge.get_by_label("Density: highest").fill("0.9")
    merge.get_by_label("Density: own for each group").check()
    merge.get_by_role("button", name="Add modifier").click()
    modifier = item(page, "Modifier 1")
    modifier.get_by_label("Operator").select_option("task_arithmetic")
    modifier.get_by_label("Target *").select_option("merged")
    merge.get_by_label("Bounds").check()
    merge.get_by_role("spinbutton", name="Low *").fill("-0.5")
    merge.get_by_role("spinbutton", name="High *").fill("1.5")
    merge.get_by_label("embeddings").check()
    algorithm = section(page, "Algorithm")
    algorithm.get_by_label("Name").select_option("cma_es")
    algorithm.get_by_label("Sigma0").fill("0.2")
    objective = item(page, "Objective 1")
    objective.get_by_role("textbox", name="Column of text", exact=True).fill("word")
    objective.get_by_label("Constraint").check()
    objective.get_by_label("At most").fill("0.9")
    page.get_by_role("button", name="Submit").dblclick()  # which makes one job
    expect(page.get_by_role("heading", level=1)).to_have_text("from the form")
    expect(page.locator("#job-state")).to_have_text("Queued")
    (job,) = service.store.list_jobs().items
    spec = service.store.get_job(job.id).spec
    assert spec["merge"]["operator"] == "ties"
    assert spec["merge"]["options"] == {
        "density": {"low": 0.2, "high": 0.9, "integer": False, "per_group": True, "per_expert": False}
    }
    assert spec["merge"]["modifiers"] == [{"operator": "task_arithmetic", "target": "merged", "options": {}}]
    assert spec["merge"]["bounds"] == {"low": -0.5, "high": 1.5}
    assert spec["merge"]["frozen"] == ["embeddings"]
    assert spec["algorithm"] == {"name": "cma_es", "options": {"sigma0": 0.2}}
    assert [expert["name"] for expert in spec["experts"]] == ["language", "polarity"]
    assert spec["objectives"][0]["data"]["columns"] == {"text": "word"}
    assert spec["objectives"][0]["constraint"] == {"at_least": None, "at_most": 0.9}
    assert [objective["head"] for objective in spec["objectives"]] == ["language", "polarity"]
    assert spec["budget"]["evaluations"] == 30


def part(within: Locator, name: str) -> Locator:
    """A part within a part of the form, unfolded."""
    found = within.locator(".subsection").filter(has=within.page.get_by_text(name, exact=True))
    if found.get_attribute("open") is None:
        found.locator("summary").click()
    return found


def test_what_saves_evaluations(start_service: StartService, tab: Tab) -> None:
    service = start_service(work=False)
    page = open_filled_form(tab, service, algorithm={"name": "cma_es"})
    fitness = section(page, "Fitness")
    fitness.get_by_role("heading", name="Fitness").click()
    fitness.get_by_label("Cache").uncheck()
    racing, estimation = part(fitness, "Racing"), part(fitness, "Estimation")
    racing.get_by_label("Enabled").check()
    racing.get_by_label("First items").fill("16")
    racing.get_by_label("Error").fill("0.01")
    estimation.get_by_label("Method").select_option("regression")
    items = estimation.get_by_label("Items")
    items.fill("0")
    verification = part(fitness, "Verification")
    verification.get_by_label("Candidates").fill("4")
    verification.get_by_label("Baselines").uncheck()
    fitness.get_by_role("heading", name="Fitness").click()  # a problem is shown although its part is folded
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_text("1 problem to put right")).to_be_visible()
    expect(page.get_by_text("It is shown beside its field.")).to_be_visible()
    expect(items).to_be_focused()
    expect(items).to_have_attribute("aria-invalid", "true")
    expect(fitness.locator(".problem:visible")).to_have_text("Must be at least 8 and at most 100,000.")
    expect(racing.get_by_label("First items")).to_have_value("16")  # nothing is lost
    assert service.store.list_jobs().items == []
    items.fill("20")
    expect(fitness.locator(".problem:visible")).to_have_count(0)
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("from the form")
    (job,) = service.store.list_jobs().items
    assert service.store.get_job(job.id).spec["fitness"] == {
        "cache": False,
        "racing": {"enabled": True, "first_items": 16, "factor": 2, "error": 0.01},
        "estimation": {"method": "regression", "items": 20},
        "verification": {"candidates": 4, "baselines": False},
    }
    page.get_by_role("button", name="Clone").click()
    expect(page.get_by_role("heading", name="Clone “from the form”")).to_be_visible()
    expect(fitness.get_by_label("Cache")).not_to_be_checked()
    expect(racing.get_by_label("Enabled")).to_be_checked()
    expect(racing.get_by_label("First items")).to_have_value("16")
    expect(racing.get_by_label("Error")).to_have_value("0.01")
    expect(estimation.get_by_label("Method")).to_have_value("regression")
    expect(items).to_have_value("20")
    expect(verification.get_by_label("Candidates")).to_have_value("4")
    expect(verification.get_by_label("Baselines")).not_to_be_checked()
    expect(items).to_be_visible()  # what is not as usual is unfolded


def test_messages_stand_beside_the_fields(service: Service, tab: Tab) -> None:
    page = open_form(tab, service)
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_text("4 problems to put right")).to_be_visible()
    name = item(page, "Expert 1").get_by_label("Name")
    expect(name).to_have_attribute("aria-invalid", "true")
    expect(name).to_be_focused()
    expect(name).to_have_accessible_description("This is needed. Short name, unique in the job.")
    name.fill("two words")
    expect(item(page, "Expert 1").locator(".problem:visible")).to_contain_text("letters, digits")
    name.fill("language")
    expect(name).not_to_have_attribute("aria-invalid", "true")
    evaluations = section(page, "Budget").get_by_label("Evaluations")
    evaluations.fill("0")
    evaluations.blur()
    expect(section(page, "Budget").locator(".problem:visible")).to_have_text(
        "Must be at least 1 and at most 10,000,000."
    )


def test_the_servers_problems_stand_beside_the_fields(service: Service, tab: Tab) -> None:
    tab.expected.append("422")
    page = open_filled_form(tab, service)
    merge = section(page, "Merge")
    merge.get_by_label("Bounds").check()
    merge.get_by_role("spinbutton", name="Low *").fill("1")
    merge.get_by_role("spinbutton", name="High *").fill("0")
    page.get_by_role("button", name="Validate").click()
    expect(merge.locator(".problem:visible")).to_contain_text("swap them?")
    merge.get_by_role("spinbutton", name="High *").fill("1.5")
    item(page, "Expert 2").get_by_label("Name").fill("language")
    page.get_by_role("button", name="Validate").click()
    expect(section(page, "Experts").locator(".problem:visible")).to_contain_text("must be unique")
    item(page, "Expert 2").get_by_label("Name").fill("polarity")
    page.get_by_role("button", name="Validate").click()
    expect(page.get_by_text("The job spec is valid").first).to_be_visible()
    expect(page.get_by_text("16 variables to search: 8 coefficient groups × 2 coefficients")).to_be_visible()
    assert service.store.list_jobs().items == []


def test_submit_pasted_yaml(start_service: StartService, tab: Tab) -> None:
    service = start_service(work=False)
    page = open_form(tab, service)
    page.get_by_role("tab", name="YAML or JSON").click()
    spec = browser_spec(name="from YAML").model_dump(mode="json")
    page.get_by_label("Job spec as YAML or JSON").fill(yaml.safe_dump(spec))
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("from YAML")
    (job,) = service.store.list_jobs().items
    assert service.store.get_job(job.id).spec == spec


def test_pasted_json_with_problems(service: Service, tab: Tab) -> None:
    tab.expected.append("422")
    page = open_form(tab, service)
    page.get_by_role("tab", name="YAML or JSON").click()
    text = page.get_by_label("Job spec as YAML or JSON")
    page.get_by_role("button", name="Validate").click()
    expect(page.get_by_text("Paste a job spec first.")).to_be_visible()
    spec = browser_spec().model_dump(mode="json")
    text.fill(json.dumps(spec | {"colour": "red", "budget": {"evaluations": 0}}))
    page.get_by_role("button", name="Validate").click()
    result = page.locator(".result")
    expect(result).to_contain_text("budget.evaluations: ")
    expect(result).to_contain_text("colour: ")
    text.fill("{ not json")
    page.get_by_role("button", name="Submit").click()
    expect(result).to_contain_text("1 problem to put right")


def test_yaml_opens_in_the_form_and_back(service: Service, tab: Tab) -> None:
    page = open_form(tab, service)
    page.get_by_role("tab", name="YAML or JSON").click()
    changes = {
        "merge": {
            "operator": "ties",
            "options": {"density": {"choices": [0.2, 0.5]}},
            "granularity": {"modules": [["mlp"]]},
        },
        "algorithm": {"name": "cma_es", "options": {"population": 12}},
        "warm_starts": {"candidates": [{"label": "mine", "coefficients": {"language": 0.5, "polarity": [0.1] * 16}}]},
        "workers": {"count": 2},
    }
    spec = browser_spec(**changes)
    text = page.get_by_label("Job spec as YAML or JSON")
    text.fill(yaml.safe_dump(spec.model_dump(mode="json")))
    page.get_by_role("button", name="Validate").click()
    page.get_by_role("button", name="Open in the form").click()
    expect(item(page, "Objective 3").get_by_label("Metric")).to_have_value("accuracy")
    expect(item(page, "Objective 3").get_by_label("Head")).to_have_value("continent")
    page.get_by_role("button", name="Show as YAML").click()
    assert type(spec).model_validate(yaml.safe_load(text.input_value())) == spec


def test_clone_is_prefilled_and_remembers_its_origin(start_service: StartService, tab: Tab) -> None:
    service = start_service(work=False)
    original = service.submit(
        algorithm={"name": "cma_es", "options": {"sigma0": 0.3}}, budget={"evaluations": 40, "patience": 9}
    )
    page = tab.page
    tab.open(f"{service.url}#/jobs/{original.id}")
    page.get_by_role("button", name="Clone").click()
    expect(page.get_by_role("heading", name="Clone “three word tasks”")).to_be_visible()
    expect(section(page, "Algorithm").get_by_label("Sigma0")).to_have_value("0.3")
    section(page, "Job").get_by_label("Name").fill("again")
    section(page, "Algorithm").get_by_label("Sigma0").fill("")  # the default
    section(page, "Budget").get_by_label("Patience").fill("")
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("again")
    clone = service.store.get_job(service.store.list_jobs().items[0].id)
    assert clone.cloned_from == original.id
    assert clone.spec["algorithm"]["options"] == {}
    assert clone.spec["budget"]["patience"] is None
    changed = ("name", "algorithm", "budget")
    assert {k: v for k, v in clone.spec.items() if k not in changed} == {
        k: v for k, v in original.spec.items() if k not in changed
    }
    expect(page.get_by_role("link", name="cloned from another job")).to_be_visible()
