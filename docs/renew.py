"""Renew what is generated: docs/commands.md from each command's --help, docs/schema from the records, and what
docs/costs.md shows of the plan of its example."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).parent
COMMANDS = ("", "profile", "shard", "verify", "report", "schema")


def shardwright(*arguments: str) -> str:
    """What the command line prints, 100 columns wide and without colour."""
    environment = os.environ | {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    command = [sys.executable, str(DOCS.parent / "cli.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def planned_costs() -> str:
    """What planning the example prints, and that it wrote the plan, which is let go."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "costs.plan.json"
        printed = shardwright("shard", "--profile", str(DOCS.parent / "examples" / "costs.json"), "--out", str(path))
    lines = [line.rstrip() for line in printed.splitlines()]
    return "\n".join([*lines[:-1], "Wrote costs.plan.json."])


def main() -> None:
    """Write the pages."""
    pages = ["# Commands\n\nEach command's `--help`, written by `python docs/renew.py`.\n"]
    for command in COMMANDS:
        title = f"shardwright {command}".strip()
        shown = shardwright(*filter(None, [command]), "--help").strip()
        pages.append(f"## {title}\n\n```text\n{shown}\n```\n")
    (DOCS / "commands.md").write_text("\n".join(pages), encoding="utf-8")
    for kind in ("costs", "profile", "plan", "run"):
        (DOCS / "schema" / f"{kind}.schema.json").write_text(shardwright("schema", kind), encoding="utf-8")
    page = DOCS / "costs.md"
    shown = re.compile(r"(?<=```text\n).*?Wrote costs\.plan\.json\.(?=\n```)", re.DOTALL)
    page.write_text(shown.sub(lambda _: planned_costs(), page.read_text(encoding="utf-8"), count=1), encoding="utf-8")


if __name__ == "__main__":
    main()
