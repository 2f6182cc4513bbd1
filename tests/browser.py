"""Pages as a browser shows them, in frames as narrow as a phone: no window of headless Chromium is."""

import html
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]


def look(pages: Sequence[str], script: str, folder: Path, *, width: int = 800) -> list[Any]:
    """What a JavaScript expression gives in each of these pages. Without a browser, the test is skipped."""
    if BROWSER is None:
        pytest.skip("no browser here: install chromium")
    style = f"border: 0; width: {width}px; height: 800px"
    frames = [f'<iframe style="{style}" srcdoc="{html.escape(page)}"></iframe>' for page in pages]
    ask = f"JSON.stringify(Array.from(frames, frame => frame.eval({json.dumps(script)})))"
    file = folder / "frames.html"
    file.write_text(
        f"<!doctype html><title>nothing</title>{''.join(frames)}"
        f"<script>addEventListener('load', () => document.title = {ask})</script>"
    )
    flags = [*FLAGS, "--disable-component-update", f"--user-data-dir={folder / 'profile'}", "--window-size=1400,900"]
    command = [BROWSER, *flags, "--dump-dom", file.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    start = dom.index("<title>") + len("<title>")
    return json.loads(html.unescape(dom[start : dom.index("</title>")]))
