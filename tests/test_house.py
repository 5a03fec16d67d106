"""The house rules: which room may import which, and that what is published is what is there."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ["profiler", "sharder.planning", "sharder.runtime", "reports", "cli"]
"""Imports point to the left."""
WITHOUT_TORCH = [
    "errors.py",
    "files.py",
    "cli.py",
    "profiler/profile.py",
    "profiler/formats/costs.py",
    "profiler/costgraph.py",
    "profiler/formats/export.py",
    "profiler/formats/from_graph.py",
    "profiler/formats/given.py",
    "profiler/formats/given_devices.py",
    "profiler/graph.py",
    "profiler/formats/graphml.py",
    "profiler/estimates/catalogue.py",
    "profiler/estimates/cluster.py",
    "profiler/ordering.py",
    "profiler/sizes.py",
    "sharder/runtime/accounts.py",
    "sharder/runtime/chrome.py",
    "sharder/runtime/record.py",
    *[str(path.relative_to(ROOT)) for room in ("sharder/planning", "reports") for path in (ROOT / room).rglob("*.py")],
]


@cache
def modules():
    """Each module's syntax tree, by path."""
    paths = [ROOT / "cli.py", *(p for room in ("profiler", "sharder", "reports") for p in (ROOT / room).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def imported(tree, *, top_level_only=False):
    """Names of the modules that a file imports."""
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def floor(name):
    """The index in FLOORS of a module or file name, None for what every floor may use."""
    name = name.removeprefix("shardwright.").replace("/", ".")
    return next((i for i, room in enumerate(FLOORS) if name == room or name.startswith(f"{room}.")), None)


@pytest.mark.parametrize("path", sorted(modules()))
def test_imports_point_one_way(path):
    """Arrows: profiler <- planning <- runtime <- reports <- cli; reports may read the run's record."""
    here = floor(path.removesuffix(".py"))
    for name in imported(modules()[path]):
        there = floor(name) if name.startswith("shardwright") else None
        assert here is None or there is None or there <= here, f"{path} imports {name}"


@pytest.mark.parametrize("path", WITHOUT_TORCH)
def test_torch_free_rooms(path):
    """Files, planning and reports import torch nowhere; the command line only inside the functions that need it."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert not [n for n in imported(tree, top_level_only=path == "cli.py") if n.split(".")[0] == "torch"]


def test_reports_read_no_torch_module_of_ours():
    """Reports import only files that are free of torch themselves."""
    free = {"shardwright." + path.removesuffix(".py").replace("/", ".") for path in WITHOUT_TORCH}
    for path in (ROOT / "reports").glob("*.py"):
        names = {n for n in imported(ast.parse(path.read_text(encoding="utf-8"))) if n.startswith("shardwright.")}
        assert names <= free


def test_only_the_command_line_prints():
    """Only cli.py owns a Console, prints or exits."""
    for path, tree in modules().items():
        if path in ("cli.py", "profiler/workers/worker.py"):
            continue
        called = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not called & {"print", "exit", "Console"}, path


def test_packages_are_the_folders_that_exist():
    """The list in pyproject.toml is the tree's."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    rooms = [p.parent for room in ("profiler", "sharder", "reports") for p in (ROOT / room).rglob("__init__.py")]
    found = ["shardwright", *(f"shardwright.{room.relative_to(ROOT)}".replace("/", ".") for room in rooms)]
    assert sorted(declared) == sorted(found)


def test_the_public_names_resolve():
    """Every name in __all__ is there, and importing the package alone imports no torch."""
    program = (
        "import sys, shardwright as sw\n"
        "assert 'torch' not in sys.modules\n"
        "missing = [name for name in sw.__all__ if not hasattr(sw, name)]\n"
        "assert not missing, missing\n"
        "assert sw.__version__\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("kind", ["costs", "profile", "plan", "run"])
def test_the_published_schemas_are_fresh(kind, run_cli):
    """docs/schema holds what `schema` prints: renew it with `python docs/renew.py`."""
    printed = json.loads(run_cli("schema", kind).stdout)
    published = json.loads((ROOT / f"docs/schema/{kind}.schema.json").read_text(encoding="utf-8"))
    assert printed == published


def test_the_documented_help_is_fresh(run_cli):
    """docs/commands.md holds each command's --help as it is: renew it with `python docs/renew.py`."""
    text = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    for command in ("", "profile", "shard", "verify", "report", "schema"):
        shown = run_cli(*filter(None, [command]), "--help").stdout.strip()
        assert shown in text, f"--help of {command or 'shardwright'} has changed"


def anchors(path):
    """What a link into a file may name: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))], ids=lambda p: p.name)
def test_links_between_documents_lead_somewhere(path):
    """A relative link names a file that is there, and a heading in it."""
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in link:
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
