"""A headless Chromium for the tests of the pages; ``make test`` unpacks it beside the virtual environment's packages.

python tests/browser.py FOLDER unpacks what npm installed there.
"""

import io
import os
import sys
import tarfile
from contextlib import contextmanager
from pathlib import Path

import brotli
from playwright.sync_api import Browser, Page, Playwright

FOLDER = Path(sys.prefix) / "browser"
PATIENCE = 300_000
"""Milliseconds for the browser to start and to do what it is told, on busy cores too."""
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


def unpack(folder: Path) -> None:
    packed = folder / "node_modules" / "@sparticuz" / "chromium" / "bin"
    for name in ("al2023", "fonts"):  # the libraries that a minimal Linux lacks; a font
        content = io.BytesIO(brotli.decompress((packed / f"{name}.tar.br").read_bytes()))
        with tarfile.open(fileobj=content) as archive:
            archive.extractall(folder, filter="data")
    (folder / "fonts.conf").write_text(f"<fontconfig><dir>{folder.resolve()}/fonts</dir></fontconfig>")
    chromium = folder / "chromium"
    chromium.write_bytes(brotli.decompress((packed / "chromium.br").read_bytes()))
    chromium.chmod(0o755)


def launch(playwright: Playwright) -> Browser:
    assert (FOLDER / "chromium").exists(), (
        f"no browser in {FOLDER}: make {FOLDER.relative_to(FOLDER.parents[1])}/chromium"
    )
    environment = os.environ | {"LD_LIBRARY_PATH": str(FOLDER / "lib"), "FONTCONFIG_PATH": str(FOLDER)}
    return playwright.chromium.launch(
        executable_path=FOLDER / "chromium", args=["--no-sandbox"], env=environment, timeout=PATIENCE
    )


@contextmanager
def opened(browser: Browser, page_at: Path | str, viewport=DESKTOP, scheme="light", site: str = ""):
    """The page at a path or an address; fails at the end if it logged an error or asked for anything beyond itself.

    A page of a ``site`` may ask for whatever is below the site's address.
    """
    address = page_at if isinstance(page_at, str) else page_at.as_uri()
    context = browser.new_context(viewport=viewport, color_scheme=scheme)
    faults = []
    context.set_default_timeout(PATIENCE)
    page: Page = context.new_page()
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    # Without a font everything fits.
    assert page.evaluate("document.createElement('canvas').getContext('2d').measureText('x').width") > 0
    try:
        yield page
    finally:
        context.close()
    assert faults == []
    assert [url for url in asked if not url.startswith(("data:", site or address))] == []


def fits(page: Page) -> bool:
    """Whether nothing is wider than the screen, but for what scrolls on its own."""
    return page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


if __name__ == "__main__":
    unpack(Path(sys.argv[1]))
