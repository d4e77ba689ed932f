"""A real Chromium for the tests of the pages, and the command that makes the pictures of docs/pages.

    python -m tests.browser results/tiny-janus/pages docs/pages

It needs /usr/bin/chromium (Debian's package chromium) and the PyPI package playwright.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, Request, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
LARGEST = 150_000  # bytes of a picture in docs/pages
HEIGHT = 1500  # pixels of a page that a picture shows


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


class Watched:
    """What a page did: errors on its console, failed requests, and addresses outside the folder of the pages."""

    def __init__(self, page: Page) -> None:
        self.errors: list[str] = []
        self.outside: list[str] = []
        page.on("console", lambda message: self.errors.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("requestfailed", self.failed)
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else self.outside.append(r.url))

    def failed(self, request: Request) -> None:
        if request.failure != "net::ERR_ABORTED":  # a person who is faster than the pictures leaves them before they have come
            self.errors.append(f"failed: {request.failure} {request.url[:200]}")

    def check(self) -> None:
        assert not self.errors, self.errors
        assert not self.outside, self.outside


def ready(page: Page) -> None:
    """Wait until the gallery shows its prompts."""
    page.wait_for_selector("#prompts[data-ready]", state="attached")
    page.wait_for_timeout(150)


def smaller(path: Path) -> None:
    """Reduce a PNG to a palette, and to less height if it is still too large."""
    picture = Image.open(path).convert("RGB")
    while True:
        picture.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size < LARGEST:
            return
        picture = picture.crop((0, 0, picture.width, picture.height * 9 // 10))


def shots(pages: Path, out: Path) -> None:
    """Write a picture of each page, wide and narrow, light and dark in turn."""
    out.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        for width in (1280, 390):
            for name in ("index", "gallery", "detail", "report", "review"):
                scheme = "dark" if (name == "gallery") == (width == 390) and name in ("gallery", "review") else "light"
                page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                address = (pages / f"{'gallery' if name == 'detail' else name}.html").resolve().as_uri()
                page.goto(address)
                if name in ("gallery", "detail"):
                    ready(page)
                if name == "detail":
                    page.locator(".thumbnail").first.click()
                if name == "review":
                    page.fill("input[name=reviewer]", "A. B.")
                    page.press("input[name=reviewer]", "Enter")
                    page.wait_for_function("document.getElementById('image').complete")
                height = page.evaluate("document.documentElement.scrollHeight")
                page.set_viewport_size({"width": width, "height": 900 if name == "detail" else min(max(height, 700), HEIGHT)})
                path = out / f"{name}-{width}.png"
                page.screenshot(path=path)
                smaller(path)
                page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, help="the folder of a run's pages")
    parser.add_argument("out", type=Path, help="folder of the pictures")
    arguments = parser.parse_args()
    shots(arguments.pages, arguments.out)


if __name__ == "__main__":
    main()
