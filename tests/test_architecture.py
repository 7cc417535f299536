"""The shape of the project: import directions, limits, one of each, the field's words."""

import ast
import re
import subprocess
from collections.abc import Iterator
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
OTHERS = [
    path
    for folder in ("scripts", "benchmarks", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
TREES = {path: ast.parse(path.read_text()) for path in [*SOURCES, *OTHERS]}
# What reads a folder or file back as a module: it may be imported lazily by the model itself.
LAZY = {
    "tokenizer.models.pretrained",
    "autoregressive.models.pretrained",
    "autoregressive.inference.generate",
}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def imports(tree: ast.AST) -> set[str]:
    """The modules that a file imports, at any depth; of ours, the deepest module that exists."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                found.add(deeper if deeper in MODULES else str(node.module))
    return found


def is_command(path: Path) -> bool:
    """Whether a module runs as a command, or forwards to one under an old name."""
    return bool(re.search(r"^    (run_command|forward)\(", path.read_text(), re.M))


def level(path: Path) -> int:
    """Inside a package: folders (0), then the modules above them (1), then commands (2)."""
    if is_command(path):
        return 2
    return 1 if len(path.relative_to(ROOT).parts) == 2 else 0


# Directions


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_go_only_downward(path):
    package = path.relative_to(ROOT).parts[0]
    ours = {name.split(".")[0] for name in imports(TREES[path])} & set(MAY_IMPORT)
    assert ours <= MAY_IMPORT[package] | {package}


def test_nothing_imports_a_command():
    commands = {name for name, path in MODULES.items() if is_command(path)}
    wrong = {name: imports(TREES[path]) & commands for name, path in MODULES.items()}
    assert {name: found for name, found in wrong.items() if found} == {}


def test_folders_import_nothing_from_the_top_of_their_package():
    wrong = []
    for name, path in MODULES.items():
        package = name.split(".")[0]
        if path.name == "__init__.py" or package == "core":
            continue  # the modules on top of core (config, files, rng) are its ground
        for other in imports(TREES[path]) & set(MODULES):
            target = MODULES[other]
            if other.split(".")[0] == package and target.name != "__init__.py":
                wrong += [f"{name} -> {other}"] if level(target) > level(path) else []
    assert not wrong


def test_there_is_no_import_circle_but_the_lazy_ones_of_from_pretrained_and_generate():
    edges = {name: imports(TREES[path]) & set(MODULES) for name, path in MODULES.items()}
    edges = {name: others - LAZY - {name} for name, others in edges.items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done:
            for other in sorted(edges[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_the_transformer_and_its_engine_know_no_tokenizer():
    for folder in ("models", "inference", "objectives"):
        for path in (ROOT / "autoregressive" / folder).rglob("*.py"):
            found = {m.split(".")[0] for m in imports(TREES[path])}
            assert not found & {"tokenizer", "language"}, path


def test_only_the_config_file_knows_its_library():
    users = [p for p in SOURCES if "jsonargparse" in {m.split(".")[0] for m in imports(TREES[p])}]
    assert users == [ROOT / "core" / "config.py"]


def test_no_test_imports_another_test_nor_conftest():
    for path, tree in TREES.items():
        wrong = {name for name in imports(tree) if re.match(r"test_|tests\.|conftest", name)}
        assert not wrong, relative(path)


# Limits


def test_no_file_is_too_long():
    lengths = {relative(path): len(path.read_text().splitlines()) for path in TREES}
    assert {path: count for path, count in lengths.items() if count > 400} == {}


def test_no_function_is_too_long():
    long = {}
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                statements = sum(isinstance(below, ast.stmt) for below in ast.walk(node)) - 1
                if statements > 60:
                    long[f"{relative(path)}: {node.name}"] = statements
    assert long == {}


def test_no_folder_is_a_corridor():
    others = [path for path in OTHERS if "tests" not in path.relative_to(ROOT).parts]
    for folder in {path.parent for path in [*SOURCES, *others]}:
        count = len(list(folder.glob("*.py")))
        assert count <= 14, f"{relative(folder)}: {count} Python files"


# One of each


def places(pattern: str, folder: str) -> list[str]:
    return [
        f"{relative(path)}:{number}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_the_arithmetic_of_a_transformer_block_is_written_once():
    assert len(places(r"\bsilu\(", "autoregressive")) == 1


def test_only_the_public_door_asks_what_a_condition_is():
    asking = places(r"isinstance\((condition|labels)\b", "autoregressive")
    assert {place.split(":")[0] for place in asking} <= {"autoregressive/models/conditioning.py"}


# The field's words

WORDS = {  # private words of an earlier version -> what the field says
    r"judges?|judged|judging": "scorer, metrics, classifier",
    r"detectors?": "feature extractor",
    r"anew|likewise|is to be had": "again, also, is available",
    r"pictures?|picturing": "image",
    r"cells?": "grid position",
    r"aside": "temporary",
    r"players?|the game": "generator and discriminator",
    r"the drawn|as drawn|drawn (anew|again)|drawn (images?|codes?)": "sampled",
    r"naive": "reference_sampler",
    r"the house": "repository layout",
}
NAMES = {  # identifiers of an earlier version -> what they are called now
    "Beside": "DecodeOverlap",
    "Nets": "TrainingModels",
    "Pair": "ImagePipeline",
    "ShownConfig": "ConditionConfig",
    "least_kept": "logit_threshold",
    "Drawing": "TopKTopPSampler",
    "Place": "AttentionMetadata",
    "Store": "KVBuffer",
    "Architecture": "TransformerConfig",
    "LivePairs": "OnlineDataset",
    "Collected": "FeatureStatistics",
    "give_way": "lower_thread_priority",
    "whole_gpt": "unsharded_copy",
    "make_ready": "prepare",
}
# Ordinary words, which no parameter of ours should have as its name.
PARAMETERS = {"shown": "conditions", "known": "forced_codes", "averaged": "ema_model"}
TEXTS = ("*.py", "*.yaml", "*.md", "*.sh", "*.sbatch")
# The change log names what was renamed; a notebook has cells; the grammar has what people type.
EXCEPT = {
    *("tests/test_architecture.py", "tests/test_notebooks.py", "CHANGELOG.md"),
    "scripts/grammar.py",
}


def private(pattern: str, line: str) -> bool:
    """Whether a line has the word, also as a part of a name: `sample_pictures`, `PictureReader`."""
    words = re.sub(r"_|(?<=[a-z])(?=[A-Z])", " ", line).lower()
    return any(re.search(rf"\b(?:{pattern})\b", text) for text in (line.lower(), words))


@pytest.mark.parametrize("pattern", WORDS, ids=lambda pattern: pattern.split("|")[0])
def test_no_private_word_is_left_in_code_or_prose(pattern):
    found = {}
    for path in tracked_files():
        if any(path.match(text) for text in TEXTS) and relative(path) not in EXCEPT:
            lines = path.read_text(errors="ignore").splitlines()
            hits = [n for n, line in enumerate(lines, 1) if private(pattern, line)]
            if hits:
                found[relative(path)] = hits
    assert found == {}, f"say instead: {WORDS[pattern]}"


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        for kind, name in ((ast.Name, "id"), (ast.arg, "arg"), (ast.Attribute, "attr")):
            if isinstance(node, kind):
                yield getattr(node, name), node.lineno
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name, node.lineno


def test_no_private_name_is_left():
    found = {
        f"{relative(path)}:{line}: {name}": NAMES[name]
        for path, tree in TREES.items()
        for name, line in identifiers(tree)
        if name in NAMES
    }
    found |= {
        f"{relative(path)}:{node.lineno}: {node.arg}": PARAMETERS[node.arg]
        for path in SOURCES
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.arg) and node.arg in PARAMETERS
    }
    assert found == {}


# Safety


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nothing_is_unpickled_freely_and_no_error_is_swallowed(path):
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.id if isinstance(node.type, ast.Name) else ""
            assert node.type is not None, f"bare except at line {node.lineno}"
            # What the thread of prefetch catches is raised in its consumer.
            allowed = path.name == "prefetch.py" or isinstance(node.body[-1], ast.Raise)
            assert allowed or caught not in {"Exception", "BaseException"}, f"line {node.lineno}"
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
    home = f"{Path.home()}/"
    for path in tracked_files():
        text = path.read_text(errors="ignore")
        assert f"{ROOT}/" not in text, path
        assert home not in text, path
