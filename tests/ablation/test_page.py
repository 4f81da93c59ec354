"""report.html in Chromium, as a reader opens it: from disk, with no network, on a desktop and on a phone."""

import json
import shutil

import pytest

from jaxlm.ablation import report
from tests.ablation.test_report import AXIS, EFFECTS, NASTY, study

pytest.importorskip("plotly", reason="needs plotly")
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
WebDriverWait = pytest.importorskip("selenium.webdriver.support.wait").WebDriverWait
pytestmark = [
    pytest.mark.slow,  # all of them share one browser
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="needs Chromium: apt-get install chromium chromium-driver",
    ),
]
DESKTOP, PHONE = (1440, 900), (390, 844)


@pytest.fixture(scope="session")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    report.write(study(), folder)
    return (folder / "report.html").as_uri()


@pytest.fixture
def opened(browser, address):
    """Opens the page at a size of the window; whatever a test does there, the console must stay silent."""

    def at(size: tuple[int, int]):
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(address)
        return browser

    for name in ("browser", "performance"):
        browser.get_log(name)
    yield at
    assert browser.get_log("browser") == []


def rows(browser, column: int) -> list[str]:
    """Of the ranking, from top to bottom."""
    script = (
        "return [...document.querySelectorAll('#ranking tbody tr')].map(row => row.cells[arguments[0]].textContent)"
    )
    return browser.execute_script(script, column)


def test_it_opens_without_the_network(opened):
    browser = opened(DESKTOP)
    assert browser.title == study().question
    assert browser.find_element("css selector", "html").get_attribute("lang") == "en"
    assert browser.find_element("css selector", ".verdict").text == study().verdict
    charts = browser.find_elements("css selector", ".chart")
    charts = {one.get_attribute("id"): len(one.find_elements("css selector", ".trace")) for one in charts}
    assert list(charts) == ["forest", "curves", "sensitivity-0"] and min(charts.values()) >= 4
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert asked and {address.split(":")[0] for address in asked} <= {"file", "data"}


def test_no_button_sends_anything_away(opened):
    buttons = opened(DESKTOP).find_elements("css selector", "#curves .modebar-btn")
    names = [one.get_attribute("data-title") for one in buttons]
    assert names == ["Zoom", "Pan", "Reset axes", "Autoscale", "Download plot as a PNG"]


def test_text_of_the_study_stays_text(opened):
    browser = opened(DESKTOP)
    assert NASTY in rows(browser, 0)
    assert browser.find_elements("css selector", "td b, .legend b, .chart b") == []
    labels = browser.find_elements("css selector", "#forest .annotation-text")
    assert f"{NASTY} · better" in [one.get_attribute("textContent") for one in labels]


@pytest.mark.parametrize("key", ["click", "\ue007", " "], ids=["click", "Enter", "Space"])
def test_the_ranking_sorts_by_number(opened, key):
    browser = opened(DESKTOP)
    header = browser.find_elements("css selector", "#ranking th")[3]
    button = header.find_element("css selector", "button")
    seen = []
    for expected in ("ascending", "descending"):
        button.click() if key == "click" else button.send_keys(key)
        assert header.get_attribute("aria-sort") == expected
        seen.append([0.0 if text == "baseline" else float(text) for text in rows(browser, 3)])
    assert seen[0] == sorted(seen[0]) and seen[1] == seen[0][::-1] and seen[0][0] < 0
    sorts = [one.get_attribute("aria-sort") for one in browser.find_elements("css selector", "#ranking th")]
    assert len(sorts) == 9 and sorts[:5] == ["none", "none", "none", "descending", "none"]


def test_what_is_unknown_sorts_last(opened):
    browser = opened(DESKTOP)
    button = browser.find_elements("css selector", "#ranking th button")[4]
    for _ in range(2):
        button.click()
        assert rows(browser, 4)[-1] == "–"


