"""The studio in a real browser: the whole way, wrong inputs, kills, tabs, small and dark screens, keyboard, labels.

``DPSYNGEN_SCREENSHOTS=docs/studio pytest tests/studio`` writes the pictures of docs/studio.md.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dpsyngen import fit
from dpsyngen.data import load_images
from dpsyngen.privacy.budget import Budget
from dpsyngen.release.verify import verify
from dpsyngen.training.progress import progress_of, worker
from dpsyngen.training.run import Run
from tests.conftest import tiny_arrays
from tests.studio.served import (
    SHOTS,
    Served,
    fill,
    follow,
    needs_browser,
    opened,
    press,
    problem,
    refused,
    shot,
    wait_until,
)

pytestmark = [needs_browser, pytest.mark.slow]
SOURCE, NAME = "Folder, file or public set", "Name of the run"
REAL = "Real images not trained on"
BUDGET, KEY = "Budget file that all runs on these images share", "Private key to sign with (PEM); empty: not signed"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    from tests.report.chromium import find

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find(), args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs of a few digits, a set of images and one with a file that is none."""
    folder = tmp_path_factory.mktemp("studio")
    digits = load_images("digits")
    for name, part in (("few", slice(100)), ("others", slice(100, 140))):
        np.savez(folder / f"{name}.npz", images=digits.array()[part], labels=digits.labels[part])
    for name, epsilon in (("digits-1", 10.0), ("digits-2", 1.0)):
        source = "digits" if SHOTS else folder / "few.npz"
        fit.train(source, epsilon=epsilon, preset="demo", out=folder / "runs" / name)
    images, _ = tiny_arrays()
    (folder / "photos").mkdir()
    for number, pixels in enumerate(images[:20]):
        Image.fromarray(pixels).save(folder / "photos" / f"{number}.png")
    (folder / "photos" / "broken.png").write_bytes(b"no picture")
    (folder / "notes.zip").write_bytes(b"no bundle")
    return folder


@pytest.fixture(scope="module")
def served(home: Path) -> Iterator[Served]:
    studio = Served(home)
    yield studio
    studio.end()
    assert "Traceback" not in (home / "studio.err").read_text(encoding="utf-8")


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Any]:
    with opened(browser, served) as one:
        yield one


def choose(page: Any, served: Served, source: str = "digits") -> None:
    """Go to the promise about some images."""
    page.goto(f"{served.address}/images")
    fill(page, SOURCE, source)
    press(page, "Look at them")
    follow(page, "Go on: what is promised")
    page.get_by_label(NAME).wait_for()


# ------------------------------------------------------------------------------------------- the whole way


def test_from_a_folder_to_a_verified_bundle(page: Any, served: Served, home: Path, tmp_path: Path) -> None:
    follow(page, "New generator")
    press(page, "digits")
    press(page, "Look at them")
    page.get_by_text("1,437").wait_for()
    private = page.locator(".private", has_text="PRIVATE").locator("img")
    assert private.get_attribute("src").startswith("data:image/png;base64,")
    shot(page, "images")
    follow(page, "Go on: what is promised")
    page.get_by_text("50 % → at most 95.3 %").wait_for()
    page.get_by_text("1 % → at most 16.9 %").wait_for()
    slider = page.get_by_role("slider")
    for epsilon, place, words in (("10", "12", "practically 100 %"), ("3", "8", "50 % → at most 95.3 %")):
        fill(page, "ε", epsilon)
        page.get_by_text(words).first.wait_for()
        wait_until(lambda place=place: slider.get_attribute("aria-valuenow") == place)
    page.get_by_text(re.compile("It will take (about|less)")).wait_for()
    fill(page, NAME, "digits-3")
    shot(page, "promise", 1300)
    press(page, "Start training")
    page.wait_for_url("**/run/digits-3/train")
    page.get_by_role("link", name="Look at what it draws").wait_for()
    page.get_by_text("ε so far").wait_for()
    assert Run(home / "runs/digits-3").complete
    follow(page, "Look at what it draws")
    page.get_by_role("heading", name="From noise to image").wait_for()
    assert page.locator(".class-row img").count() == 10
    assert [real.input_value() for real in page.get_by_label(REAL).all()] == ["digits:test"] * 2
    page.get_by_text("Nothing was found").or_(page.locator(".finding").first).wait_for()
    shot(page, "look", 1500)
    follow(page, "Release")
    page.get_by_role("heading", name="Privacy certificate").wait_for()
    press(page, "Make a key")
    fill(page, "Generated images in it", "20")
    press(page, "Make the bundle")
    page.get_by_role("button", name="Download", exact=True).wait_for()
    shot(page, "release")
    with page.expect_download() as download:
        press(page, "Download")
    bundle = tmp_path / "digits-3.zip"
    download.value.save_as(bundle)
    assert verify(bundle, home / "runs/signing-key.pem.pub").passed
    follow(page, "Check it")
    page.get_by_text("I have the public key").click()
    page.get_by_label("public key").locator("input[type=file]").set_input_files(home / "runs/signing-key.pem.pub")
    page.get_by_label("public key").get_by_text("100.00%").wait_for()
    page.get_by_label("bundle").locator("input[type=file]").set_input_files(bundle)
    page.get_by_text("digits-3.zip: the bundle is sound").wait_for()
    page.get_by_text("is by the key that was given").wait_for()
    shot(page, "verify")
    follow(page, "Runs")
    page.locator(".runs img").nth(2).wait_for()
    shot(page, "runs")


