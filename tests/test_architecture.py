"""The shape of the house: imports go downward, files stay short, nothing is unpickled freely."""

import ast
import subprocess
from pathlib import Path

import pytest
from helpers.paths import ROOT

MAY_IMPORT = {
    "core": set(),
    "evaluations": {"core"},
    "language": {"core"},
    "tokenizer": {"core", "evaluations"},
    "autoregressive": {"core", "evaluations", "language", "tokenizer"},
}
SOURCES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]
ALL_FILES = [
    *SOURCES,
    *sorted((ROOT / "scripts").rglob("*.py")),
    *sorted((ROOT / "tests").rglob("*.py")),
]


def imports(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules.add(node.module or "")
    return modules


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_only_downward(path):
    package = path.relative_to(ROOT).parts[0]
    ours = {name.split(".")[0] for name in imports(path)} & set(MAY_IMPORT)
    assert ours <= MAY_IMPORT[package] | {package}


def test_the_transformer_and_its_engine_know_no_tokenizer():
    for folder in ("models", "inference", "objectives"):
        for path in (ROOT / "autoregressive" / folder).glob("*.py"):
            found = {m.split(".")[0] for m in imports(path)}
            assert not found & {"tokenizer", "language"}, path


def test_only_the_config_file_knows_its_library():
    users = [path for path in SOURCES if "jsonargparse" in {m.split(".")[0] for m in imports(path)}]
    assert users == [ROOT / "core" / "config.py"]


def test_no_file_is_too_long():
    lengths = {path: len(path.read_text().splitlines()) for path in ALL_FILES}
    assert max(lengths.values()) <= 400, max(lengths, key=lengths.get)


def test_no_package_folder_is_a_corridor():
    for folder in {path.parent for path in SOURCES}:
        assert len(list(folder.glob("*.py"))) <= 14, folder


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_unpickled_freely_and_no_error_is_swallowed(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.id if isinstance(node.type, ast.Name) else ""
            assert node.type is not None, f"bare except at line {node.lineno}"
            assert caught not in {"Exception", "BaseException"}, f"line {node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            flags = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            name = ast.unparse(node.func)
            if name == "torch.load":
                assert flags.get("weights_only") is True, f"line {node.lineno}"
            if name == "np.load":
                assert flags.get("allow_pickle") is False, f"line {node.lineno}"


def test_no_device_is_spelt_out_where_it_is_not_decided():
    for path in SOURCES:
        if path.parent.name != "distributed":
            assert ".cuda(" not in path.read_text(), path


def test_no_tracked_file_names_a_path_of_the_machine_it_was_written_on():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    home = f"{Path.home()}/"
    for name in listed.stdout.splitlines():
        text = (ROOT / name).read_text(errors="ignore")
        assert f"{ROOT}/" not in text, name
        assert home not in text, name
