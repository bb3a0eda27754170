"""A user's whole way in the browser, with nothing stood in: `mergeopt serve`, Ray, real checkpoints, real Chromium."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from playwright.sync_api import expect
from transformers import AutoModelForSequenceClassification

from tests.jobs import write_job
from tests.service import serving
from tests.ui.conftest import OpenTab

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def test_submit_watch_pause_resume_open_enqueue_export(open_tab: OpenTab, tmp_path: Path) -> None:
    root = tmp_path / "root"
    job = write_job(root, items=1000, name="end to end", budget={"evaluations": 20})
    tab = open_tab()
    page = tab.page
    with serving(tmp_path / "home", root) as client:
        tab.open(f"{client.url}/ui/#/new")
        page.get_by_role("tab", name="Paste").click()
        page.get_by_label("Job spec").fill(json.dumps(job))
        page.get_by_role("button", name="Submit").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("end to end")
        job_id = client.list_jobs().items[0].id

        # Points appear by themselves.
        page.wait_for_function("() => document.querySelectorAll('.plot-front .points path').length >= 2")
        page.get_by_role("button", name="Pause").click()
        expect(page.locator("main").get_by_text("paused", exact=False).first).to_be_visible(timeout=60_000)
        page.get_by_role("button", name="Resume").click()

        page.get_by_role("button", name="Show candidate 3", exact=True).click()
        expect(page.locator(".heat")).to_be_visible()
        client.enqueue(job_id, {"label": "mine", "coefficients": {"colour": 0.5, "shape": 0.5}})
        assert client.wait(job_id).state == "completed"
        expect(page.locator("main").get_by_text("completed", exact=False).first).to_be_visible()

        page.get_by_role("button", name="Export").first.click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_label("Head").select_option("shape")
        dialog.get_by_role("button", name="Export").click()
        expect(page.get_by_text("candidate-3-shape")).to_be_visible(timeout=60_000)
        (export,) = client.list_exports(job_id)
        assert export.path is not None
        model = AutoModelForSequenceClassification.from_pretrained(export.path)
        assert model.config.num_labels == 2
        page.close()  # before the service, whose end would cut the page's event stream
