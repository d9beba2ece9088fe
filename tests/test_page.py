"""The web page: its headers and files; and, in Chromium, that it speaks, records, converses and is accessible."""

import io
import re
import shutil
import time
import wave

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from test_serve import Running
from test_serve_faults import KEY
from test_structure import ROOT

from csm import Generator
from csm.serve.app import create_app
from csm.serve.service import Service
from csm.serve.settings import Settings

STATIC = ROOT / "csm" / "serve" / "static"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TEXT = "Good morning, how are you today?"
LONG = "Good morning, how are you today? We will meet again in the morning."
MAX_SECONDS = 3.0  # of a sentence

# Files


@pytest.fixture(scope="module")
def site():
    def no_model():
        raise AssertionError("the page needs no model")

    return TestClient(create_app(Service(Settings(api_keys=(KEY,)), no_model)), base_url="http://127.0.0.1")


def test_the_page_is_served_without_a_key_and_keeps_to_itself(site):
    page = site.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    links = re.findall(r"""(?:src|href)="(/[^"]*)\"""", page.text)
    assert {f"/static/{name}" for name in ("main.js", "style.css", "icon.svg")} <= set(links)
    imports = [
        f"/static/{name}" for path in STATIC.glob("*.js") for name in re.findall(r'"\./(.*?)"', path.read_text())
    ]
    for path in {*links, *imports}:
        assert site.get(path).status_code == 200, path
    for response in (page, site.get("/static/main.js")):
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"


def test_the_files_name_no_other_host_and_hold_nothing_inline():
    for path in STATIC.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//cdn|@import|innerHTML|localStorage|document\.cookie|\beval\b", text), path
    assert not re.search(r"<style|style=|\son\w+=|<script>", (STATIC / "index.html").read_text())


def test_only_the_page_needs_no_key(site):
    for path in ("/static/../metrics", "/static/%2e%2e/app.py", "/static/none.js"):
        assert site.get(path).status_code in (401, 404)
    assert site.get("/v1/audio/voices").status_code == 401
    assert site.get("/", headers={"Host": "evil.example"}).status_code == 403


# In the browser

browser_only = pytest.mark.browser
ARGUMENTS = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required", "--mute-audio"]
ARGUMENTS += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
# Listens at the page's AnalyserNode, 50 times a second.
SPY = """const create = AudioContext.prototype.createAnalyser;
window.peak = 0;
AudioContext.prototype.createAnalyser = function () {
  const node = create.call(this), samples = new Float32Array(2048);
  setInterval(() => { node.getFloatTimeDomainData(samples);
    for (const sample of samples) window.peak = Math.max(window.peak, Math.abs(sample)); }, 20);
  return node; };"""
PEAK = "() => { const peak = window.peak; window.peak = 0; return peak; }"  # since the last call
# How many different heights the bars in the accent colour have: those that were heard.
HEIGHTS = """() => { const canvas = document.getElementById("waveform"), { width, height } = canvas;
const data = canvas.getContext("2d").getImageData(0, 0, width, height).data, columns = new Array(width).fill(0);
const hex = getComputedStyle(canvas).getPropertyValue("--accent").match(/[0-9a-f]{2}/g);
const accent = hex.map(each => parseInt(each, 16)), same = i => accent.every((value, c) => data[i + c] === value);
for (let i = 0; i < data.length; i += 4) if (same(i)) columns[i / 4 % width]++;
return new Set(columns).size; }"""


