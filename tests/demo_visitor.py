"""A visitor of the web demo: opens its page in a headless Chromium, fills it in, looks and downloads.

- Runs as a script in the interpreter that has Playwright, which need not be that of the tests.
- Prints what it saw as JSON, for `tests/test_demo_browser.py`.

    python tests/demo_visitor.py http://127.0.0.1:7860/ outputs /usr/bin/chromium
"""

import json
import sys
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

QUIET = "no-sandbox disable-gpu disable-quic no-first-run disable-component-update disable-sync"
QUIET += " disable-background-networking"
PATIENCE = 240_000  # milliseconds


def visit(address, folder, chromium):
    seen = {"asked": []}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=[f"--{option}" for option in QUIET.split()], timeout=PATIENCE
        )
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        page.on("request", lambda request: seen["asked"].append(request.url))
        page.goto(address)
        page.wait_for_selector("#generate")
        seen["title"] = page.title()
        seen["examples"] = page.locator("#examples button").all_inner_texts()

        page.fill("#prompt textarea", "")
        page.click("#generate")
        error = page.locator(".toast-body")
        error.wait_for()
        seen["error"] = " ".join(error.inner_text().split())
        page.locator(".toast-close").click()

        page.click("#adapter input")
        page.get_by_role("option", name="knee").click()
        page.get_by_text("Labels of knee").wait_for()
        seen["examples of the adapter"] = page.locator("#examples button").all_inner_texts()
        page.fill("#prompt textarea", "retina")
        page.locator(".label-control", has_text="Glaucoma").get_by_text("yes", exact=True).click()
        for name, value in (("Images", 2), ("Steps", 3)):
            number = page.get_by_label(f"number input for {name}")
            number.fill(str(value))
            number.press("Tab")
        page.locator("#seed input").fill("7")
        page.click("#generate")
        images = page.locator("#gallery .thumbnail-item img")
        expect(images).to_have_count(2)
        page.locator("#compare img").first.wait_for()
        page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        seen["banner"] = page.locator("#notice").inner_text()
        page.screenshot(path=folder / "page.png")

        images.nth(1).click()
        expect(page.locator("#provenance")).to_contain_text("Image 2 of 2")
        expect(page.locator("#compare")).to_contain_text("Image 2 of 2")
        seen["provenance"] = page.locator("#provenance").inner_text()
        with page.expect_download() as download:
            page.locator("#gallery button[title=Download]").click()
        seen["download"] = download.value.suggested_filename
        download.value.save_as(folder / "download.png")

        page.mouse.move(640, 400)
        page.mouse.wheel(0, 5000)
        page.wait_for_function("window.scrollY > 0")
        seen["banner's place after scrolling"] = page.locator("#notice").bounding_box()["y"]
        browser.close()
    return seen


if __name__ == "__main__":
    print(json.dumps(visit(sys.argv[1], Path(sys.argv[2]), sys.argv[3])))
