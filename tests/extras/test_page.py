"""The page in a real browser (headless Chromium through its driver): order, ties, undo, reload, save, merge; and that
what a model wrote stays text, in the page and at the terminal."""
import json
import re
import shutil
import time
import warnings

import pytest

import answers
import page
from common import UserError
from data import write_jsonl
from terminal import visible

NASTY = [" <script>document.title = 'owned'</script>", " </script><img src=x onerror=\"document.title='owned'\">",
         " \"quotes\" 'single' &amp; <!-- comment", " line\u2028separator \u2029 end",
         " emoji 👩\u200d💻 and \u202eright-to-left\u202c שלום", " `back` ${ticks} \\u003c \\n",
         " <b>bold</b>\n second line", " SCRIPT_HASH PAGE_DATA"]
SAMPLES = [{"id": f"id{i}", "prompt": f"The film <i>{i}</i>", "responses": [f" {word} {i}" for word in "ABCD"]}
           for i in range(5)]


def test_no_text_of_a_model_reaches_the_page_as_markup():
    """Injection: a response that ends the data's element early, or a script that the policy does not name."""
    html = page.make_page([{"id": "x", "prompt": NASTY[0], "responses": NASTY}], "Which </script>?")
    parts = re.fullmatch(r'(.*<script type="application/json" id="data">)(.*?)(</script>.*)', html, re.DOTALL)
    head, data, rest = parts.groups()
    assert "<" not in data and data.isascii()
    assert json.loads(data)["samples"][0]["responses"] == NASTY
    empty = page.make_page([], "Which?")
    assert html.count("<script") == empty.count("<script") == 2 and "onerror" not in head + rest


def test_the_page_asks_nothing_of_the_network():
    html = page.make_page(SAMPLES, "Which?")
    assert not re.search(r"https?://|//[a-z]|src=|@import|fetch\(|XMLHttp|WebSocket|sendBeacon|eval\(|innerHTML", html)
    assert "default-src 'none'" in html and re.search(r"script-src 'sha256-[A-Za-z0-9+/=]{44}'", html)