def test_measured_checked_and_beside_real_images(page: Any, served: Served, home: Path) -> None:
    page.goto(f"{served.address}/run/digits-1/look")
    page.get_by_role("heading", name="From noise to image").wait_for()
    press(page, "Show training images beside them")
    page.locator(".beside img").nth(19).wait_for()
    for count in page.get_by_label("Generated images", exact=True).all():
        count.fill("1000" if SHOTS else "60")
    for real in page.get_by_label(REAL).all():
        real.fill("digits:test" if SHOTS else "others.npz")
    press(page, "Check")
    page.get_by_text(re.compile("igns? of memorisation")).first.wait_for()  # at ε = 10 either may come out
    press(page, "Measure")
    page.get_by_text("CAS, ").first.wait_for(timeout=240_000)
    page.get_by_text("floor").first.wait_for()
    ledger = (home / "runs/digits-1/private/ledger.jsonl").read_text(encoding="utf-8")
    assert "looked at beside generated ones" in ledger
    page.goto(f"{served.address}/")
    page.get_by_label("compare digits-1").click()
    page.get_by_label("compare digits-2").click()
    press(page, "Compare two")
    page.locator("section", has_text="digits-2").locator("img").nth(9).wait_for()
    page.get_by_text("CAS, ").first.wait_for()
    shot(page, "compare")


# ------------------------------------------------------------------------------------------- wrong inputs


def test_wrong_images(page: Any, served: Served) -> None:
    for label, value, told in (
        (SOURCE, "photographs", "there is nothing at"),
        (SOURCE, "../..", "outside the folders that the studio may use"),
        (SOURCE, "", "must be the path of a file or folder"),
        (SOURCE, "notes.zip", "files of this kind are not read"),
        ("Table of their labels (CSV), if there is one", "/etc/passwd", "outside the folders"),
        ("Pixels a side, if not as found", "many", "must be a whole number"),
        ("Pixels a side, if not as found", "3", "8"),
    ):
        page.goto(f"{served.address}/images")
        fill(page, SOURCE, "photos")
        page.get_by_text("More").click()
        refused(page, "Look at them", label, value, told)
        assert not page.get_by_role("link", name="Go on: what is promised").count()
    page.goto(f"{served.address}/images?source=photos")
    problem(page, "1 cannot be read, and will be left out (PRIVATE):")
    problem(page, "broken.png")
    page.get_by_role("link", name="Go on: what is promised").wait_for()


def test_wrong_promises(page: Any, served: Served, home: Path) -> None:
    Budget.create(home / "small.budget", epsilon_limit=0.5, delta=1e-4)
    choose(page, served)
    page.get_by_text("For experts").click()
    for label, value, told in (
        ("ε", "", "ε is None, but must be a number above 0"),
        ("ε", "0.0000001", "ε = 1e-07 is below"),
        ("δ", "little", "must be a number such as 1e-5"),
        ("δ", "0.5", "must be below 1/records"),
        ("Images of one person", "1.5", "must be a whole number"),
        (BUDGET, "../x.budget", "outside the folders"),
        (BUDGET, "none.budget", "cannot be read"),
        (BUDGET, "small.budget", "above the budget"),
        (NAME, "../mine", "is '../mine', but must be a plain name"),
        (NAME, "", "is '', but must be a plain name"),
        (NAME, "digits-1", "holds a finished run"),
    ):
        refused(page, "Start training", label, value, told)
    assert page.url.startswith(f"{served.address}/promise")


def test_wrong_releases(page: Any, served: Served, home: Path) -> None:
    page.goto(f"{served.address}/run/digits-2/release")
    for label, value, told in (
        (KEY, "/etc/hosts", "outside the folders"),
        (KEY, "notes.zip", "is no private key"),
        ("Name of the file", "../x.zip", "must be a plain name"),
        ("Name of the file", "x.tar", "must be one that ends in .zip"),
        ("Generated images in it", "", "must be a whole number"),
    ):
        refused(page, "Make the bundle", label, value, told)
    assert not list(home.glob("**/x.*"))


