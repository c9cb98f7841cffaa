"""A page in Debian's chromium, which tells what of it cannot be read: it is too wide, or text is cut off or covered."""

import html
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

needs_browser = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")

# Each text of a picture beside all others, and beside the rectangles whose left upper corner is nearest to it.
_LOOK = """
const boxes = [...document.querySelectorAll('svg')].map(
  svg => [...svg.querySelectorAll('text')].map(one => [one.textContent, one.getBoundingClientRect()]));
const overlaps = [];
for (const own of boxes) for (const [a, one] of own) for (const [b, two] of own)
  if (one !== two && one.left < two.right - 1 && two.left < one.right - 1
      && one.top < two.bottom - 2 && two.top < one.bottom - 2) overlaps.push(a + '|' + b);
const outside = [];
for (const svg of document.querySelectorAll('svg')) for (const text of svg.querySelectorAll('text')) {
  const one = text.getBoundingClientRect();
  for (const rect of svg.querySelectorAll('rect[rx]')) {
    const box = rect.getBoundingClientRect();
    if (one.left < box.right && box.left < one.right && one.top < box.bottom && box.top < one.bottom
        && (one.left < box.left || one.right > box.right || one.top < box.top || one.bottom > box.bottom))
      outside.push(text.textContent);
  }
}
const sizes = [...document.querySelectorAll('svg text')].map(one => {
  const svg = one.closest('svg');
  return parseFloat(getComputedStyle(one).fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
});
const hidden = [...document.querySelectorAll('body *')].filter(one => {
  if (one.closest('svg') || !one.innerText) return false;
  for (let at = one; at; at = at.parentElement)
    if (['auto', 'scroll'].includes(getComputedStyle(at).overflowX)) return false;
  const box = one.getBoundingClientRect();
  return box.width && (box.right > innerWidth + 1 || box.left < -1);
}).map(one => one.innerText.slice(0, 60));
const wide = document.documentElement.scrollWidth;
const cut = [...document.querySelectorAll('svg text')].filter(one => {
  const box = one.getBoundingClientRect(), svg = one.closest('svg').getBoundingClientRect();
  return box.right > Math.min(innerWidth, svg.right) + 1 || box.left < Math.max(0, svg.left) - 1;
}).map(one => one.textContent);
parent.document.title = JSON.stringify({wide, window: innerWidth, texts: boxes.flat().length, overlaps, cut, outside,
  hidden, least: Math.min(99, ...sizes)});
"""


def look(page: str, width: int, folder: Path) -> dict[str, Any]:
    """What a window of that width shows, in pixels.

    `wide`: of the page; `texts`: in pictures; `overlaps`, `cut`, `outside`: texts over another, out of the picture, or
    over the edge of a rounded box; `hidden`: of the page, out of the window and not to be scrolled to; `least`: the
    smallest type in pictures.
    """
    (folder / "page.html").write_text(page.replace("</html>", f"<script>{_LOOK}</script></html>"), encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(f"<!doctype html><iframe src=page.html style='width:{width}px;height:900px;border:0'></iframe>")
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--allow-file-access-from-files",
        f"--user-data-dir={folder / 'profile'}", "--window-size=1400,900", "--dump-dom", f"file://{frame}",
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    told: dict[str, Any] = json.loads(html.unescape(dom.partition("<title>")[2].partition("</title>")[0]))
    assert told["window"] == width
    return told


def unreadable(told: dict[str, Any]) -> dict[str, Any]:
    """What of a look is wrong."""
    lists = {name: told[name] for name in ("overlaps", "cut", "outside", "hidden") if told[name]}
    wide = {"wide": told["wide"]} if told["wide"] > told["window"] else {}
    return {**lists, **wide, **({"least": told["least"]} if told["least"] < 10 else {})}
