"""The project as a whole: what is packaged, what is imported, which floor knows which, the code on its pages."""

import ast
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import dist_agc

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dist_agc"
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])

# Lower first: a module imports from its own floor and the ones below it. "dist_agc" is the package's __init__.
FLOORS = [
    *("config", "stats", "rules", "model", "engine", "frameworks", "clipper", "observe", "held", "steps"),
    *("in_backward", "hook", "attach", "dist_agc", "integrations", "conformance", "lab", "cli"),
]
# Where there are no frameworks: each of these has one file that knows it, in frameworks/.
CORE = ("attach", "clipper", "config", "held", "hook", "stats", "steps", "model", "engine", "rules")
CLASSES = re.compile(
    r"\b(FSDP\w*|FullySharded\w*|\w*DTensor\w*|DistributedDataParallel|DeepSpeed\w+|PipelineEngine|DummyOptim"
    r"|Megatron\w*|Float16\w+|ChainedOptimizer|\w*Fabric\w*|Accelerated\w*|(BF|FP)16_\w+|Lightning\w+|DeviceMesh|Replicate|Shard)\b"
)


def run_python(*arguments: str, cwd: Path = ROOT, timeout: float = 200) -> str:
    """Output of a new Python that finds dist_agc wherever it runs; failing or hanging, it fails the test."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # not kill: torchrun ends its workers first
        output, errors = process.communicate()
    assert process.returncode == 0, f"exit code {process.returncode}\n{output}\n{errors}"
    return output


# ---------------------------------------------------------------------------------------------------------- packaging


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    run_python("-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder))
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return Parser().parsestr(wheel.read(name).decode())


def requirements(metadata: Message) -> Iterator[tuple[str, str | None]]:
    """Pairs of a required package and the extra that asks for it."""
    for line in metadata.get_all("Requires-Dist", []):
        (package,) = re.findall(r"^[\w-]+", line)
        extra = re.search(r"extra == '([\w-]+)'", line)
        yield package, extra and extra[1]


def test_wheel_holds_every_module_and_the_typing_marker(wheel: zipfile.ZipFile) -> None:
    packaged = {name for name in wheel.namelist() if name.startswith("dist_agc/")}
    assert packaged >= {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")} | {
        "dist_agc/py.typed",
        "dist_agc/engine/row_norms.cpp",
    }


def test_base_install_needs_torch_alone(metadata: Message) -> None:
    assert [package for package, extra in requirements(metadata) if extra is None] == ["torch"]


def test_every_dependency_is_pinned(metadata: Message) -> None:
    lines = (ROOT / "launch" / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    pattern = r'[a-z0-9-]+==[\w.]+( ; python(_full)?_version >= "3\.\d+(\.\d+)?")?'
    unclear = [pin for pin in pins if not re.fullmatch(pattern, pin)]
    assert not unclear, "a pin is a name and a public version"
    # mosaicml is not installed beside the others: it needs an older torch.
    wanted = {package for package, _ in requirements(metadata)} - {"dist-agc", "mosaicml"}
    assert wanted <= {pin.partition("==")[0] for pin in pins}


def test_changelog_is_headed_by_the_version(metadata: Message) -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == dist_agc.__version__ == metadata["Version"]


# ------------------------------------------------------------------------------------------------------------ imports


def test_import_loads_nothing_beside_torch() -> None:
    report = "import sys; print(*{name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names)"
    of_torch = "import torch, torch.distributed.fsdp, torch.distributed.tensor"
    allowed = set(run_python("-c", f"{of_torch}; {report}").split())
    assert set(run_python("-c", f"import dist_agc; {report}").split()) - allowed == {"dist_agc"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_by(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, at its head or inside functions; relative ones made absolute."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


def floor(name: str) -> str:
    """The floor of a dotted name: a module or package directly in dist_agc, or dist_agc's own __init__."""
    part = [*name.split("."), ""][1]
    return part if (PACKAGE / part).is_dir() and part or (PACKAGE / f"{part}.py").is_file() else "dist_agc"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_lower_floors_never_import_higher_ones(path: Path) -> None:
    own = floor(module_name(path))
    assert own in FLOORS, f"a new module: give {own!r} its place in FLOORS"
    ours = [name for name in imported_by(path) if name.split(".")[0] == "dist_agc"]
    higher = [name for name in ours if FLOORS.index(floor(name)) > FLOORS.index(own)]
    assert not higher, f"{module_name(path)} imports from above: {higher}"


def of_floors(floors: Sequence[str]) -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if floor(module_name(path)) in floors]


def words_of_code(path: Path) -> Iterator[str]:
    """Names, attributes, imports and strings, without comments and docstrings."""
    tree = ast.parse(path.read_text())
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # a string that stands alone
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            yield node.value


@pytest.mark.parametrize("path", of_floors(CORE), ids=module_name)
def test_the_core_names_no_class_of_a_framework(path: Path) -> None:
    assert not [word for word in words_of_code(path) if CLASSES.search(word)]


def test_the_classes_of_frameworks_are_known_by_name() -> None:
    """Else the test above would look for the wrong words."""
    words = {word for path in of_floors(["frameworks"]) for word in words_of_code(path)}
    seen = {word for word in words if CLASSES.fullmatch(word)}
    assert seen >= {
        "FullyShardedDataParallel",
        "FSDPModule",
        "DTensor",
        "DistributedDataParallel",
        "DeepSpeedEngine",
        "ChainedOptimizer",
    }
    from dist_agc import frameworks

    wrapped = [name for framework in (*frameworks._asked(), frameworks._PLAIN) for name in framework.wrapped]
    assert wrapped and all(CLASSES.fullmatch(name) for name in wrapped), wrapped


@pytest.mark.parametrize("path", sorted((PACKAGE / "lab" / "console").glob("*.py")), ids=module_name)
def test_the_console_knows_nothing_of_clipping(path: Path) -> None:
    ours = [name for name in imported_by(path) if name.split(".")[0] == "dist_agc"]
    assert not [name for name in ours if not name.startswith("dist_agc.lab.console.")]


@pytest.mark.parametrize("path", of_floors(["config", "stats", "rules", "model", "engine"]), ids=module_name)
def test_the_mathematics_knows_no_processes(path: Path) -> None:
    if module_name(path) not in ("dist_agc.engine.collectives", "dist_agc.engine.agreement", "dist_agc.engine.alike"):
        assert not [found for found in imported_by(path) if "distributed" in found]


# -------------------------------------------------------------------------------------------------------------- pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    broken = [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()]
    assert not broken
