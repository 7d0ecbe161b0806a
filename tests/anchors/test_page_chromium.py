"""The page in a browser: by mouse, by keyboard alone, and with markup in a model's output."""

import contextlib
import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("selenium", reason="needs selenium")
pytest.importorskip("uvicorn", reason="needs the extra annotate")

from pages import AURORA, ELENA, NAME, QUESTIONS, Slow, desk_on, opened, served, settle
from selenium import webdriver
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    StaleElementReferenceException,
)
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from session_models import tokenizer

from fused_losses.anchors.files import read_records

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="needs Chromium: apt-get install chromium chromium-driver"
)

END = "<|end|>"


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1280,900"):
        options.add_argument(f"--{argument}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(DRIVER, log_output=os.devnull)
    found = webdriver.Chrome(options=options, service=service)
    yield found
    found.quit()
    service.stop()


class Tab:
    """What a test asks of the page."""

    def __init__(self, driver, page):
        self.driver = driver
        driver.get_log("browser")
        driver.get(page.address)
        self.wait(lambda: self.text("#status").endswith(".") or self.one("#empty").is_displayed())

    def one(self, css):
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def all(self, css):
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def text(self, css):
        return self.driver.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", css).strip()

    def click(self, css, at=0):
        """What is there now: the page may put another in its place meanwhile."""
        self.wait(lambda: [self.all(css)[at].click()])

    def wait(self, what):
        passing = (StaleElementReferenceException, ElementClickInterceptedException, ElementNotInteractableException)
        return WebDriverWait(self.driver, 60, 0.05, passing).until(lambda _: what())

    def words(self):
        return self.driver.execute_script("return document.getElementById('answer').textContent")

    def tokens(self):
        """Their own texts, without marks."""
        return self.driver.execute_script(
            "return [...document.querySelectorAll('.tok:not(.end)')].map(found => found.firstChild?.textContent ?? '')"
        )

    def until(self, *tokens):
        self.wait(lambda: self.tokens() == list(tokens) and "." in self.text("#status"))

    def settled(self):
        self.wait(lambda: not self.one("#stop").is_displayed() and self.text("#status").endswith("."))

    def press(self, *keys):
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)

    def focused(self):
        return self.driver.execute_script("return document.activeElement.dataset.at ?? document.activeElement.id")

    def problems(self):
        """Of the page's own: not what the server refused, which a toast has said."""
        found = (entry for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE")
        return [entry["message"] for entry in found if entry["source"] != "network"]


@contextlib.contextmanager
def tab_on(driver, path, *answers, **options):
    with opened(path, *answers, **options) as desk, served(desk) as page:
        tab = Tab(driver, page)
        yield tab, desk
        assert tab.problems() == []
        driver.get("about:blank")


def tokens_of(text):
    found = tokenizer().encode(text, add_special_tokens=False)
    return [tokenizer().decode([token]).strip() for token in found] + [END]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "anchors.jsonl"


def test_by_mouse_from_the_wrong_token_to_the_record(driver, file):
    with tab_on(driver, file) as (tab, _):
        tab.until(*tokens_of(ELENA))
        assert tab.text(".turn.user .plain") == QUESTIONS[0]
        tab.click(".tok", NAME)
        tab.wait(lambda: len(tab.all("#choices-list label")) == 10 and not tab.all(".ghost"))
        choices = [label.text.split("\n") for label in tab.all("#choices-list label")]
        assert choices[0][1] == "“ Elena”" and choices[1][1] == "“ Aurora”" and choices[1][-1].endswith("%")
        tab.click("#choices-list label", 1)
        assert "Aurora" in tab.text("#apply")
        tab.click("#apply")
        tab.until(*tokens_of(AURORA))
        anchor = tab.one(".tok.anchor")
        assert anchor.get_attribute("data-at") == str(NAME) and "was “ Elena”" in anchor.get_attribute("aria-label")
        assert tab.text("#corrections-list del") == "“ Elena”"
        tab.click("#undo")
        tab.until(*tokens_of(ELENA))
        assert not tab.all(".tok.anchor") and not tab.one("#corrections").is_displayed()
        tab.click("#redo")
        tab.until(*tokens_of(AURORA))
        driver.refresh()
        tab.wait(lambda: tab.all(".tok.anchor"))
        tab.click("#accept")
        tab.wait(lambda: tab.text(".turn.user .plain") == QUESTIONS[1])
        tab.settled()
        assert tab.text("#progress-text") == "1 of 2 done" and "1 record" in tab.text("#file")
        (record,) = read_records(file, tokenizer())
        assert record.completion.text == AURORA + END and record.anchors[0].original_text == " Elena"
        driver.refresh()
        tab.wait(lambda: tab.all(".task.done"))
        tab.click(".task.done button")
        tab.wait(lambda: tab.all(".tok.anchor"))
        assert "In the file." in tab.text("#status")


def test_by_keyboard_alone(driver, file):
    with tab_on(driver, file) as (tab, _):
        tab.until(*tokens_of(ELENA))
        tab.press(Keys.ARROW_RIGHT)
        assert tab.focused() == "0"
        tab.press(Keys.ARROW_RIGHT, Keys.END, Keys.HOME, *[Keys.ARROW_RIGHT] * NAME)
        assert tab.focused() == str(NAME)
        tab.press(Keys.ENTER)
        tab.wait(lambda: tab.driver.switch_to.active_element.get_attribute("name") == "choice")
        tab.press("2")
        tab.wait(lambda: "Aurora" in tab.text("#apply"))
        tab.press(Keys.ENTER)
        tab.until(*tokens_of(AURORA))
        tab.wait(lambda: tab.focused() == str(NAME))
        tab.press("u")
        tab.until(*tokens_of(ELENA))
        tab.press("r")
        tab.until(*tokens_of(AURORA))
        tab.press("x")
        tab.wait(lambda: not tab.all(".tok.anchor"))
        tab.press("u")
        tab.wait(lambda: tab.all(".tok.anchor"))
        tab.press(Keys.ENTER)
        tab.wait(lambda: tab.one("#unmark").is_displayed())
        tab.press("/")
        assert tab.focused() == "own"
        tab.press("Aurora Smith", Keys.ENTER)
        tab.wait(lambda: "Smith" in tab.tokens())
        tab.settled()
        tab.press("u")
        tab.until(*tokens_of(AURORA))
        tab.press("?")
        assert tab.one("#help-dialog").is_displayed()
        tab.press(Keys.ESCAPE)
        tab.press("a")
        tab.wait(lambda: tab.text(".turn.user .plain") == QUESTIONS[1])
        tab.settled()
        tab.press("n")
        tab.wait(lambda: tab.focused() == str(NAME))
        tab.wait(lambda: tab.one("#panel").is_displayed())
        tab.press(Keys.ESCAPE)
        assert not tab.one("#panel").is_displayed()
        tab.press("p", "And you?", Keys.ENTER)
        tab.wait(lambda: tab.text(".turn.user .plain") == "And you?")
        tab.settled()
    (record,) = read_records(file, tokenizer())
    assert [anchor.text for anchor in record.anchors] == [" Aurora"]


MARKUP = "My <script>document.title='owned'</script> <img src=x onerror=\"document.title='owned'\"> <b>name</b> &lt;"


def test_markup_in_an_answer_or_a_prompt_is_text(driver, file):
    image = "<img src=x onerror=\"document.title='owned'\">"
    with tab_on(driver, file, MARKUP, questions=(image, "<b>b</b>")) as (tab, _):
        tab.settled()
        shown = tab.words().replace("␣", " ")
        assert "<script>" in shown and "<img src=x onerror=" in shown and "&lt;" in shown
        tab.click(".tok", 1)
        tab.wait(lambda: not tab.all(".ghost"))
        tab.one("#own").send_keys("<script>document.title='owned'</script>")
        tab.click("#apply")
        tab.settled()
        tab.click("#compare")
        assert tab.text("#before-text").startswith("My <script>")
        assert not tab.all("main script, main img, main b, nav img, nav b, aside img, .toasts img")
        assert driver.title == "fused-losses annotate"
        assert tab.text(".task-text").startswith("<img src=x")


def test_the_policy_stops_what_would_get_through(driver, file):
    """Were there a fault, the browser would run no script of another's: nor take markup at all."""
    with opened(file) as desk, served(desk) as page:
        Tab(driver, page)
        refused = driver.execute_script(
            "try { document.body.innerHTML = '<img src=x onerror=alert(1)>' } catch (problem) { return problem.name }"
        )
        assert refused == "TypeError"
        owned = "document.body.setAttribute('onclick', \"document.title='owned'\"); document.body.click()"
        assert driver.execute_script(f"try {{ {owned} }} catch (problem) {{ return problem.name }}") == "TypeError"
        assert driver.title == "fused-losses annotate"
        driver.get("about:blank")
        driver.get_log("browser")


def test_what_cannot_be_seen_is_shown(driver, file):
    with tab_on(driver, file, "My\n\nname\tis \u202e\x1b[2J\u200b 😀") as (tab, _):
        tab.settled()
        faces = tab.tokens()
        assert faces[-1] == END and "↵" in "".join(faces) and "⇥" in "".join(faces) and "␛" in "".join(faces)
        assert "‹U+202E›" in "".join(faces) and "‹U+200B›" in "".join(faces)
        assert len(tab.all("#answer br")) == 2
        parts = [found.text for found in tab.all(".tok .sub")]
        assert "1/4" in parts and "4/4" in parts  # 😀


def test_a_second_tab_shows_the_same(driver, file):
    with tab_on(driver, file) as (tab, _):
        tab.until(*tokens_of(ELENA))
        first = driver.current_window_handle
        driver.switch_to.new_window("tab")
        driver.get(tab_address(tab, first))
        tab.until(*tokens_of(ELENA))
        tab.click(".tok", NAME)
        tab.wait(lambda: len(tab.all("#choices-list label")) == 10 and not tab.all(".ghost"))
        tab.click("#choices-list label", 1)
        tab.click("#apply")
        tab.until(*tokens_of(AURORA))
        driver.close()
        driver.switch_to.window(first)
        tab.until(*tokens_of(AURORA))


def tab_address(tab, handle):
    current = tab.driver.current_window_handle
    tab.driver.switch_to.window(handle)
    address = tab.driver.current_url
    tab.driver.switch_to.window(current)
    return address


def test_corrections_are_discarded_only_when_asked(driver, file):
    with tab_on(driver, file) as (tab, desk):
        desk.replace(NAME, " Aurora")
        tab.until(*tokens_of(AURORA))
        for answer, question in (("no", QUESTIONS[0]), ("yes", QUESTIONS[1])):
            tab.press("s")
            tab.wait(lambda: tab.one("#confirm").is_displayed())
            tab.click(f"#confirm button[value={answer}]")
            tab.wait(lambda question=question: tab.text(".turn.user .plain") == question)
        tab.settled()
        assert settle(desk)["current"] == 1


def test_a_running_answer_is_interrupted(driver, file):
    desk = desk_on(file, model=Slow(ELENA, seconds=0.15))
    with contextlib.closing(desk), served(desk) as page:
        desk.begin()
        driver.get(page.address)
        tab = Tab.__new__(Tab)
        tab.driver = driver
        tab.wait(lambda: len(tab.tokens()) >= 2)
        tab.press(Keys.ESCAPE)
        tab.wait(lambda: "Interrupted." in tab.text("#status"))
        assert len(tab.tokens()) < 15 and tab.all(".tok.end")
        tab.press("g")
        tab.until(*tokens_of(ELENA))
        driver.get("about:blank")


def test_a_server_that_ended_is_said(driver, file):
    with opened(file) as desk:
        with served(desk) as page:
            tab = Tab(driver, page)
        tab.wait(lambda: tab.one("#offline").is_displayed())
        assert "does not answer" in tab.text("#offline")
        driver.get("about:blank")
        driver.get_log("browser")


NARROW = 360


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, NARROW])
def test_it_fits_and_can_be_read(driver, file, theme, width):
    """Nothing is wider than the window, and every text has a contrast of 4.5 with its ground (WCAG AA)."""
    scheme = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    try:
        with tab_on(driver, file) as (tab, desk):
            desk.replace(NAME, " Aurora")
            tab.until(*tokens_of(AURORA))
            tab.click(".tok", NAME)
            tab.wait(lambda: len(tab.all("#choices-list label")) == 10 and not tab.all(".ghost"))
            if shots := os.environ.get("FUSED_LOSSES_SHOTS"):
                driver.save_screenshot(str(Path(shots) / f"{theme}-{width}.png"))
            assert driver.execute_script("return document.documentElement.scrollWidth") <= width
            low = driver.execute_script((Path(__file__).parent / "contrast.js").read_text())
            assert low == []
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
