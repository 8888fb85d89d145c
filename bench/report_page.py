"""Measures how fast a report on 100,000 rows, each of them in a finding, opens:
`python -m bench.report_page [SCREENSHOT.png]`. Needs chromium and chromedriver.

Chromium opens the page from a file; an embedded stack makes the report of an uploaded file and serves its JSON and its
page to a client.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from bench import report, service
from tunery.datasets.report import page
from tunery.datasets.report.case import Finding
from tunery.datasets.report.maker import Report
from tunery.datasets.report.verdict import Verdict
from tunery.local.stack import Stack

ROWS, TIMES, GOAL = 100_000, 5, 1.0
PATIENCE = 60
"""Seconds to wait for a page."""
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,1600")
MEASURE = """
const page = performance.getEntriesByType('navigation')[0];
const paints = Object.fromEntries(performance.getEntriesByType('paint').map(one => [one.name, one.startTime]));
return {dom: page.domContentLoadedEventEnd, loaded: page.loadEventEnd, painted: paints['first-contentful-paint']};
"""


def written(path: Path) -> Path:
    """Writes the page of a report that names every row; returns its path."""
    why, action = "Questions and answers are nearly the same.", "Keep one of them."
    findings = [Finding("near_duplicate", [at, at + 1], 0.9, why, action) for at in range(1, ROWS, 2)]
    path.write_text(
        page.render("many.jsonl", Report(ROWS, findings, Verdict("jsonl", "chat rows", ROWS, None)).as_dict()),
        encoding="utf-8",
    )
    return path


def painted(browser: webdriver.Chrome) -> dict[str, float] | None:
    """Returns the events of a page that is painted, which may be after it is loaded."""
    measured: dict[str, float] = browser.execute_script(MEASURE)  # type: ignore[no-untyped-call]
    return measured if measured["painted"] is not None and measured["loaded"] else None


def opened(file: Path, screenshot: Path | None) -> dict[str, float]:
    """Returns the seconds from the navigation to each of the page's events, in a new browser."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in FLAGS:
        options.add_argument(flag)
    browser = webdriver.Chrome(options, webdriver.ChromeService(str(shutil.which("chromedriver"))))
    try:
        browser.get(file.as_uri())
        if screenshot:
            browser.save_screenshot(str(screenshot))
        measured = WebDriverWait(browser, PATIENCE).until(painted)
    finally:
        browser.quit()
    return {event: round(milliseconds / 1000, 3) for event, milliseconds in measured.items()}


def served(folder: Path) -> dict[str, Any]:
    """Returns the seconds from a request to the end of the answer, for each route of an uploaded file's report."""
    made = report.labelled_rows(ROWS // 2, folder, random.Random(0))
    stack = Stack(folder / "home", port=0)
    try:
        with stack:
            headers = {"Authorization": f"Bearer {stack.first_key}"}
            with httpx2.Client(base_url=f"{stack.api_url}/v1", headers=headers, timeout=600, trust_env=False) as client:
                file = f"/files/{service.upload(client, [json.dumps(row) for row in made * 2])}"
                service.until(lambda: client.get(file).json()["report"]["status"] == "ready", stack)
                return {route: answered(client, f"{file}/{route}") for route in ("report", "report.html")}
    finally:
        stack.postgres.remove()


def answered(client: httpx2.Client, path: str) -> dict[str, Any]:
    times = []
    for _ in range(TIMES):
        began = time.monotonic()
        content = client.get(path).raise_for_status().content
        times.append(round(time.monotonic() - began, 3))
    return {"bytes": len(content), "times": times, "median": statistics.median(times)}


def main(screenshot: Path | None = None) -> int:
    with tempfile.TemporaryDirectory() as name:
        file = written(Path(name) / "report.html")
        load = os.getloadavg()[0]
        times = [opened(file, screenshot.absolute() if screenshot else None) for _ in range(TIMES)]
        medians = {event: statistics.median(one[event] for one in times) for event in times[0]}
        said: dict[str, Any] = {"rows": ROWS, "bytes": file.stat().st_size, "load_before": round(load, 1)}
        said |= {"what": "a report's page in Chromium, seconds from the navigation", "goal": GOAL, "times": times}
        said |= {"medians": medians, "served": served(Path(name))}
    print(json.dumps(said))
    service.write("report_page_cpu.json", said)
    slowest = max(*medians.values(), *(route["median"] for route in said["served"].values()))
    return 0 if slowest < GOAL else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("screenshot", type=Path, nargs="?", metavar="SCREENSHOT.png")
    sys.exit(main(parser.parse_args().screenshot))
