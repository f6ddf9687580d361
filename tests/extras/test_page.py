"""The page in a real browser (headless Chromium through its driver): order, ties, undo, reload, save, merge; and that
what a model wrote stays text, in the page as at the terminal."""
import json
import re
import shutil
import time

import pytest

from common import UserError, visible
from data import write_jsonl
from labeling import merge, page

ENTER, UP = "\ue007", "\ue013"
NASTY = [" <script>document.title = 'owned'</script>", " </script><img src=x onerror=\"document.title='owned'\">",
         " \"quotes\" 'single' &amp; <!-- comment", " line\u2028separator \u2029 end",
         " emoji 👩\u200d💻 and \u202eright-to-left\u202c שלום", " `back` ${ticks} \\u003c \\n",
         " <b>bold</b>\n second line", " SCRIPT_HASH PAGE_DATA"]
SAMPLES = [{"id": f"id{i}", "prompt": f"The film <i>{i}</i>", "responses": [f" {word} {i}" for word in "ABCD"]}
           for i in range(5)]


def test_no_text_of_a_model_is_markup_and_nothing_is_asked_of_the_network(tmp_path):
    """Injection: a response that ends the data's element early, or a script that the policy does not name."""
    html = page.make_page([{"id": "x", "prompt": NASTY[0], "responses": NASTY}], "Which </script>?")
    head, data, rest = re.fullmatch(r'(.*id="data">)(.*?)(</script>.*)', html, re.DOTALL).groups()
    assert "<" not in data and data.isascii() and json.loads(data)["samples"][0]["responses"] == NASTY
    assert html.count("<script") == page.make_page([], "").count("<script") == 2 and "onerror" not in head + rest
    remote = r"https?://|//[a-z]|src=|@import|fetch\(|XMLHttp|WebSocket|sendBeacon|eval\(|innerHTML"
    assert not re.search(remote, page.make_page(SAMPLES, "Which?"))
    assert "default-src 'none'" in head and re.search(r"script-src 'sha256-[A-Za-z0-9+/=]{44}'", head)
    write_jsonl(tmp_path / "ten.jsonl", [{"id": "a", "prompt": "", "responses": [str(i) for i in range(10)]}])
    with pytest.raises(UserError, match="nine"):
        page.main(page.Config(str(tmp_path / "p.html"), str(tmp_path / "ten.jsonl")))


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium, whose downloads go to browser.downloads."""
    pytest.importorskip("selenium", reason="selenium is not installed: the page was not tried in a browser")
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("Chromium and chromedriver are not installed: the page was not tried in a browser")
    from selenium import webdriver
    options, downloads = webdriver.ChromeOptions(), tmp_path_factory.mktemp("downloads")
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                 "--disable-dev-shm-usage", "--window-size=1100,900"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    browser.implicitly_wait(3)
    browser.downloads = downloads
    yield browser
    browser.quit()


class Rater:
    """One person at a page of these samples."""

    def __init__(self, browser, folder, samples, name):
        from selenium.webdriver.common.action_chains import ActionChains
        write_jsonl(folder / "samples.jsonl", samples)
        page.main(page.Config(str(folder / "a page.html"), str(folder / "samples.jsonl"), title="Which <b>one</b>?"))
        self.browser, self.act, self.name = browser, lambda: ActionChains(browser), name
        browser.get((folder / "a page.html").as_uri())
        self.find("#name").send_keys(name + ENTER)

    def find(self, selector):
        return self.browser.find_element("css selector", selector)

    def keys(self, *keys):
        self.act().send_keys(*keys).perform()

    def until(self, true):
        end = time.time() + 60
        while not true() and time.time() < end:
            time.sleep(0.05)
        assert true()

    def shown(self):
        """Numbers of the responses, from top to bottom."""
        return [int(number.text) for number in self.browser.find_elements("css selector", "#list b")]

    def saved(self):
        """The rows of the file that Save makes; nothing may be wrong in the browser's log."""
        path = self.browser.downloads / f"answers-{self.name}.jsonl"
        self.find("#save").click()
        self.until(lambda: path.exists() and path.read_bytes().endswith(b"\n"))
        assert not [line for line in self.browser.get_log("browser") if line["level"] == "SEVERE"]
        return [json.loads(line) for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]