def test_wrong_bundles_and_runs(page: Any, served: Served, home: Path, tmp_path: Path) -> None:
    page.goto(f"{served.address}/verify")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("generator.json", "{}")
    for path in (home / "notes.zip", tmp_path / "other.zip"):
        page.get_by_label("bundle").locator("input[type=file]").set_input_files(path)
        page.get_by_text(f"{path.name}: the bundle is NOT to be relied on").wait_for()
    (tmp_path / "much.pub").write_bytes(bytes(2**16 + 1))
    page.get_by_text("I have the public key").click()
    page.get_by_label("public key").locator("input[type=file]").set_input_files(tmp_path / "much.pub")
    problem(page, "the public key is too large")
    for _ in range(2):  # away while the pictures of the runs are drawn
        page.goto(f"{served.address}/", wait_until="commit")
        page.goto(f"{served.address}/verify")
    page.goto(f"{served.address}/run/nobody/look")
    problem(page, "does not exist")
    page.goto(f"{served.address}/run/..%5Cx/train")
    problem(page, "must be a plain name")
    page.goto(f"{served.address}/compare?run=digits-1&run=../x")
    problem(page, "must be a plain name")
    page.goto(f"{served.address}/compare?run=digits-1")
    problem(page, "choose two")
    page.goto(f"{served.address}/run/digits-1/look")
    fill(page, "Guidance", "3")
    press(page, "Draw")
    problem(page, "guidance")
    refused(page, "Measure", "Generated images", "2.5", "must be a whole number")


# ------------------------------------------------------------------------------------- kills, tabs, reloads


@pytest.mark.xdist_group("killed")  # a studio of its own, so beside the other tests
def test_a_killed_studio_loses_nothing(browser: Any, tmp_path: Path) -> None:
    studio = Served(tmp_path)
    path = tmp_path / "runs/long"
    try:
        with opened(browser, studio, killed=True) as page:
            choose(page, studio)
            fill(page, NAME, "long")
            page.get_by_label("Train on").click()
            press(page, "Start training")
            page.wait_for_url("**/run/long/train")
            page.get_by_role("button", name="Stop after this step").wait_for()
            wait_until((path / "run.json").exists)
            studio.end(signal.SIGKILL)
            assert Run(path).busy, "the training goes on without the studio"
            studio = Served(tmp_path)
        with opened(browser, studio) as page:
            page.goto(f"{studio.address}/run/long/train")
            page.get_by_text("Training.").wait_for()
            page.get_by_text("of 160 steps").wait_for()
            page.locator(".private", has_text="What the network draws now").locator("img").wait_for()
            shot(page, "training", 1400)
            page.reload()
            page.get_by_text("of 160 steps").wait_for()
            with page.context.expect_page() as other:
                page.evaluate("window.open(location.href)")
            other.value.get_by_text("of 160 steps").wait_for()
            press(page, "Stop after this step")
            for tab in (page, other.value):
                tab.get_by_role("button", name="Go on").wait_for()
                tab.get_by_text("Interrupted.  Nothing is lost").wait_for()
            assert worker(path) is None
            done = progress_of(Run(path)).phases[-1].done
            assert done < 160
            press(page, "Go on")
            page.get_by_text("Training.").wait_for()
            wait_until(lambda: progress_of(Run(path)).phases[-1].done > done)
            press(page, "Stop after this step")
            page.get_by_role("button", name="Go on").wait_for()
    finally:
        if (number := worker(path)) is not None:
            os.kill(number, signal.SIGKILL)
        studio.end()


def test_a_second_tab_cannot_start_the_same_run(page: Any, served: Served) -> None:
    choose(page, served, "few.npz")
    other = page.context.new_page()
    choose(other, served, "few.npz")
    for tab in (page, other):
        fill(tab, NAME, "twice")
    press(page, "Start training")
    page.wait_for_url("**/run/twice/train")
    press(other, "Start training")
    problem(other, "already")
    page.get_by_role("link", name="Look at what it draws").wait_for()


def test_a_page_that_stands_still_for_a_while_keeps_what_was_typed(page: Any, served: Served) -> None:
    page.goto(f"{served.address}/run/digits-2/release")
    fill(page, "Name of the file", "typed.zip")
    # As on a busy machine, but without keeping it busy: the page waits for an answer that takes twelve seconds.
    page.route("**/slow", lambda route: (time.sleep(12), route.fulfill(body="")))
    page.evaluate("const r = new XMLHttpRequest(); r.open('GET', '/slow', false); r.send()")
    press(page, "Make a key")
    page.wait_for_function("[...document.querySelectorAll('input')].some(i => i.value.endsWith('signing-key.pem'))")
    assert page.get_by_label("Name of the file").input_value() == "typed.zip"


