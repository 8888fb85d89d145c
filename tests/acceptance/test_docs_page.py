"""A user uploads a file, submits a job and sees it succeed on the documentation page, in a real browser."""

import os
from collections.abc import Iterator
from pathlib import Path

import chromium
import pytest
import stacks
from openai import OpenAI
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.expected_conditions import element_to_be_clickable, presence_of_element_located
from selenium.webdriver.support.ui import WebDriverWait

from tunery.local.bases import SMOLLM2
from tunery.local.stack import Stack

KEEP = bool(os.environ.get("TUNERY_KEEP_SCREENSHOT"))  # read at import: tests run without TUNERY_* variables
SCREENSHOT = Path(__file__).parents[2] / "docs/images/docs-page.png"

pytestmark = chromium.NEEDED


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    driver = chromium.start(tmp_path)
    yield driver
    driver.quit()


class Page:
    """Operates the page as a user does."""

    def __init__(self, browser: webdriver.Chrome, address: str) -> None:
        self.browser = browser
        browser.get(f"{address}/docs")
        self.wait = WebDriverWait(browser, 30)

    def click(self, css: str, within: str = "") -> None:
        element = self.wait.until(element_to_be_clickable((By.CSS_SELECTOR, f"{within} {css}".strip())))
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)  # type: ignore[no-untyped-call]
        element.click()

    def find(self, css: str) -> WebElement:
        return self.wait.until(presence_of_element_located((By.CSS_SELECTOR, css)))

    def authorise(self, key: str) -> None:
        self.click(".auth-wrapper .authorize")
        self.find(".auth-container input").send_keys(key)
        self.click(".auth-btn-wrapper .authorize")
        self.click(".auth-btn-wrapper .btn-done")

    def open(self, tag: str, operation: str) -> str:
        block = f"#operations-{tag}-{operation}"
        self.click(".opblock-summary-control", block)
        self.click(".try-out__btn", block)
        return block

    def answer(self, block: str) -> tuple[str, str]:
        """Clicks Execute; returns status and body of the response."""
        self.click(".execute", block)
        status = self.find(f"{block} .live-responses-table .response .response-col_status")
        body = self.find(f"{block} .live-responses-table .response .response-col_description .highlight-code")
        return status.text, body.text


@pytest.mark.slow
def test_submit_from_the_page(
    browser: webdriver.Chrome, stack: Stack, client: OpenAI, base: str, tmp_path: Path
) -> None:
    stacks.post(client, "/models/aliases", {"alias": SMOLLM2.id, "model": base})  # the base that the examples name
    data = tmp_path / "train.jsonl"
    data.write_bytes(stacks.rows(12))
    page = Page(browser, stack.api_url)
    page.authorise(str(stack.first_key))

    upload = page.open("Files", "create_file")
    page.find(f"{upload} input[type=file]").send_keys(str(data))
    status, body = page.answer(upload)
    assert status.startswith("200"), body
    assert '"status": "processed"' in body
    assert '"expires_at": null' in body
    file_id = client.files.list().data[0].id
    assert file_id in body
    page.click(".opblock-summary-control", upload)

    create = page.open("Fine-tuning_jobs", "create_job")
    status, body = page.answer(create)  # the example is sent unchanged
    job_id = client.fine_tuning.jobs.list().data[0].id
    assert status.startswith("200"), body
    assert job_id in body
    assert f'"training_file": "{file_id}"' in body
    assert '"status": "validating_files"' in body
    page.click(".opblock-summary-control", create)

    stacks.finish(stack, client, job_id)
    retrieve = page.open("Fine-tuning_jobs", "retrieve_job")
    page.find(f"{retrieve} .parameters input").send_keys(job_id)
    status, body = page.answer(retrieve)
    assert status.startswith("200"), body
    assert '"status": "succeeded"' in body
    assert f'"fine_tuned_model": "ft:{SMOLLM2.id}:tunery::' in body
    _keep(browser, page, retrieve)
    page.click(".opblock-summary-control", retrieve)

    ask = page.open("Chat", "create_chat_completion")
    status, body = page.answer(ask)
    assert status.startswith("200"), body
    assert '"object": "chat.completion"' in body
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []  # type: ignore[no-untyped-call]


def _keep(browser: webdriver.Chrome, page: Page, block: str) -> None:
    """Saves the documentation's screenshot, only on request: a test must not change the tree by itself."""
    if KEEP:
        answer = page.find(f"{block} .live-responses-table")
        browser.execute_script("arguments[0].scrollIntoView({block: 'end'})", answer)  # type: ignore[no-untyped-call]
        browser.save_screenshot(str(SCREENSHOT))
