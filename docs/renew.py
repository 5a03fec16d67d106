"""Renew the generated pages: docs/commands.md from each command's --help, docs/schema from the records."""

import os
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parent
COMMANDS = ("", "profile", "shard", "verify", "report", "schema")


def shardwright(*arguments: str) -> str:
    """What the command line prints, 100 columns wide and without colour."""
    environment = os.environ | {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    command = [sys.executable, str(DOCS.parent / "cli.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


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


if __name__ == "__main__":
    main()
