"""The arrows between the layers, the size of a file, and what light commands may import."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The torch-free base: every file beside the folders, except the offline LLM.
BASE = {path.stem for path in (ROOT / "workstation").glob("*.py")} - {"__init__", "llm"}
TORCH_FREE = BASE | {"server", "text", "parsers", "grammar", "tui", "cli"}
# Who may import whom, by the first name under `workstation`; everybody may use the base and itself.
ARROWS: dict[str, set[str]] = {
    "kernels": set(),
    "tui": set(),
    "quant": {"kernels"},
    "estimate_model": {"quant"},
    "model": {"quant", "kernels"},
    "engine": {"model", "quant", "kernels", "grammar"},
    "text": set(),
    "parsers": set(),
    "grammar": {"text", "parsers"},
    "server": {"engine", "text", "parsers", "grammar"},
    "demo": {"llm", "text"},
    "llm": {"engine", "text", "model", "grammar"},
    "cli": {"server", "engine", "text", "parsers", "tui", "llm", "demo", "model"},
}
KNOW_NOTHING_OF_OURS = {"kernels", "tui"}
# Requests, sampling parameters and events: plain data that crosses borders, so base and text may name it.
PLAIN_DATA = "workstation.engine.request"
MAY_NAME_PLAIN_DATA = BASE | {"text"}
# The server reaches the engine through its plain-data doors; only the supervisor speaks its wire.
ENGINE_DOORS = {PLAIN_DATA, "workstation.engine.client", "workstation.engine.snapshot", "workstation.engine",
                "workstation.engine.wire"}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "cloudpickle"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "torch.save", "__import__"}
MAX_LINES = 400


def sources() -> list[Path]:
    """Our files, by their real place (the links inside workstation/ are not followed)."""
    found = [path for folder in ("kernels", "tui", "cli") for path in sorted((ROOT / folder).rglob("*.py"))]
    for path in sorted((ROOT / "workstation").rglob("*.py")):
        if not any(parent.is_symlink() for parent in path.parents):
            found.append(path)
    return found


def unit(path: Path) -> str:
    """The layer a file belongs to: `engine`, `kernels`, … or the name of a file on the base's level."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "workstation":
        parts = parts[1:]
    return parts[0]


def imports(tree: ast.AST, *, module_level: bool = False) -> list[str]:
    """Full dotted names of what a file imports (from a import b → a.b). Relative imports are refused elsewhere."""
    names = []
    for node in _module_level(tree) if module_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def _module_level(tree: ast.AST) -> list[ast.AST]:
    """Statements that run on import: not those inside functions or `if TYPE_CHECKING`."""
    found: list[ast.AST] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        found += [node, *_module_level(node)]
    return found


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


@cache
def names(path: Path, *, module_level: bool = False) -> list[str]:
    return imports(parse(path), module_level=module_level)


def bad(found: dict[Path, Any]) -> dict[str, Any]:
    """The files with something found, for an assertion to show."""
    return {str(path.relative_to(ROOT)): what for path, what in found.items() if what}


def violations(layer: str, names: list[str]) -> list[str]:
    """Which of the imported names the layer may not import."""
    bad = []
    for name in names:
        parts = name.split(".")
        if parts[0] in ("kernels", "tui", "cli"):
            bad.append(name)  # the import root is `workstation`
        if parts[0] != "workstation" or len(parts) == 1:
            continue
        target = parts[1]
        if target == layer or (target == "__version__" and layer not in KNOW_NOTHING_OF_OURS):
            continue
        if target in BASE and layer not in KNOW_NOTHING_OF_OURS:
            continue
        if name.startswith(PLAIN_DATA) and layer in MAY_NAME_PLAIN_DATA:
            continue
        if target not in ARROWS.get(layer, set()) and not (layer == "cli" and target in ("LLM", "SamplingParams")):
            bad.append(name)
    return bad


