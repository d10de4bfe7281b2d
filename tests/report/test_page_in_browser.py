"""The page of a report in a real Chromium: sorted, filtered, copied from, without a word to the network."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select

from bench.report.contents import make_plots, make_report
from bench.report.page import render_page
from bench.study.runs import load_study
from tests.report._made_studies import made_study
from tests.report._parsed_page import Page, charts_of_page, table_of_page

PROGRAMS = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
MISSING = [name for name, path in PROGRAMS.items() if path is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING) and "chromium" not in os.environ.get("REQUIRE_OPTIONAL", "").split(","),
        reason=f"not installed: {', '.join(MISSING)} (Debian: chromium, chromium-driver)",
    ),
]
PLOTS = ("perplexity", "pareto", "hyperedge_weights")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync --disable-dev-shm-usage"
)
HOSTILE = '<script>window.pwned=1</script><img src=x onerror="window.pwned=1">'
COMMAND = f"python -m bench.run --run-name='{HOSTILE}'  --note='`$(x)` & \"ü\" ☃'"
VISIBLE = "return [...document.querySelectorAll('#table-{} > tbody')].filter(row => !row.hidden)"


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = made_study(
        tmp_path_factory.mktemp("page") / "couplers <i>", {"mean": 0.0, "HGNN all_pairs": -0.05}, seeds=12,
        failed={("mean", 1): "oom", ("HGNN all_pairs", 5): "crashed"}, run_name=HOSTILE,
    )  # fmt: skip
    for path in folder.glob("*/record.json"):
        record = json.loads(path.read_text())
        record["command"] = f"{COMMAND} --seed={record['seed']}"
        path.write_text(json.dumps(record))
    report = make_report(load_study(folder))
    plots = [plot for plot in make_plots(report) if plot.name in PLOTS]
    files = {name: data for plot in plots for name, data in plot.files().items()}
    path = folder.parent / "report.html"
    path.write_bytes(render_page(report, files).encode())
    return path


@pytest.fixture(scope="module")
def chromium(tmp_path_factory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = PROGRAMS["chromium"] or pytest.fail(f"not installed: {MISSING}")
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(PROGRAMS["chromedriver"]))
    driver.set_page_load_timeout(30)
    permissions = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    driver.execute_cdp_cmd("Browser.grantPermissions", permissions)
    driver.get("about:blank")
    driver.get_log("performance")  # Chromium's own first page
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium, page) -> Iterator[webdriver.Chrome]:
    """The page, freshly opened; after the test, what it asked for and said."""
    resize(chromium, 1280, 900)
    chromium.get(page.as_uri())
    chromium.execute_script(
        "document.querySelectorAll('#runs > details').forEach(part => { part.open = true; })"
    )
    yield chromium
    asked = []
    for entry in chromium.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.append(message["params"]["request"]["url"])
    assert page.as_uri() in [url.partition("#")[0] for url in asked]
    assert [url for url in asked if not url.startswith((page.as_uri(), "data:"))] == []
    assert chromium.get_log("browser") == []
    assert chromium.execute_script("return window.pwned") is None


@pytest.fixture(scope="module")
def runs(page) -> list[dict[str, Any]]:
    """The raw figures of the runs, in the order of the report."""
    rows = table_of_page(Page(page.read_text()), "runs")
    return [
        {**row, "seed": int(row["seed"]), "perplexity": float(row["perplexity"] or "nan")} for row in rows
    ]


def resize(driver: webdriver.Chrome, width: int, height: int) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def visible(driver: webdriver.Chrome, table: str = "runs") -> list[str]:
    """The row headers of the rows of a table that can be seen, in their order."""
    script = f"{VISIBLE.format(table)}.map(row => row.rows[0].querySelector('th').textContent)"
    return driver.execute_script(script)


def head(driver: webdriver.Chrome, table: str, title: str) -> WebElement:
    found = driver.find_elements(By.CSS_SELECTOR, f"#table-{table} thead button")
    return next(button for button in found if button.text == title)


def test_a_column_is_sorted_by_its_raw_figures_both_ways(browser, runs):
    button = head(browser, "runs", "perplexity")
    measured = sorted((run for run in runs if run["status"] == "ok"), key=lambda r: r["perplexity"])
    unknown = [run["run_id"] for run in runs if run["status"] != "ok"]
    up = [run["run_id"] for run in measured]
    assert len(unknown) == 2
    assert up != [run["run_id"] for run in runs]
    for expected, said in ((up, "ascending"), (up[::-1], "descending")):
        button.click()
        assert visible(browser) == expected + unknown
        assert button.find_element(By.XPATH, "..").get_attribute("aria-sort") == said
    button.click()
    assert visible(browser) == [run["run_id"] for run in runs]
    assert button.find_element(By.XPATH, "..").get_attribute("aria-sort") is None


def test_numbers_are_no_texts_and_texts_are_sorted_from_the_keyboard(browser, runs):
    head(browser, "runs", "seed").send_keys(Keys.ENTER)
    seeds = {run["run_id"]: run["seed"] for run in runs}
    assert [seeds[name] for name in visible(browser)] == sorted(seeds.values())  # 2 before 10
    head(browser, "runs", "status").send_keys(Keys.SPACE)
    statuses = {run["run_id"]: run["status"] for run in runs}
    assert [statuses[name] for name in visible(browser)] == ["crashed"] + ["ok"] * 22 + ["oom"]


def test_the_comparison_sorts_and_filters(browser):
    assert visible(browser, "comparison")[0] == "mean"
    head(browser, "comparison", "perplexity").click()
    assert visible(browser, "comparison")[:2] == ["Kneser-Ney trigram", "HGNN"]
    browser.find_element(By.CSS_SELECTOR, "[data-table=comparison] input").send_keys("hgnn better")
    assert visible(browser, "comparison") == ["HGNN"]


def test_runs_are_filtered_by_text_status_and_configuration(browser, runs):
    tools = browser.find_element(By.CSS_SELECTOR, "[data-table=runs]")
    words, said = tools.find_element(By.TAG_NAME, "input"), tools.find_element(By.TAG_NAME, "output")
    status, configuration = (Select(found) for found in tools.find_elements(By.TAG_NAME, "select"))
    assert said.text == "24 rows"
    status.select_by_visible_text("ok")
    assert visible(browser) == [run["run_id"] for run in runs if run["status"] == "ok"]
    configuration.select_by_visible_text("HGNN")
    hgnn = [run["run_id"] for run in runs if run["status"] == "ok" and run["configuration"] == "HGNN"]
    assert visible(browser) == hgnn
    assert said.text == "11 of 24 rows"
    words.send_keys(hgnn[3])
    assert visible(browser) == [hgnn[3]]
    words.clear()
    status.select_by_visible_text("all")
    configuration.select_by_visible_text("all")
    words.send_keys("<SCRIPT> --seed=11")
    assert visible(browser) == [run["run_id"] for run in runs if run["seed"] == 11]
    words.send_keys(" nonsense")
    assert visible(browser) == []
    assert said.text == "0 of 24 rows"


def copied(driver: webdriver.Chrome, place: int, clipboard: str = "navigator.clipboard") -> str:
    """Press the button of a row and return what is on the clipboard when it says so."""
    button = driver.find_elements(By.CSS_SELECTOR, ".copy")[place]
    button.click()
    end = time.monotonic() + 10
    while button.text != "copied" and time.monotonic() < end:
        time.sleep(0.02)
    assert button.text == "copied"
    assert driver.find_element(By.ID, "said").get_attribute("textContent") == "copied"
    assert driver.switch_to.active_element == button
    return driver.execute_async_script(
        f"{clipboard}.readText().then(arguments[0], e => arguments[0]('' + e))"
    )


def test_the_exact_command_is_copied(browser, runs):
    assert copied(browser, 3) == runs[3]["command"]
    assert runs[3]["command"].startswith(COMMAND)


def test_the_exact_command_is_copied_where_the_clipboard_has_no_interface(browser, runs):
    """As on a page that is no secure context."""
    browser.execute_script(
        "window.real = navigator.clipboard;"
        "Object.defineProperty(navigator, 'clipboard', {value: undefined, configurable: true})"
    )
    assert copied(browser, 20, "window.real") == runs[20]["command"]
    assert browser.find_elements(By.TAG_NAME, "textarea") == []


def test_every_plot_shows(browser):
    sizes = browser.execute_async_script(
        "const images = [...document.images];"
        "Promise.all(images.map(image => image.decode())).then(() => "
        "arguments[0](images.map(image => [image.naturalWidth, image.clientWidth, image.clientHeight])))"
    )
    assert len(sizes) == len(PLOTS) - 1, "a chart is in place of pareto"
    assert all(min(size) > 100 for size in sizes)


def test_a_row_unfolds(browser, runs):
    place = next(place for place, run in enumerate(runs) if run["status"] == "crashed")
    button = browser.find_elements(By.CSS_SELECTOR, ".unfold")[place]
    details = browser.find_element(By.ID, button.get_attribute("aria-controls"))
    assert not details.is_displayed()
    button.send_keys(Keys.ENTER)
    assert details.is_displayed()
    assert button.get_attribute("aria-expanded") == "true"
    for text in ("made to end as crashed", "passed: token_isolation", "sha256", "torch 2.13.0+cpu", HOSTILE):
        assert text in details.text
    link = details.find_element(By.CSS_SELECTOR, "[href='#data-1']")
    link.click()
    opened = browser.find_element(By.ID, "data-1")
    assert "files wiki.train.tokens" in opened.text
    button.click()
    assert not details.is_displayed()


def test_a_narrow_window_is_never_scrolled_sideways(browser):
    resize(browser, 360, 800)
    browser.execute_script(
        "document.querySelectorAll('details').forEach(part => { part.open = true; });"
        "document.querySelectorAll('.unfold').forEach(button => button.click());"
    )
    width, window = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert width <= window == 360
    wide = browser.execute_script(
        "return [...document.querySelectorAll('.more > td > div')].map(box => box.clientWidth)"
    )
    assert max(wide) <= 360


def test_what_was_typed_is_seen_as_it_was_typed(browser):
    assert browser.find_element(By.TAG_NAME, "h1").text == "couplers <i>"
    names = browser.execute_script("return [...document.querySelectorAll('#table-runs > tbody')]"
                                   ".map(row => row.rows[0].cells[2].textContent)")  # fmt: skip
    assert set(names) == {HOSTILE}
    assert browser.execute_script("return document.querySelectorAll('img[src=x]').length") == 0


SHOWN = """
    const figure = document.querySelector('[data-chart=' + arguments[0] + ']');
    const at = figure.chart.data.map((values) => values.filter((value) => value != null));
    return {data: at, shown: figure.chart.series.map((one) => one.show), width: figure.chart.width};
