"""Takes the screenshot of an evaluation's report that docs/evaluation.md shows.

    ortlm evaluate demo-out && python scripts/screenshot_report.py demo-out/report.html

It needs Chromium or Chrome.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

OUT = Path(__file__).parents[1] / "docs" / "images" / "report.png"
WIDTH, HEIGHT = 1000, 720
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def main() -> None:
    """Render the top of the page, and write it with few colors, which makes it small."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, help="report.html")
    parser.add_argument("-o", "--output", type=Path, default=OUT)
    args = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        parser.error(f"there is no browser; install one of {', '.join(BROWSERS)}.")
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        size = f"--window-size={WIDTH},{HEIGHT}"
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--hide-scrollbars", size, f"--screenshot={shot}",
             args.report.resolve().as_uri()],
            check=True, capture_output=True,
        )  # fmt: skip
        args.output.parent.mkdir(parents=True, exist_ok=True)
        Image.open(shot).convert("RGB").quantize(96).save(args.output, optimize=True)
    print(f"{args.output}: {args.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
