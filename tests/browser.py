"""A headless Chromium for tests of pages."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_chromium(playwright) -> str:
    """Its path: one that is installed, or Playwright's own, or else Debian's, which root installs here.

    PyPI ships none, and `playwright install` fetches one from a host that not every machine reaches.
    """
    for name in NAMES:
        if found := shutil.which(name):
            return found
    if Path(playwright.chromium.executable_path).is_file():
        return playwright.chromium.executable_path
    if shutil.which("apt-get") and os.geteuid() == 0:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in ["update", "-q"], ["install", "-qy", "--no-install-recommends", "chromium"]:
            done = subprocess.run(["apt-get", *command], env=environment, capture_output=True, text=True, timeout=600)
            print(done.stdout[-2000:], done.stderr[-2000:])
        if found := shutil.which("chromium"):
            return found
    message = (
        "the page is tested in Chromium, and there is none: install your system's (apt-get install chromium) or "
        "Playwright's (playwright install chromium)"
    )
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)