def test_the_legend_hides_and_shows_a_variant(opened):
    browser = opened(DESKTOP)
    button = browser.find_element("css selector", ".legend[data-chart=curves] button:nth-of-type(2)")
    visible = "return document.getElementById('curves').data.map(trace => trace.visible)"
    before = browser.execute_script(visible)
    button.click()
    assert browser.execute_script(visible)[3:6] == ["legendonly"] * 3  # band, mean, training
    assert browser.execute_script(visible)[6:] == before[6:] and button.get_attribute("aria-pressed") == "false"
    button.send_keys("\ue007")
    assert browser.execute_script(visible)[3:6] == [True] * 3 and button.get_attribute("aria-pressed") == "true"


def test_hovering_shows_the_values_of_all_variants(opened):
    browser = opened(DESKTOP)
    plot = browser.find_element("css selector", "#curves .nsewdrag")
    shown = "return document.querySelector('#curves .hoverlayer').textContent"
    right = plot.size["width"] // 2 - 8
    for axis, x in (("tokens", 40), ("flops", right)):  # with so many FLOPs the baseline was over long ago
        browser.find_element("css selector", f"input[value={axis}]").click()
        webdriver.ActionChains(browser).move_to_element_with_offset(plot, x, 5).move_by_offset(3, 3).perform()
        text = WebDriverWait(browser, 10).until(lambda browser: browser.execute_script(shown))
        assert all(name in text for name in EFFECTS) and text.count("±") == len(EFFECTS) - 1
        webdriver.ActionChains(browser).move_to_element(browser.find_element("css selector", "h1")).perform()
        WebDriverWait(browser, 10).until(lambda browser: not browser.execute_script(shown))


def test_the_curves_change_their_horizontal_axis(opened):
    browser = opened(DESKTOP)
    title = "return document.querySelector('#curves .xtitle').textContent"
    ends = "return Math.max(...document.getElementById('curves').data[1].x)"
    assert browser.execute_script(title) == "training tokens"
    assert browser.execute_script(ends) == 8_192_000
    for name, expected, end in (("time", "training time (seconds)", 210), ("flops", "training FLOPs", 5.16096e13)):
        browser.find_element("css selector", f"input[value={name}]").click()
        assert browser.execute_script(title) == expected
        assert browser.execute_script(ends) == pytest.approx(end)


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_nothing_is_wider_than_the_screen(opened, size):
    browser = opened(size)
    browser.find_element("css selector", "summary").click()
    width = browser.execute_script("return document.scrollingElement.scrollWidth")
    assert width <= browser.execute_script("return innerWidth") == size[0]
    for chart in browser.find_elements("css selector", ".chart .main-svg"):
        assert chart.size["width"] <= size[0]


def test_every_control_is_reached_by_tab(opened):
    browser = opened(DESKTOP)
    controls = "#ranking th button, input[name=axis]:checked, .legend button, summary"
    expected = {one.text or one.get_attribute("value") for one in browser.find_elements("css selector", controls)}
    reached, element = set(), None
    while element != browser.find_element("css selector", "summary"):
        webdriver.ActionChains(browser).send_keys("\ue004").perform()
        element = browser.switch_to.active_element
        assert element.tag_name != "body"
        reached.add(element.text or element.get_attribute("value"))
    assert len(expected) > 12 and expected <= reached


def test_on_paper_the_details_are_open_and_the_plots_fit(opened):
    browser = opened(DESKTOP)
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert browser.find_element("css selector", "details").get_attribute("open")
    assert {one.size["width"] for one in browser.find_elements("css selector", ".chart .main-svg")} == {660}
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    assert browser.find_element("css selector", "#curves .main-svg").size["width"] > 900


def test_a_study_that_has_not_begun_has_a_page_too(browser, tmp_path):
    report.write(study(outcomes=[], comparisons=[], noise=None, differences={}, chosen={}), tmp_path)
    browser.get((tmp_path / "report.html").as_uri())
    assert browser.get_log("browser") == [] and len(rows(browser, 0)) == 5
    assert AXIS not in browser.find_element("css selector", "main").text
