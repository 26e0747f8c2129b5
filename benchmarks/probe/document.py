"""Put a run into docs/performance.md: ``python -m benchmarks.probe.document DIR``.

DIR is what ``python -m benchmarks.probe --out DIR`` wrote. Text between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` is
replaced; parts that the run did not measure (growth and profile are options) stay as they are.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

from benchmarks.probe.__main__ import NAME
from benchmarks.probe.report import markdown

DOCS = Path(__file__).parents[2] / "docs"
PICTURE = "probe_growth.png"


def filled(text: str, content: dict[str, Any]) -> str:
    """``text`` with every part that was measured made anew."""
    for name, part in markdown(content).items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"no {begin} ... {end} to fill")
        replacement = f"{begin}\n{part}\n{end}"
        text = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: replacement, text, flags=re.DOTALL)  # noqa: B023
    return text


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probe.document", description=__doc__)
    parser.add_argument("run", type=Path, metavar="DIR")
    folder = parser.parse_args().run
    page = DOCS / "performance.md"
    page.write_text(filled(page.read_text(), json.loads((folder / f"{NAME}.json").read_text())))
    if (folder / PICTURE).exists():
        shutil.copyfile(folder / PICTURE, DOCS / PICTURE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