def test_errors_of_the_page(tmp_path):
    write_jsonl(tmp_path / "s.jsonl", SAMPLES)
    write_jsonl(tmp_path / "ten.jsonl", [{"id": "a", "prompt": "", "responses": [str(i) for i in range(10)]}])
    fitting = {"samples": str(tmp_path / "s.jsonl"), "out": str(tmp_path / "p.html")}
    for flags, message in [({"samples": "nowhere"}, "no such file"), ({"count": -1}, "--limit|--count"),
                           ({"samples": str(tmp_path / "ten.jsonl")}, "nine"), ({"title": " "}, "--title"),
                           ({"out": str(tmp_path)}, ".html")]:
        with pytest.raises(UserError, match=message):
            page.page(page.PageConfig(**{**fitting, **flags}))
        assert not (tmp_path / "p.html").exists()


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start_browser():
    """A function that starts Chromium with a window of some size and a folder for downloads."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver, started = shutil.which("chromedriver"), []
    pytest.importorskip("selenium", reason="selenium is not there: pip install -r tests/requirements.txt")
    if not (chromium and driver):
        warnings.warn("no Chromium and chromedriver: the page was not tried in a browser (Debian: apt-get install "
                      "chromium chromium-driver)")
        pytest.skip("no Chromium and chromedriver")
    from selenium import webdriver

    def start(downloads, width=1100, height=900):
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                     "--disable-background-networking", "--disable-component-update", "--disable-sync",
                     "--disable-dev-shm-usage", f"--window-size={width},{height}"):
            options.add_argument(flag)
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        started.append(webdriver.Chrome(options, webdriver.ChromeService(driver)))
        started[-1].implicitly_wait(3)
        return started[-1]
    yield start
    for browser in started:
        browser.quit()


class Rater:
    """One person at the page."""

    def __init__(self, browser, path, name=""):
        self.browser = browser
        browser.get(path.resolve().as_uri())
        if name:
            self.find("#name").send_keys(name)
            self.find("#who button").click()

    def find(self, selector):
        return self.browser.find_element("css selector", selector)

    def keys(self, keys):
        from selenium.webdriver.common.action_chains import ActionChains
        ActionChains(self.browser).send_keys(*keys).perform()

    def shown(self):
        """Number and text of the responses, from top to bottom."""
        cards = self.browser.find_elements("css selector", "#list li")
        return [(int(card.find_element("css selector", ".number").text),
                 card.find_element("css selector", ".text").text.strip()) for card in cards]

    def status(self):
        return self.find("#status").text

    def save(self, downloads, name):
        path = downloads / f"answers-{name}.jsonl"
        path.unlink(missing_ok=True)
        self.find("#save").click()
        for _ in range(100):
            if path.exists() and path.read_text().endswith("\n"):
                return path
            time.sleep(0.05)
        raise AssertionError(f"nothing was saved: {list(downloads.iterdir())}")

    def errors(self):
        return [line for line in self.browser.get_log("browser") if line["level"] == "SEVERE"]


@pytest.fixture
def folder(tmp_path):
    write_jsonl(tmp_path / "samples.jsonl", SAMPLES)
    (tmp_path / "downloads").mkdir()
    page.page(page.PageConfig(samples=str(tmp_path / "samples.jsonl"), out=str(tmp_path / "a page.html")))
    return tmp_path


def test_order_undo_reload_save_and_merge(start_browser, folder):
    """The whole way of a rater: keys, ties, undo, a reload in the middle, mouse, skip, none acceptable, save, merge."""
    from selenium.webdriver.common.action_chains import ActionChains
    browser, downloads = start_browser(folder / "downloads"), folder / "downloads"
    rater = Rater(browser, folder / "a page.html", "ann")
    one, two, three, four = (text for _, text in rater.shown())
    rater.keys(["3", "1"])
    assert not rater.find("#next").is_enabled()
    rater.keys(["\ue007"])  # Enter with two of four placed: nothing happens
    assert rater.find("#count").text == "1 of 5"
    rater.keys(["=", "4", "2"])
    assert [n for n, _ in rater.shown()] == [3, 1, 4, 2] and rater.find("#next").is_enabled()
    rater.keys(["\ue007"])
    assert rater.find("#count").text == "2 of 5"
    rater.keys(["1", "2", "3", "4", "\ue007", "u"])  # answered and taken back
    assert rater.find("#count").text == "2 of 5" and "Taken back" in rater.status()
    rater.keys(["2", "2", "n", "4", "3", "2", "1", "\ue007"])  # 2 was taken back; none is acceptable
    browser.refresh()
    assert rater.find("#count").text == "3 of 5"
    before = rater.shown()
    cards = browser.find_elements("css selector", "#list li")
    ActionChains(browser).move_to_element(cards[3]).click_and_hold().move_to_element_with_offset(
        cards[0], 0, -10).release().perform()  # the last one to the top
    assert [n for n, _ in rater.shown()] == [4, 1, 2, 3]
    rater.find("#next").click()
    rater.find("#skip").click()
    assert rater.find("#count").text == "5 of 5"
    for _, text in rater.shown()[::-1]:  # by taps, the last shown first
        next(pick for pick in browser.find_elements("css selector", ".pick") if text in pick.text).click()
    rater.keys(["\ue007"])  # Enter goes on, although the response that was tapped last has the focus
    assert rater.find("#end").is_displayed()
    path = rater.save(downloads, "ann")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["order"] for row in rows] == ["3 1=4 2", "4 3 2 1", "4 1 2 3", "", "4 3 2 1"]
    assert [row.get("acceptable") for row in rows] == [None, False, None, None, None]
    assert [text.strip() for text in rows[0]["shown"]] == [one, two, three, four]
    assert [text.strip() for text in rows[2]["shown"]] == [text for _, text in before]
    assert all(0 <= row["seconds"] < 60 for row in rows) and {row["labeler"] for row in rows} == {"ann"}
    answers.merge(answers.MergeConfig(files=str(path), samples=str(folder / "samples.jsonl"),
                                      out=str(folder / "merged")))
    rankings = answers.read_answers(folder / "merged/rankings.jsonl")
    assert [row["id"] for row in rankings] == ["id0", "id1", "id2", "id4"]
    assert [text.strip() for text in rankings[0]["responses"]] == [three, one, two]
    assert not rater.errors()
    bob = Rater(browser, folder / "a page.html")  # another rater at the same device
    bob.find("#undo-end").click()
    assert bob.find("#count").text == "5 of 5"
    bob.find("#rename").click()
    bob.find("#name").clear()
    bob.find("#name").send_keys("bob")
    bob.find("#who button").click()
    assert bob.find("#count").text == "1 of 5" and [text for _, text in bob.shown()] != [one, two, three, four]


def test_the_keyboard_alone_suffices(start_browser, folder):
    """A control that a mouse alone reaches: here only Tab, Enter, space and arrows are pressed."""
    rater = Rater(start_browser(folder / "downloads"), folder / "a page.html")
    rater.find("#name").send_keys("cy\ue007")
    tab, enter, up = "\ue004", "\ue007", "\ue013"
    rater.keys([tab, up])  # the first control after the question is the first response, and can't move up
    assert [n for n, _ in rater.shown()] == [1, 2, 3, 4]
    rater.keys([tab] * 2 + [up])  # of its three tools only "move down" does anything yet
    assert [n for n, _ in rater.shown()] == [2, 1, 3, 4] and "Response 2: best" in rater.status()
    assert rater.browser.switch_to.active_element.get_attribute("class") == "pick"  # the focus went with it
    while rater.browser.switch_to.active_element.get_attribute("id") != "next":
        rater.keys([tab])
    rater.keys([enter])
    assert rater.find("#count").text == "2 of 5"


def test_two_tabs_and_a_browser_that_keeps_nothing(start_browser, folder):
    """Answers of one tab that another overwrites; answers lost to a click on the own name where storage is off."""
    browser = start_browser(folder / "downloads")
    one = Rater(browser, folder / "a page.html", "ann")
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    two = Rater(browser, folder / "a page.html")
    second = browser.current_window_handle
    browser.switch_to.window(first)
    one.keys(["1", "2", "3", "4", "\ue007"] * 3)
    time.sleep(0.5)  # until the browser's other processes know
    browser.switch_to.window(second)
    two.keys(["4", "3", "2", "1", "\ue007"])  # of the first sample, which the other tab has answered, too
    assert two.find("#save").text == "Save 3 answers" and two.find("#count").text == "4 of 5"
    time.sleep(0.5)
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": """
        Storage.prototype.setItem = () => { throw new DOMException("full", "QuotaExceededError"); };"""})
    three = Rater(browser, folder / "a page.html")
    three.keys(["1", "2", "3", "4", "\ue007"])
    assert "keeps nothing" in three.status() and three.find("#save").text == "Save 4 answers"
    three.find("#rename").click()
    three.find("#who button").click()
    assert three.find("#save").text == "Save 4 answers"


def test_a_clicked_button_gives_the_keys_back(start_browser, folder):
    """Enter that presses None or Clear a second time, where the page says that it goes on."""
    rater = Rater(start_browser(folder / "downloads"), folder / "a page.html", "hal")
    rater.find("#none").click()
    rater.keys(["1", "2", "3", "4", "\ue007"])
    assert rater.find("#count").text == "2 of 5"
    rater.find("#reset").click()
    rater.keys(["4", "3", "2", "1", "\ue007"])
    assert rater.find("#count").text == "3 of 5"
    rows = [json.loads(line) for line in rater.save(folder / "downloads", "hal").read_text().splitlines()]
    assert [(row["order"], row.get("acceptable")) for row in rows] == [("1 2 3 4", False), ("4 3 2 1", None)]


def test_moving_by_hand_keeps_the_other_ties(start_browser, folder):
    """1=2=3 4: with 2 at the end, 1 and 3 are still tied."""
    rater = Rater(start_browser(folder / "downloads"), folder / "a page.html", "gus")
    rater.keys(["1", "=", "2", "=", "3", "4"])
    for _ in range(2):
        rater.find("#list li .tools button[aria-label='Response 2: move down']").click()
    rater.keys(["\ue007"])
    row, = [json.loads(line) for line in rater.save(folder / "downloads", "gus").read_text().splitlines()]
    assert row["order"] == "1=3 4 2"


def test_everything_has_a_name_and_enough_contrast(start_browser, folder):
    """Buttons that a screen reader can't tell apart, and grey on grey, in light and in dark."""
    browser = start_browser(folder / "downloads", 400, 800)
    for dark in (False, True):
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]})
        rater = Rater(browser, folder / "a page.html", "" if dark else "di")
        back = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert back == ("rgb(20, 22, 26)" if dark else "rgb(255, 255, 255)")
        rater.keys(["1"])
        names = [button.accessible_name for button in browser.find_elements("css selector", "#question button")
                 if button.is_displayed()]
        assert all(names) and len(set(names)) == len(names)
        for text in [" A 0", "Response 3: move up", "Response 2: tie with the one above"]:
            assert any(text.strip() in name for name in names), names
        ratio = browser.execute_script("""
            const light = c => { const [r, g, b] = c.map(x =>
                                     (x /= 255) <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
                                 return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
            const parse = c => c.match(/[\\d.]+/g).map(Number);
            const back = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
                                if (c.length < 4 || c[3] > 0) return c.slice(0, 3); } return [255, 255, 255]; };
            return [...document.querySelectorAll("#question *, #keep *")].filter(e => e.offsetParent && !e.disabled
                && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())
                && !e.closest(":disabled")).map(e => {
                const own = light(parse(getComputedStyle(e).color).slice(0, 3));
                const [a, b] = [own, light(back(e))].sort((x, y) => y - x);
                return [(a + 0.05) / (b + 0.05), e.className || e.id || e.tagName]; });""")
        assert len(ratio) > 15 and min(ratio)[0] >= 4.5, min(ratio)
        # No sideways scrolling.
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert not rater.errors()


