"""The page in a real browser, at the widths of a desk and of a phone: nothing overflows, everything decodes,
the console is silent."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.data.manifest import Manifest, write_manifest
from tests.wordless.report.chromium import Chromium, find_chromium
from tests.wordless.report.test_report import write_run
from wordless.report.report import ReportConfig, report

pytestmark = [
    pytest.mark.slow,  # four pages with their figures, and a browser
    pytest.mark.skipif(
        find_chromium() is None, reason="there is no chromium here (Debian's package of that name)"
    ),
]

WIDTHS = (1400, 400)
# Every sound's own bytes, decoded by the browser: its seconds, or the error. No request is made, which the
# page forbids.
DECODE = """Promise.all([...document.querySelectorAll("audio")].map(async (player) => {
    const bytes = Uint8Array.from(atob(player.src.split(",")[1]), (letter) => letter.charCodeAt(0));
    try { return (await new OfflineAudioContext(1, 1, 16000).decodeAudioData(bytes.buffer)).duration; }
    catch (error) { return String(error); }
}))"""
# The player's own way to the same sounds, which the page's policy on content could forbid.
LOAD = """Promise.all([...document.querySelectorAll("audio")].map((player) => new Promise((done) => {
    player.onloadedmetadata = () => done(player.duration);
    player.onerror = () => done(player.error.message);
    player.preload = "metadata";
    player.load();
})))"""
# Elements that reach beyond the window, but for those in a container that scrolls by itself.
WIDER = """[...document.querySelectorAll("body *")]
    .filter((it) => !it.closest(".wide, .card")).filter((it) => {
    const box = it.getBoundingClientRect();
    return box.right > document.documentElement.clientWidth + 1 || box.left < -1;
}).map((it) => it.outerHTML.slice(0, 80))"""
UNDRAWN = (
    "[...document.images].filter((it) => !it.complete || !it.naturalWidth || "
    "it.getBoundingClientRect().width < 200).length"
)
BRIGHTNESS = (
    "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number).reduce((a, b) => a + b) / 3"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By what the corpus has, the page of a run on it."""
    folder = tmp_path_factory.mktemp("pages")
    long = "a_name_without_a_single_blank_that_is_longer_than_a_phone_is_wide_and_goes_on_" * 2
    configs = {
        "everything": write_run(folder / "everything", text=long),
        "transcripts": write_run(folder / "transcripts", phones=False),
        "nothing": write_run(folder / "nothing", text=None, phones=False, lm=False),
    }
    configs["everything"] = configs["everything"].model_copy(update={"title": long})
    unnamed = folder / "alone" / "manifest"
    rows = [
        {
            "id": u.id,
            "path": u.path,
            "start": 0,
            "num_samples": u.num_samples,
            "sample_rate": 16000,
            "split": u.split,
        }
        for u in Manifest(configs["nothing"].manifest)
    ]
    write_manifest(unnamed, rows, {}, {}, [])
    configs["a manifest alone"] = ReportConfig(
        out=str(folder / "alone"), manifest=str(unnamed), left_out={long: long}
    )
    for config in configs.values():
        report(config)
    return {name: Path(config.out, "report.html") for name, config in configs.items()}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("corpus", ["everything", "transcripts", "nothing", "a manifest alone"])
def test_the_page_does_not_scroll_sideways_and_every_figure_is_drawn(
    browser: Chromium, pages: dict[str, Path], corpus: str, width: int
) -> None:
    browser.open(pages[corpus], width)
    for details in ("closed", "open"):
        if details == "open":
            browser.evaluate('document.querySelectorAll("details").forEach((it) => { it.open = true; })')
        wide, inner = browser.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert inner == width and wide <= width, browser.evaluate(WIDER)
        assert browser.evaluate(WIDER) == []
    assert browser.evaluate("document.images.length") > 0 and browser.evaluate(UNDRAWN) == 0
    assert browser.errors == []


@pytest.mark.parametrize("corpus", ["everything", "transcripts"])
def test_every_sound_of_the_page_decodes_and_is_longer_than_a_blink(
    browser: Chromium, pages: dict[str, Path], corpus: str
) -> None:
    browser.open(pages[corpus], WIDTHS[0])
    decoded, loaded = browser.evaluate(DECODE), browser.evaluate(LOAD)
    assert len(decoded) == len(loaded) == 4
    for seconds in (*decoded, *loaded):
        assert isinstance(seconds, float) and seconds > 0.2, seconds
    assert browser.errors == []


def test_the_page_is_dark_where_the_reader_prefers_that_and_its_figures_keep_their_white(
    browser: Chromium, pages: dict[str, Path]
) -> None:
    card = BRIGHTNESS.replace("document.body", 'document.querySelector(".card")')
    browser.open(pages["nothing"], WIDTHS[0], dark=True)
    assert browser.evaluate(BRIGHTNESS) < 60 and browser.evaluate(card) == 255
    browser.open(pages["nothing"], WIDTHS[0])
    assert browser.evaluate(BRIGHTNESS) == 255


def test_the_browser_would_notice_an_error_and_a_page_too_wide(browser: Chromium, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    wide = "<div style='width: 900px'>wide</div><img src='nowhere.png'>"
    page.write_text(
        "<!DOCTYPE html><meta name=viewport "
        f"content='width=device-width'>{wide}<script>console.error('no'); throw 1</script>"
    )
    browser.open(page, 400)
    assert (
        browser.evaluate("document.documentElement.scrollWidth") > 400 and len(browser.evaluate(WIDER)) >= 1
    )
    assert len(browser.errors) >= 3  # what was written, what was thrown, and the image that is not there