@pytest.fixture(scope="module")
def generator():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = Generator.from_pretrained("tiny", device="cpu", max_streams=2)
    generator.warmup([1])
    yield generator
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def running(generator, tmp_path_factory):
    folder = tmp_path_factory.mktemp("voices")
    with Running(generator, model="tiny", max_streams=2, max_seconds=MAX_SECONDS, voices=folder) as running:
        yield running


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """Opens the page of a server. At the end there was no error and no warning, except that tests read pixels."""
    contexts, errors = [], []

    def note(message):
        if message.type in ("error", "warning") and "getImageData" not in message.text:
            errors.append(message.text)

    def open_page(running, **options):
        contexts.append(chromium.new_context(**{"viewport": {"width": 900, "height": 900}, **options}))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.add_init_script(SPY)
        page.on("console", note)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(running.url)
        page.wait_for_selector("#voice option", state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


def until(condition, seconds=60):
    """Not Playwright's wait_for_function, which needs eval: the page's policy forbids it."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
    return value


def spoken(page):
    """Wait until everything is generated; the samples of the download, as integers."""
    until(lambda: page.inner_text("#status").startswith("Spoken") or page.inner_text("#problem"))
    assert page.inner_text("#problem") == ""
    with page.expect_download() as download:
        page.click("#download")
    with wave.open(str(download.value.path())) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (24_000, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(int)


def same(samples, pcm):
    return np.array_equal(samples, np.frombuffer(pcm, "<i2"))


def by_http(running, text, **fields):
    return running.speak(text, **{"model": "tiny", "voice": "speaker_0", "seed": 5, **fields}).content


def settings(page):
    page.click("summary:has-text('Settings')")
    page.fill("#seed", "5")


@browser_only
def test_it_speaks_while_it_generates(open_page, running):
    page = open_page(running)
    settings(page)
    page.fill("#text", LONG)
    page.click("#speak")
    until(lambda: page.evaluate(PEAK) > 0.01)
    assert page.inner_text("#status") == "Generating …", "samples sound before the speech has ended"
    assert page.locator(".sentence.now").count() == 1
    until(lambda: page.evaluate(HEIGHTS) > 5)
    assert page.locator("[aria-current=true]").inner_text() == TEXT
    samples = spoken(page)
    assert page.locator(".sentence").all_inner_texts() == [TEXT, LONG[len(TEXT) + 1 :]]
    session = {"session": "page"}
    pcm = by_http(running, TEXT, **session) + by_http(running, LONG[len(TEXT) + 1 :], **{**session, "seed": 6})
    assert same(samples, pcm)
    first, rtf, length, seed = (page.inner_text(f"#{name}") for name in ("first-audio", "rtf", "length", "used-seed"))
    assert int(first.split()[0]) > 0 and float(rtf) > 0 and seed == "5"
    assert float(length.split()[0]) == pytest.approx(len(samples) / 24_000, abs=0.06)


@browser_only
def test_stop_frees_the_slot_and_keeps_what_was_heard(open_page, running):
    page = open_page(running)
    page.fill("#text", LONG * 20)
    page.click("#speak")
    until(lambda: page.evaluate(HEIGHTS) > 5)
    page.keyboard.press("Escape")
    until(lambda: running.engine.num_active == 0 and not running.service.sockets)
    assert page.inner_text("#status").startswith("Stopped after ")
    assert page.is_enabled("#speak") and page.is_enabled("#replay")
    time.sleep(0.2)
    page.evaluate(PEAK)
    time.sleep(0.2)
    assert page.evaluate(PEAK) == 0, "nothing plays on"
    page.click("#replay")
    until(lambda: page.evaluate(PEAK) > 0.01)


def recording(seconds=1.0):
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, 24_000, 0, "NONE", ""))
        noise = np.random.default_rng(0).normal(size=int(seconds * 24_000)) * 3000
        out.writeframes(noise.astype("<i2").tobytes())
    return file.getvalue()


def describe_voice(page, name):
    page.fill("#transcript", "What is said there.")
    page.fill("#voice-name", name)
    page.fill("#consent", "my own voice")
    page.check("#agreed")
    page.click("text=Add this voice")


@browser_only
def test_a_reference_is_uploaded_and_used(open_page, running):
    page = open_page(running)
    settings(page)
    page.click("summary:has-text('Add a voice')")
    page.click("text=Add this voice")
    assert page.inner_text("#voice-problem") == "Record something, or choose a file."
    page.set_input_files("#recording", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no audio"})
    until(lambda: page.inner_text("#voice-problem") == "This file cannot be decoded as audio.")
    page.set_input_files("#recording", {"name": "anna.wav", "mimeType": "audio/wav", "buffer": recording()})
    until(lambda: page.inner_text("#recording-state") == "Recording: 1.0 s")
    describe_voice(page, "anna")
    until(lambda: page.input_value("#voice") == "anna")
    page.fill("#text", TEXT)
    page.click("#speak")
    assert same(spoken(page), by_http(running, TEXT, voice="anna"))
    running.http.delete("/v1/audio/voices/anna")


@browser_only
def test_a_recording_stays_in_the_page_where_the_server_keeps_no_voices(open_page, generator):
    with Running(generator, model="tiny", max_streams=2, max_seconds=1.0) as running:
        page = open_page(running, permissions=["microphone"])
        page.click("summary:has-text('Add a voice')")
        assert "keeps no voices" in page.inner_text("#kept")
        page.click("#record")
        assert page.get_attribute("#record", "aria-pressed") == "true"
        time.sleep(1.5)
        page.click("#record")
        until(lambda: re.fullmatch(r"Recording: [1-9]\d*\.\d s", page.inner_text("#recording-state")))
        describe_voice(page, "me")
        until(lambda: page.input_value("#voice") == "me")
        page.fill("#text", TEXT)
        page.click("#speak")
        assert len(spoken(page)) > 1920


@browser_only
def test_a_conversation_of_two_voices(open_page, running):
    page = open_page(running)
    settings(page)
    page.click("#tab-talk")
    page.select_option("#voice-b", "speaker_2")
    page.fill("[aria-label='Line 1, voice A']", TEXT)
    page.fill("[aria-label='Line 2, voice B']", "I am very well, thank you.")
    page.click("#speak")
    until(lambda: page.locator("#lines li.now").count() == 1)
    samples = spoken(page)
    assert page.locator(".read .turn").all_inner_texts() == ["A", "B"]
    session = {"session": "talk"}
    pcm = by_http(running, TEXT, **session)
    pcm += by_http(running, "I am very well, thank you.", voice="speaker_2", **{**session, "seed": 1005})
    assert same(samples, pcm)
    page.click("#add-line")
    assert page.evaluate("() => document.activeElement.getAttribute('aria-label')") == "Line 3, voice A"
    page.click("[aria-label='Remove line 1']")
    assert page.locator("#lines li").count() == 2


@browser_only
def test_by_keyboard_alone(open_page, running):
    page = open_page(running)

    def tab_to(selector):
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
        raise AssertionError(f"{selector} is not reached")

    assert tab_to("#tab-text") == "solid", "the focus is visible"
    page.keyboard.press("ArrowRight")
    assert page.is_visible("#panel-talk") and not page.is_visible("#panel-text")
    page.keyboard.press("ArrowLeft")
    tab_to("#text")
    page.keyboard.type(TEXT)
    tab_to("#voice")
    page.keyboard.press("ArrowDown")
    assert page.input_value("#voice") == "speaker_1"
    assert tab_to("#speak") == "solid"
    page.keyboard.press("Enter")
    until(lambda: page.evaluate(PEAK) > 0.01)
    page.keyboard.press("Escape")
    until(lambda: page.inner_text("#status").startswith("Stopped"))
    for selector in ("#replay", "#download", "summary"):
        tab_to(selector)
    page.keyboard.press("Enter")
    assert tab_to("#seed") == "solid"
    page.keyboard.press("Control+Enter")
    until(lambda: page.evaluate(PEAK) > 0.01)


@browser_only
def test_it_fits_a_phone(open_page, running):
    page = open_page(running, viewport={"width": 360, "height": 740}, device_scale_factor=2, has_touch=True)
    for tab in ("#tab-text", "#tab-talk"):
        page.tap(tab)
        page.evaluate("() => document.querySelectorAll('details').forEach(each => (each.open = true))")
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
        for box in [each.bounding_box() for each in page.locator("button:visible, .button:visible").all()]:
            assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["height"] >= 44
    page.tap("#tab-text")
    page.fill("#text", TEXT)
    page.tap("#speak")
    until(lambda: page.evaluate(PEAK) > 0.01)


@browser_only
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation(open_page, running, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()

    def check():
        results = axe.run(page)
        assert results.violations_count == 0, results.generate_report()

    page = open_page(running, color_scheme=scheme, reduced_motion="reduce")
    check()
    page.evaluate("() => document.querySelectorAll('details').forEach(each => (each.open = true))")
    page.fill("#text", TEXT)
    page.click("#speak")
    until(lambda: page.locator(".sentence.now").count())
    check()
    page.keyboard.press("Escape")
    page.click("#tab-talk")
    page.click("#speak")
    assert page.inner_text("#problem") == "There is nothing to say yet."
    check()


@browser_only
def test_an_api_key_is_asked_for_and_kept_for_the_session_only(open_page, chromium, generator):
    with Running(generator, model="tiny", max_streams=2, max_seconds=1.0, api_keys=(KEY,)) as running:
        context = chromium.new_context()
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.goto(running.url)
        page.wait_for_selector("#key-dialog[open]")
        axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
        assert axe.run(page).violations_count == 0
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        until(lambda: page.inner_text("#key-problem") == "The key is not right.")
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#voice option", state="attached")
        until(lambda: not page.is_visible("#key-dialog"))
        page.fill("#text", TEXT)
        page.click("#speak")
        assert len(spoken(page)) > 1920
        stored = page.evaluate("() => [Object.values(sessionStorage), localStorage.length, document.cookie]")
        assert stored == [[KEY], 0, ""]
        page.reload()
        page.wait_for_selector("#voice option", state="attached")
        context.close()