def test_the_guard_stands_before_everything(served: Served) -> None:
    host = served.address.removeprefix("http://")
    for path, headers in (
        ("/_nicegui_ws/socket.io/?EIO=4&transport=websocket", "Origin: http://evil.example\r\n"),
        ("/_nicegui_ws/socket.io/?EIO=4&transport=websocket", f"Origin: http://{host}\r\n"),
        ("/_nicegui_ws/socket.io/?EIO=4&transport=polling", ""),
        ("/", ""),
        ("/run/digits-1/look", ""),
    ):
        upgrade = (
            "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n" if "Origin" in headers else ""
        )
        key = "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n" if upgrade else "Connection: close\r\n"
        with socket.create_connection(("127.0.0.1", int(host.partition(":")[2]))) as line:
            line.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{headers}{upgrade}{key}\r\n".encode())
            assert line.recv(4096).split(b" ")[1] == b"403", path


# ---------------------------------------------------------------------------- small, dark, by keyboard, heard

PAGES = ("/", "/images?source=digits", "/promise?source=digits", "/run/digits-1/train", "/run/digits-1/look")
PAGES += ("/run/digits-1/release", "/verify", "/compare?run=digits-1&run=digits-2")


def settled(page: Any, address: str) -> None:
    page.goto(address)
    page.wait_for_selector("main h1")
    page.wait_for_function("!document.querySelector('.q-spinner')")
    page.wait_for_timeout(300)
    page.wait_for_function("!document.querySelector('.q-spinner')")


@pytest.mark.parametrize("dark", [True, False])
def test_a_phone_shows_it_and_a_screen_reader_says_it_light_and_dark(browser: Any, served: Served, dark: bool) -> None:
    small = {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark"}
    with opened(browser, served, **(small if dark else {"color_scheme": "light"})) as page:
        for path in PAGES:
            settled(page, served.address + path)
            wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
            assert wide <= 0, f"{path} is {wide} pixels wider than the window"
            if dark:
                ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
                assert max(map(int, ground[4:-1].split(","))) < 60, path
            assert violations(page) == [], path


def violations(page: Any) -> list[str]:
    """What axe-core finds: missing labels, contrast, structure; a skip with the reason where it is not installed."""
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None or not found.submodule_search_locations:
        pytest.skip("axe_playwright_python, which brings axe-core, is not installed")
    page.evaluate((Path(found.submodule_search_locations[0]) / "axe.min.js").read_text(encoding="utf-8"))
    result = page.evaluate("axe.run()")
    return [f"{v['id']}: {n['html'][:160]}: {n['failureSummary']}" for v in result["violations"] for n in v["nodes"]]


def test_by_keyboard_alone(page: Any, served: Served) -> None:
    def tab_to(name: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            labels = "[...(e.labels || [])].map(l => l.innerText)"
            own = "[e.closest('[aria-label]')?.ariaLabel, e.innerText]"
            text = page.evaluate(f"(e => {own}.concat({labels}).join(' '))(document.activeElement)")
            if name in text:
                return
        raise AssertionError(f"the keyboard does not reach {name!r}")

    tab_to("New generator")
    page.keyboard.press("Enter")
    page.get_by_label(SOURCE).wait_for()
    page.wait_for_function("document.activeElement.tagName == 'INPUT'")
    page.keyboard.type("digits")
    page.keyboard.press("Enter")
    page.get_by_text("1,437").wait_for()
    tab_to("Go on: what is promised")
    page.keyboard.press("Enter")
    page.get_by_text("50 % → at most 95.3 %").wait_for()
    tab_to("ε, from safer to better images")
    page.keyboard.press("ArrowLeft")
    page.get_by_text("50 % → at most 88.1 %").wait_for()
    tab_to(NAME)
    page.keyboard.press("Control+a")
    page.keyboard.type("keys")
    tab_to("Start training")
    page.keyboard.press("Enter")
    page.wait_for_url("**/run/keys/train")
    page.get_by_role("link", name="Look at what it draws").wait_for()
    tab_to("Look at what it draws")
    page.keyboard.press("Enter")
    page.wait_for_url("**/run/keys/look")


def test_what_is_typed_before_the_connection_is_there_is_kept(page: Any, served: Served) -> None:
    page.add_init_script("Object.defineProperty(window, 'did_handshake', {get: () => false, set: () => {}})")
    page.goto(f"{served.address}/images")
    page.get_by_label(SOURCE).fill("digits")
    page.keyboard.press("Enter")
    page.get_by_text("1,437").wait_for()
