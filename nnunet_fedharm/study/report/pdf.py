"""The page as PDF, printed by a browser that is on this machine; none is installed for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SECONDS = 180


def print_pdf(page: Path, target: Path) -> str | None:
    """Print a page; None if it worked, else one sentence why there is no PDF."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        return (
            f"No PDF: neither Chromium nor Chrome is installed. Open {page.name} in a browser and print it to a file."
        )
    with tempfile.TemporaryDirectory() as profile:
        words = [browser, "--headless", "--disable-gpu", f"--user-data-dir={profile}", "--no-pdf-header-footer"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            words.append("--no-sandbox")  # Chromium refuses root otherwise
        printed, opened = Path(profile) / "page.pdf", Path(profile) / page.name
        # Paper cannot be clicked: what is folded is printed open.
        opened.write_text(page.read_text(encoding="utf-8").replace("<details ", "<details open "), encoding="utf-8")
        try:
            done = subprocess.run(
                [*words, f"--print-to-pdf={printed}", opened.resolve().as_uri()],
                capture_output=True, text=True, check=False, timeout=SECONDS,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"No PDF: {browser} did not print the page ({error}). Open {page.name} in a browser and print it."
        if not printed.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return f"No PDF: {browser} did not print the page ({last}). Open {page.name} in a browser and print it."
        shutil.copyfile(printed, target)
    return None