def test_order_undo_reload_save_and_merge(browser, tmp_path):
    """An answer lost, or stored in another order than it was given: keys, ties, undo, reload, drag, skip, taps."""
    ann = Rater(browser, tmp_path, SAMPLES, "ann")
    ann.keys("3", "1", ENTER)  # with two of four placed nothing happens
    assert ann.find("#count").text == "1 of 5" and not ann.find("#next").is_enabled()
    ann.keys("=", "4", "2")
    assert ann.shown() == [3, 1, 4, 2]
    ann.keys(ENTER, "1", "2", "3", "4", ENTER, "u")  # answered and taken back
    assert ann.find("#count").text == "2 of 5" and "Taken back" in ann.find("#status").text
    ann.find("#none").click()  # gives the keys back to the question
    ann.keys("2", "2", "4", "3", "2", "1", ENTER)  # 2 was taken back; none is acceptable
    browser.refresh()
    ann.until(lambda: browser.execute_script("return document.getElementById('count')?.textContent") == "3 of 5")
    cards = browser.find_elements("css selector", "#list li")  # the last one to the top
    drag = ann.act().move_to_element(cards[3]).click_and_hold().move_to_element_with_offset(cards[0], 0, -9)
    drag.release().perform()
    ann.find("#next").click()
    ann.find("#skip").click()
    for pick in browser.find_elements("css selector", ".pick")[::-1]:
        pick.click()
    ann.keys(ENTER)  # although the response that was tapped last has the focus
    assert ann.find("#end").is_displayed()
    rows = ann.saved()
    assert [row["order"] for row in rows] == ["3 1=4 2", "4 3 2 1", "4 1 2 3", "", "4 3 2 1"]
    assert [row.get("acceptable") for row in rows] == [None, False, None, None, None]
    assert all(row["seconds"] >= 0 for row in rows) and {row["labeler"] for row in rows} == {"ann"}
    merge.main(merge.Config(f"{browser.downloads}/answers-ann.jsonl", f"{tmp_path}/samples.jsonl", str(tmp_path)))
    rankings = [json.loads(line) for line in (tmp_path / "rankings.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rankings] == ["id0", "id1", "id2", "id4"]
    assert rankings[0]["responses"] == [rows[0]["shown"][i] for i in (2, 0, 1)]


def test_the_keyboard_alone_suffices_and_moving_keeps_the_other_ties(browser, tmp_path):
    """A control that a mouse alone reaches; 1=2=3 4 with 2 moved to the end, in which 1 and 3 are no longer tied."""
    cy = Rater(browser, tmp_path, SAMPLES[:2], "cy")
    cy.keys("\ue004", "\ue004", UP)  # Tab to the first response and past it, where a tie is not possible yet
    assert cy.shown() == [2, 1, 3, 4] and "Response 2: best" in cy.find("#status").text
    cy.keys(UP, ENTER)  # it keeps the focus; it can't move further up
    cy.keys("1", "=", "2", "=", "3", "4", "\ue004")
    buttons = browser.find_elements("css selector", "button")
    names = [button.accessible_name for button in buttons if button.is_displayed()]
    assert all(names) and len(set(names)) == len(names) and "Response 2: tie with the one above" in names
    cy.keys("\ue004", "\ue015", "\ue015", ENTER)
    assert [row["order"] for row in cy.saved()] == ["2 1 3 4", "1=3 4 2"]


def test_nasty_text_is_shown_as_text_and_pairs_take_one_key(browser, tmp_path):
    """A response that runs, hides, reverses or ends something. The page shows what the terminal shows: visible()."""
    samples = [{"id": f"n{i}", "prompt": NASTY[i], "responses": [NASTY[i], NASTY[i + 1]]} for i in (0, 2, 4, 6)]
    eve, seen = Rater(browser, tmp_path, samples, "eve"), []
    for sample, key in zip(samples, "12=s"):
        texts = browser.find_elements("css selector", ".text")
        seen += [text.get_property("textContent") for text in texts]
        assert eve.find("#prompt").get_property("textContent") == visible(sample["prompt"]) + " …"
        assert browser.title == eve.find("#ask").text == "Which <b>one</b>?"
        assert not browser.execute_script("return document.querySelectorAll('main img, .text *, main script').length")
        eve.keys(key)
    assert sorted(seen) == sorted(visible(text.strip()) for text in NASTY)
    rows = eve.saved()
    assert [row["order"] for row in rows] == ["1 2", "2 1", "1=2", ""]
    assert sorted(text for row in rows for text in row["shown"]) == sorted(NASTY)  # the file has the real texts