"""


def chosen(browser: webdriver.Chrome, chart: str, **menus: str) -> dict[str, Any]:
    """Choose from the menus of a chart and return what it draws."""
    figure = browser.find_element(By.CSS_SELECTOR, f"[data-chart={chart}]")
    for name, value in menus.items():
        Select(figure.find_element(By.CSS_SELECTOR, f"[data-of={name}]")).select_by_value(value)
    return browser.execute_script(SHOWN, chart)


def test_the_chart_of_losses_has_every_axis(browser, page):
    [data] = charts_of_page(page.read_text())
    arm = data["arms"][1]
    curve = arm["curves"]["validation"]
    loss = chosen(browser, "curves", split="validation", x="step", y="loss")["data"]
    assert loss[2] == curve["loss"]
    assert loss[0] == sorted(set(curve["step"]))
    for y, value in (("perplexity", math.exp), ("bits", lambda loss: loss * arm["bits"])):
        assert chosen(browser, "curves", y=y)["data"][2] == pytest.approx([*map(value, curve["loss"])])
    for x, last in (("tokens", curve["tokens"][-1]), ("seconds", curve["step"][-1] * curve["step_seconds"]),
                    ("flops", curve["tokens"][-1] * curve["flops_per_token"])):  # fmt: skip
        xs = chosen(browser, "curves", x=x)["data"][0]
        assert any(value == pytest.approx(last) for value in xs), x
    less = chosen(browser, "curves", x="step", y="difference")["data"]
    assert set(less[1]) == {0}
    assert less[2][-1] == pytest.approx(
        curve["loss"][-1] - data["arms"][0]["curves"]["validation"]["loss"][-1]
    )


def test_the_chart_of_costs_has_a_point_for_each_configuration(browser, page):
    [data] = charts_of_page(page.read_text())
    for name, _ in data["costs"]:
        found = chosen(browser, "costs", x=name, y="perplexity")["data"]
        assert found[0] == sorted({arm["costs"][name] for arm in data["arms"]})
        assert [[*values] for values in found[1:]] == [
            [pytest.approx(math.exp(arm["loss"]))] for arm in data["arms"]
        ]


def test_hover_names_a_configuration_and_the_legend_hides_it(browser):
    chosen(browser, "costs", x="peak_memory_bytes", y="perplexity")
    figure = browser.find_element(By.CSS_SELECTOR, "[data-chart=costs]")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", figure)
    over = figure.find_element(By.CSS_SELECTOR, ".u-over")
    at = browser.execute_script(
        "const plot = document.querySelector('[data-chart=costs]').chart;"
        "const place = plot.data[2].findIndex((value) => value != null);"
        "return [plot.valToPos(plot.data[0][place], 'x'), plot.valToPos(plot.data[2][place], 'y'),"
        " plot.over.clientWidth, plot.over.clientHeight]"
    )
    move = ActionChains(browser)
    move.move_to_element_with_offset(
        over, round(at[0] - at[2] / 2) + 2, round(at[1] - at[3] / 2) + 1
    ).perform()
    assert figure.find_element(By.TAG_NAME, "output").text.startswith("HGNN: ")
    names = figure.find_elements(By.CSS_SELECTOR, ".u-legend .u-series th")
    names[2].click()
    assert browser.execute_script(SHOWN, "costs")["shown"] == [True, True, False]
    assert chosen(browser, "costs", y="loss")["shown"] == [True, True, False], (
        "a choice of axis keeps it hidden"
    )
    figure.find_element(By.CSS_SELECTOR, "[data-show=all]").click()
    assert browser.execute_script(SHOWN, "costs")["shown"] == [True, True, True]


@pytest.mark.parametrize("width", [1280, 390])
def test_charts_fit_the_window(browser, width):
    resize(browser, width, 900)
    time.sleep(0.3)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    drawn = browser.execute_script(SHOWN, "curves")["width"]
    assert 0.7 * width < drawn < width
