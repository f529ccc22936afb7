"""Rules of the house that one test can hold for every file, present and future."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("navsim_eval", "diffusiondrive")
SOURCES = sorted(path for name in (*PACKAGES, "tools", "benchmarks") for path in (ROOT / name).rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))


def imports(path: Path) -> set[str]:
    """Top-level names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_each_file_says_what_it_is_and_imports_in_the_allowed_direction(path: Path) -> None:
    tree = ast.parse(path.read_text())
    if path.read_text().strip():
        assert ast.get_docstring(tree), "a module starts with a docstring that says which question it answers"
    if path.is_relative_to(ROOT / "navsim_eval"):
        assert "diffusiondrive" not in imports(path), "navsim_eval must not know the planner"
    assert not imports(path) & {"pdb", "ipdb"}, "debugger left behind"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circular_imports(package: str) -> None:
    """Every module can be imported first, in a fresh interpreter's module table."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / package).rglob("*.py"))
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    for loaded in [m for m in sys.modules if m.split('.')[0] in ('navsim_eval', 'diffusiondrive')]:\n"
        "        del sys.modules[loaded]\n"
        "    importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("path", TOOLS, ids=lambda p: p.name)
def test_every_tool_explains_itself(path: Path) -> None:
    done = subprocess.run([sys.executable, str(path), "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 8 and "Keys" in done.stdout


@pytest.mark.parametrize("path", TOOLS, ids=lambda p: p.name)
def test_every_tool_refuses_an_unknown_key_in_one_line(path: Path) -> None:
    done = subprocess.run([sys.executable, str(path), "nonsense_key=1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown key 'nonsense_key'") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_configuration_file_is_well_formed(path: Path) -> None:
    assert path.stat().st_size == 0 or OmegaConf.load(path) is not None


def test_nothing_tracked_names_a_machine() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"(?<![\w.$}])/(?:work|root|home)/\w+")
    found = []
    for name in filter(None, tracked.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ""} and path.is_file():
            hits = pattern.findall(path.read_text(errors="ignore"))
            found += [f"{name}: {hit}" for hit in hits]
    assert not found
