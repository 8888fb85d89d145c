"""Measures how fast Chromium opens the page of a report on 100,000 rows, each of them in a finding:
`python -m bench.report_page [SCREENSHOT.png]`. Needs chromium and chromedriver."""

import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from selenium import webdriver

from bench import service
from tunery.datasets.report import page
from tunery.datasets.report.case import Finding
from tunery.datasets.report.maker import Report
from tunery.datasets.report.verdict import Verdict

ROWS, TIMES, GOAL = 100_000, 5, 1.0
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
        measured: dict[str, float] = browser.execute_script(MEASURE)  # type: ignore[no-untyped-call]
    finally:
        browser.quit()
    return {event: round(milliseconds / 1000, 3) for event, milliseconds in measured.items()}


def main(screenshot: str | None = None) -> int:
    with tempfile.TemporaryDirectory() as name:
        file = written(Path(name) / "report.html")
        load = os.getloadavg()[0]
        times = [opened(file, Path(screenshot).absolute() if screenshot else None) for _ in range(TIMES)]
        medians = {event: statistics.median(one[event] for one in times) for event in times[0]}
        said: dict[str, Any] = {"rows": ROWS, "bytes": file.stat().st_size, "load_before": round(load, 1)}
    said |= {"what": "a report's page in Chromium, seconds from the navigation", "goal": GOAL, "times": times}
    print(json.dumps(said | {"medians": medians}))
    service.write("report_page_cpu.json", said | {"medians": medians})
    return 0 if max(medians.values()) < GOAL else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
