"""The page in a real browser (headless Chromium): order, ties, undo, reload, save, merge; and text stays text."""
import json
import re
import shutil

import pytest

from common import visible
from data import read_rankings, read_rows, write_jsonl
from labeling import merge, page

ENTER = "\ue007"
NASTY = [" <script>document.title = 'owned'</script>", " </script><img src=x onerror=\"document.title='owned'\">",
         " \"quotes\" 'single' &amp; <!-- comment", " line\u2028separator \u2029 end", " `${ticks}` \\u003c\n",
         " emoji 👩\u200d💻 and \u202eright-to-left\u202c שלום", " SCRIPT_HASH PAGE_DATA"]
SAMPLES = [{"id": f"id{i}", "prompt": f"The film <i>{i}</i>", "responses": [f" {word} {i}" for word in "ABCD"]}
           for i in range(5)]


def test_no_text_of_a_model_is_markup_and_nothing_is_asked_of_the_network():
    """Injection: a response that ends the data's element early, or a script that the policy does not name."""
    html = page.make_page([{"id": "x", "prompt": NASTY[0], "responses": NASTY}], "Which </script>?")
    head, data, rest = re.fullmatch(r'(.*id="data">)(.*?)(</script>.*)', html, re.DOTALL).groups()
    assert "<" not in data and data.isascii() and json.loads(data)["samples"][0]["responses"] == NASTY
    assert html.count("<script") == page.make_page([], "").count("<script") == 2 and "onerror" not in head + rest
    assert not re.search(r"https?://|src=|@import|fetch\(|XMLHttp|eval\(|innerHTML", page.make_page(SAMPLES, "Which?"))
    assert "default-src 'none'" in head and re.search(r"script-src 'sha256-[A-Za-z0-9+/=]{44}'", head)


@pytest.fixture
def browser(tmp_path):
    """Chromium, whose downloads go to tmp_path."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: the page was not tried")
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("Chromium and chromedriver are not installed: the page was not tried in a browser")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in "headless=new no-sandbox disable-gpu disable-background-networking disable-dev-shm-usage".split():
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    browser.implicitly_wait(30)
    yield browser
    browser.quit()


def test_ranking_in_a_browser(browser, tmp_path):
    """An answer lost, or stored in another order than given; a response that runs, hides or ends something."""
    def find(selector):
        return browser.find_element("css selector", selector)

    def keys(*pressed):
        webdriver.ActionChains(browser).send_keys(*pressed).perform()

    from selenium import webdriver
    from selenium.webdriver.support.ui import WebDriverWait
    write_jsonl(tmp_path / "samples.jsonl", [*SAMPLES, {"id": "nasty", "prompt": NASTY[0], "responses": NASTY}])
    page.main(page.Config(f"{tmp_path}/a page.html", f"{tmp_path}/samples.jsonl", title="Which <b>one</b>?"))
    browser.get((tmp_path / "a page.html").as_uri())
    find("#name").send_keys("ann" + ENTER)
    keys("3", "4", ENTER)  # with two of four placed nothing happens
    assert find("#count").text == "1 of 6" and not find("#next").is_enabled()
    keys("=", "1", "2")
    assert [number.text for number in browser.find_elements("css selector", "#list b")] == ["3", "4", "1", "2"]
    keys(ENTER, "1", "2", "3", "4", ENTER, "u")  # answered and taken back
    find("#none").click()  # gives the keys back to the question
    keys("2", "2", "4", "3", "2", "1", ENTER)  # 2 was taken back; none is acceptable
    assert find("#count").text == "3 of 6"
    # Under load Chromium shows some reloaded files an empty storage, and the next time a full one.
    WebDriverWait(browser, 60).until(lambda _: browser.refresh() or find("#count").text == "3 of 6")
    cards = browser.find_elements("css selector", "#list li")
    drag = webdriver.ActionChains(browser).click_and_hold(cards[3]).move_to_element_with_offset(cards[0], 0, -9)
    drag.release().perform()  # the last one to the top
    find("#next").click()
    find("#skip").click()
    for pick in browser.find_elements("css selector", ".pick")[::-1]:
        pick.click()
    keys(ENTER)  # although the response that was tapped last has the focus
    shown = [text.get_property("textContent") for text in browser.find_elements("css selector", ".text")]
    assert sorted(shown) == sorted(visible(text.strip()) for text in NASTY)  # as at the terminal
    assert browser.title == find("#ask").text == "Which <b>one</b>?"
    assert not browser.execute_script("return document.querySelectorAll('main img, .text *, main script').length")
    keys(*"1234567", ENTER)
    find("#save").click()
    path = tmp_path / "answers-ann.jsonl"
    WebDriverWait(browser, 60).until(lambda _: path.exists() and path.read_bytes().endswith(b"\n"))
    rows = read_rows(path, dict)
    assert [row["order"] for row in rows] == ["3 1=4 2", "4 3 2 1", "4 1 2 3", "", "4 3 2 1", "1 2 3 4 5 6 7"]
    assert [row.get("acceptable") for row in rows] == [None, False, None, None, None, None]
    merge.main(merge.Config((path,), f"{tmp_path}/samples.jsonl", f"{tmp_path}/out"))
    rankings = read_rankings(tmp_path / "out/rankings.jsonl")
    assert len(rankings) == 5 and rankings[0]["responses"] == [rows[0]["shown"][i] for i in (2, 0, 1)]