def test_there_is_something_to_check() -> None:
    units = {unit(path) for path in sources()}
    assert {"kernels", "cli", "engine", "model", "quant", "server", "text", "memory"} <= units


def test_imports_follow_the_arrows() -> None:
    door = ROOT / "workstation" / "__init__.py"  # of the package: LLM and SamplingParams, lazily
    assert bad({path: violations(unit(path), names(path)) for path in sources() if path != door}) == {}


def test_the_checker_sees_an_arrow_that_points_up() -> None:
    planted = ast.parse("from workstation.server.app import create_app\nimport workstation.engine.engine")
    assert violations("model", imports(planted)) == ["workstation.server.app.create_app", "workstation.engine.engine"]
    assert violations("kernels", ["workstation.errors.WorkstationError"]) == ["workstation.errors.WorkstationError"]
    assert violations("server", ["kernels.ops"]) == ["kernels.ops"]
    assert violations("engine", ["workstation.kernels.ops", "workstation.config.EngineConfig"]) == []


def test_a_file_is_at_most_400_lines() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in sources()}
    assert bad({path: length for path, length in lengths.items() if length > MAX_LINES}) == {}


def test_nothing_unpickles_or_evaluates() -> None:
    called = {path: [ast.unparse(node.func) for node in ast.walk(parse(path))
                     if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute))] for path in sources()}
    assert bad({path: sorted(UNSAFE_CALLS.intersection(calls)) for path, calls in called.items()}) == {}
    assert bad({path: [name for name in names(path) if name.split(".")[0] in UNSAFE_MODULES] for path in sources()}) == {}


def test_light_layers_import_neither_torch_nor_transformers_at_module_level() -> None:
    heavy = {"torch", "transformers", "triton"}
    light = [path for path in sources() if unit(path) in TORCH_FREE]
    assert bad({path: [name for name in names(path, module_level=True) if name.split(".")[0] in heavy] for path in light}) == {}


def test_the_engine_is_reached_through_its_plain_data_doors() -> None:
    outside = [path for path in sources() if unit(path) in ("server", "cli")]
    inside = {path: [name for name in names(path, module_level=True) if name.startswith("workstation.engine.")]
              for path in outside}
    assert bad({path: [name for name in found if name.rsplit(".", 1)[0] not in ENGINE_DOORS and name not in ENGINE_DOORS]
                for path, found in inside.items()}) == {}


def test_linked_folders_hold_no_init_file() -> None:
    """With one, `import kernels` would find ours where Hugging Face's package is meant."""
    assert not [folder for folder in ("kernels", "tui", "cli") if (ROOT / folder / "__init__.py").exists()]
    assert all((ROOT / "workstation" / folder).resolve() == ROOT / folder for folder in ("kernels", "tui", "cli"))


def test_every_package_folder_is_declared_for_the_wheel() -> None:
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    needed = set()
    for path in sources():
        parts = path.relative_to(ROOT).parts[:-1]
        needed.add(".".join(parts if parts[0] == "workstation" else ("workstation", *parts)))
    assert needed <= declared


def _modules_after(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


HELP = "from workstation.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass"


@pytest.mark.parametrize("command", ["['--help']", "['serve', '--help']", "['bench', '--help']", "['models']"])
def test_light_commands_import_no_heavy_package(command: str) -> None:
    loaded = _modules_after(HELP.replace("['--help']", command))
    heavy = {"torch", "transformers", "triton", "fastapi", "uvicorn", "tokenizers", "huggingface_hub", "httpx"}
    assert not loaded & heavy


def test_top_without_options_needs_no_parser_of_options() -> None:
    loaded = _modules_after(HELP.replace("['--help']", "['top', 'http://127.0.0.1:9']"))
    assert "workstation.cli.dashboard" in loaded and not loaded & {"typer", "pydantic", "httpx", "torch"}


def test_importing_the_package_costs_nothing_heavy() -> None:
    assert not _modules_after("import workstation") & {"torch", "transformers", "fastapi", "msgspec", "zmq"}