def test_nasty_text_is_shown_as_text(start_browser, tmp_path):
    """A response that runs, hides, reverses or ends something. The page shows what the terminal shows: visible()."""
    samples = [{"id": f"n{i}", "prompt": NASTY[i], "responses": [NASTY[i], NASTY[i + 1]]}
               for i in range(0, len(NASTY), 2)]
    (tmp_path / "p.html").write_text(page.make_page(samples, "Which <b>one</b>?"), encoding="utf-8")
    rater, seen = Rater(start_browser(tmp_path), tmp_path / "p.html", "eve"), []
    for sample in samples:
        elements = rater.browser.find_elements("css selector", ".text")
        texts = [element.get_property("textContent") for element in elements]
        seen += sorted(texts)
        escaped = re.sub(r"[\u2028\u2029\u202e\u202c]", lambda c: f"\\u{ord(c[0]):04x}", sample["prompt"])
        assert rater.find("#prompt").get_property("textContent") == escaped + " …"
        assert rater.find("#ask").text == "Which <b>one</b>?"
        made = rater.browser.execute_script("return document.querySelectorAll('main img, #list b, main script').length")
        assert made == 0
        rater.keys(["1"])
    assert rater.browser.title == "Which <b>one</b>?" and not rater.errors()
    assert sorted(seen) == sorted(visible(text.strip()) for text in NASTY)
    saved = [json.loads(line) for line in rater.save(tmp_path, "eve").read_text(encoding="utf-8").strip().split("\n")]
    assert sorted(text for row in saved for text in row["shown"]) == sorted(NASTY)  # the file has the real texts


def test_pairs_are_answered_by_one_key(start_browser, tmp_path):
    """The blind test between two policies: 1, 2, = and s, each of which goes on to the next pair."""
    samples = [{"id": f"p{i}", "prompt": "", "responses": [f" left {i}", f" right {i}"]} for i in range(4)]
    (tmp_path / "p.html").write_text(page.make_page(samples, "Which one?"), encoding="utf-8")
    rater = Rater(start_browser(tmp_path), tmp_path / "p.html", "flo")
    texts = [text for _, text in rater.shown()]
    rater.keys(["2", "=", "s"])
    time.sleep(0.3)  # sooner it would be the second half of a double click
    rater.find("#list li:first-child .pick").click()
    assert rater.find("#end").is_displayed()
    rows = [json.loads(line) for line in rater.save(tmp_path, "flo").read_text().splitlines()]
    assert [row["order"] for row in rows] == ["2 1", "1=2", "", "1 2"]
    assert [level[0].strip() for level in answers.levels_of(rows[0])] == [texts[1].strip(), texts[0].strip()]

