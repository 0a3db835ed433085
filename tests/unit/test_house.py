"""The rules of the house: linters, who may import whom, what an ADD may load."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "cni-plugin"
NOT_OURS = {".git", ".venv", ".hypothesis", "build", "dist", "__pycache__"}


def files(*patterns: str) -> list[Path]:
    """Files of the project whose name matches one of the patterns."""
    found = []
    for directory, names, entries in os.walk(ROOT):
        names[:] = sorted(set(names) - NOT_OURS)
        found += [Path(directory, entry) for entry in sorted(entries)]
    return [path for path in found if any(path.match(pattern) for pattern in patterns)]


def check(*command: str | Path) -> None:
    """Run a linter on the project; its report is the failure."""
    environ = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '/usr/bin:/bin')}",
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=300
    )
    if done.returncode:
        pytest.fail(f"{command[0]}:\n{done.stdout}{done.stderr}", pytrace=False)


# -- linters ---------------------------------------------------------------------------------


def test_ruff() -> None:
    check("ruff", "check", "--quiet", ".")


def test_ruff_format() -> None:
    check("ruff", "format", "--quiet", "--diff", ".")


@pytest.mark.parametrize("directory", ["cni-plugin", "tests"])
@pytest.mark.timeout(300)
def test_mypy(directory: str) -> None:
    check("mypy", "--no-error-summary", directory)


def test_clang_format() -> None:
    check("clang-format", "--dry-run", "-Werror", *files("bpf/*.[ch]", "tests/*/*.c"))


def test_shellcheck() -> None:
    scripts = [path for path in files("*") if is_shell_script(path)]
    assert ROOT / ".ci/run" in scripts
    check("shellcheck", *scripts)


def is_shell_script(path: Path) -> bool:
    """By its first line or its name."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as content:
        first = content.readline(80)
    return path.suffix == ".sh" or bool(re.match(rb"#!.*\b(ba|da)?sh\b", first))


def test_ruff_ignores_have_reasons() -> None:
    """Every rule that pyproject.toml switches off stands alone on its line, with the reason."""
    text = (ROOT / "pyproject.toml").read_text()
    ignored = re.findall(r"^(?:ignore|\"[^\"]+\") = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in ignored for line in block.splitlines()]
    assert len(lines) > 5
    assert not [line for line in lines if not re.fullmatch(r'\s+"[A-Z]+\d*", *# \w.+', line)]


def test_ci_calls_make_test() -> None:
    """What runs in CI is what everybody can run."""
    assert "make test" in (ROOT / ".ci/run").read_text()
    assert os.access(ROOT / ".ci/run", os.X_OK)


# -- sizes -----------------------------------------------------------------------------------

MOST_LINES = {"cni-plugin": 400, "bpf": 400, "tests": 800}
# Longer modules, and why they are not split.
LONGER = {
    "bpf/socket_lane.bpf.c": "one object file shares its maps and inlines its functions",
}


def test_modules_are_short() -> None:
    """A module longer than its folder allows is in LONGER, with the reason."""
    longer = {}
    for path in files("*.py", "*.c", "*.h"):
        name = path.relative_to(ROOT)
        lines = len(path.read_text().splitlines())
        if lines > MOST_LINES.get(name.parts[0], 400):
            longer[str(name)] = lines
    assert set(longer) == set(LONGER), longer


# -- imports ---------------------------------------------------------------------------------

GROUND = {"errors", "place", "quickjson"}
NODE_STATE = {"datapath", "kernel", "state", "log"} | GROUND
# Part of the program, and the other parts that it may import (ARCHITECTURE.md).
MAY_IMPORT = {
    "main": {"cni", "cli"},
    "cni": {"lanes"} | NODE_STATE,
    "cli": {"lanes", "node"} | NODE_STATE,
    "node": {"lanes"} | NODE_STATE,
    "lanes": NODE_STATE,
    "datapath": NODE_STATE,
    "kernel": NODE_STATE,
    "log": {"state"} | GROUND,
    "state": GROUND,
    "place": GROUND,
    "errors": set[str](),
    "quickjson": set[str](),
    "": set[str](),  # nearpath/__init__.py
}


def imports(tree: ast.AST) -> set[str]:
    """Full names of the modules of nearpath that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "nearpath"}


def part(name: str) -> str:
    """The part of the program that ``nearpath.part.module.name`` belongs to."""
    return f"{name}.".split(".")[1]


def test_imports_go_one_way() -> None:
    """main → cni | cli → lanes, node → datapath, kernel, state, log → errors, place."""
    wrong = []
    for path in files("cni-plugin/*.py", "nearpath/*.py", "nearpath/*/*.py"):
        module = ".".join(path.relative_to(SOURCES).with_suffix("").parts)
        own = "main" if module == "main" else part(module.removesuffix(".__init__"))
        for name in imports(ast.parse(path.read_text())):
            other = part(name)  # not a key of MAY_IMPORT: a name from nearpath/__init__.py
            if other in MAY_IMPORT and other != own and other not in MAY_IMPORT[own]:
                wrong.append(f"{module} imports {name}")
    assert not wrong


# What an ADD may load of the standard library. Each costs every pod's start; enum, re or
# collections alone a tenth of the whole.
AFFORDABLE = {
    "__future__",
    "_ctypes",
    "_json",
    "_socket",
    "_struct",
    "errno",
    "fcntl",
    "struct",
    "time",
}


def test_add_loads_little() -> None:
    """The modules that build.spec packs for ADD import only what an ADD can afford."""
    tree = ast.parse((ROOT / "build.spec").read_text())
    (hot,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "HOT"
    ]
    code = f"""
import os, sys
sys.path.insert(0, {str(SOURCES)!r})
before = set(sys.modules)
for name in {hot!r}:
    __import__(name)
print(*set(sys.modules) - before)
"""
    done = subprocess.run(
        [sys.executable, "-B", "-I", "-S", "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    loaded = set(done.stdout.split())
    assert {name for name in loaded if name.split(".")[0] != "nearpath"} <= AFFORDABLE
    assert not {name for name in loaded if part(name) in {"cli", "node"}}


# -- names -----------------------------------------------------------------------------------

# Where packages and images come from is the machine's business. In two halves, for this
# file is searched too.
HOSTS = [
    first + second
    for first, second in (
        ("pypi", ".org"),
        ("python", "hosted.org"),
        ("docker", ".io"),
        ("ghcr", ".io"),
        ("gcr", ".io"),
        ("quay", ".io"),
        ("registry", ".k8s.io"),
        ("deb.debian", ".org"),
        ("archive.ubuntu", ".com"),
        ("--index", "-url "),
        ("--find", "-links "),
    )
]


def test_no_registry_hosts() -> None:
    """No file names the host of a registry: it works where packages come from elsewhere."""
    found = []
    for path in files("*"):
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {host}" for host in HOSTS if host in text]
    assert not found


def test_lock_has_hashes() -> None:
    """Every package of requirements.lock is pinned and every one has hashes."""
    entries = re.split(r"\n(?=[a-z])", (ROOT / "requirements.lock").read_text())
    packages = [entry for entry in entries if not entry.startswith("#")]
    assert len(packages) > 10
    for entry in packages:
        assert re.match(r"[a-z0-9._-]+(\[[a-z]+\])?==\S+", entry), entry
        assert "--hash=sha256:" in entry, entry
