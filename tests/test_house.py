"""The rules of the house: lint, who may import whom, sizes, docstrings, packaging, what the documents refer to."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import greedy_distill_jax
from greedy_distill_jax.weights.write import student_file

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "greedy_distill_jax"
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)
FOLDERS = ("greedy_distill_jax", "configs", "launch", "tests", "benchmarks")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
TORCH = ("torch", "transformers", "diffusers")
TORCH_ALLOWED = ("testing", "text", "weights")
# Joined into one file of exported folders, which runs by itself; the package imports neither.
TORCH_FILES = [PACKAGE / "weights" / name for name in ("torch_networks.py", "torch_student.py")]


def command(name):
    found = Path(sys.executable).parent / name
    return str(found) if found.exists() else shutil.which(name)


def relative(path):
    return path.relative_to(ROOT).as_posix()


def imported(tree):
    """(top-level name of an imported module, whether the import runs when the module is imported)."""

    def visit(node, top):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0], top
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, top and not inside)

    yield from visit(tree, True)


def test_ruff():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_hall_stays_small():
    """Commands and what every room needs; everything else has a room."""
    loose = [path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__"]
    assert len(loose) <= 10, loose


def test_who_may_import_whom():
    done = subprocess.run(
        [command("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_of_a_module(path):
    top = path.relative_to(PACKAGE).parts[0]
    for name, at_import in imported(ast.parse(path.read_text(encoding="utf-8"))):
        if name in TORCH:
            assert top in TORCH_ALLOWED, f"{relative(path)} imports {name}: only {TORCH_ALLOWED} may"
            assert not at_import or path in TORCH_FILES, f"{relative(path)} imports {name} outside a function"
        if name == "orbax":
            assert top == "storage"
        if name == "grain":
            assert top in ("data", "storage")


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_a_module_has_a_docstring(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not tree.body or ast.get_docstring(tree), f"{relative(path)} has no docstring"


def test_the_torch_file_needs_torch_and_safetensors_only():
    found = {name for name, _ in imported(ast.parse(student_file()))}
    assert found - set(sys.stdlib_module_names) == {"torch", "safetensors"}


def test_no_statement_is_exempt_from_the_formatter():
    mark = "# fmt: "
    assert [relative(p) for p in SOURCES if p != Path(__file__) and mark in p.read_text(encoding="utf-8")] == []


def test_records_name_no_folder_of_a_machine():
    records = [p for p in sorted((ROOT / "benchmarks" / "results").iterdir()) if p.suffix in (".json", ".md")]
    places = ("home", "mnt", "opt", "root", "scratch", "tmp", "Users", "usr", "var", "work")
    folder = re.compile(rf"""(?:^|[\s"'=(:])/(?:{"|".join(places)})/""", re.MULTILINE)
    assert records and all(folder.search(f'"--workdir /{place}/runs"') for place in places)
    assert not folder.search("runs/work/x")
    assert {p.name: found[0] for p in records if (found := folder.search(p.read_text(encoding="utf-8")))} == {}


def test_no_file_is_long():
    long = {relative(p): n for p in SOURCES if (n := len(p.read_text(encoding="utf-8").splitlines())) > 500}
    assert not long, "split these files: at most 500 lines"


def test_importing_the_package_is_light():
    code = (
        "import sys, greedy_distill_jax; "
        "heavy = [m for m in ('jax', 'numpy', 'flax', 'torch', 'orbax', 'tensorflow') if m in sys.modules]; "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_public_face_is_lazy_and_documented():
    code = (
        "import sys, greedy_distill_jax as face; assert set(face.__all__) <= set(dir(face)); "
        "face.UserError; assert 'jax' not in sys.modules; "
        "print(*(getattr(face, name).__name__ for name in face.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == list(greedy_distill_jax.__all__), done.stderr
    with pytest.raises(AttributeError, match="'greedy_distill_jax' has no attribute 'Nothing'"):
        greedy_distill_jax.__getattr__("Nothing")
    index = (ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8")
    assert [name for name in greedy_distill_jax.__all__ if f"`{name}`" not in index] == []


@pytest.mark.subprocesses
def test_importing_every_module_starts_no_backend():
    modules = [p for p in MODULES if p not in TORCH_FILES]
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in modules]
    code = (
        f"import importlib, sys\nfor name in {names!r}:\n    importlib.import_module(name)\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'a backend was started'\n"
        f"assert not [m for m in {TORCH!r} if m in sys.modules], 'torch was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def setup_arguments(monkeypatch):
    """What setup.py passes to setuptools.setup."""
    setuptools = pytest.importorskip("setuptools")
    seen = {}
    monkeypatch.setattr(setuptools, "setup", lambda **kw: seen.update(kw))
    exec(compile((ROOT / "setup.py").read_text(), str(ROOT / "setup.py"), "exec"), {"__file__": str(ROOT / "setup.py")})
    return seen


DISTRIBUTION_OF = {
    "PIL": "pillow",
    "absl": "absl-py",
    "cv2": "opencv-python-headless",
    "ml_collections": "ml-collections",
    "orbax": "orbax-checkpoint",
}
# In extras (tokenizers: with transformers), or (tokamax) a peer that benchmarks measure if it is there; imported inside
# functions.
OPTIONAL = {
    *("ftfy", "httpx", "msgpack", "skimage", "starlette", "tokamax", "tokenizers", "uvicorn", "websockets"),
    *TORCH,
}


def test_setup_lists_what_the_package_imports(monkeypatch):
    base = {re.split(r"[><=\[]", r)[0].lower() for r in setup_arguments(monkeypatch)["install_requires"]}
    external = {}
    for path in (p for p in MODULES if p not in TORCH_FILES):
        for name, at_import in imported(ast.parse(path.read_text(encoding="utf-8"))):
            if name not in sys.stdlib_module_names and name != "greedy_distill_jax":
                external.setdefault(name, []).append((relative(path), at_import))
    at_import = {name: [path for path, top in uses if top] for name, uses in external.items() if name in OPTIONAL}
    assert not {name: paths for name, paths in at_import.items() if paths}, "in an extra: import it inside functions"
    needed = {DISTRIBUTION_OF.get(name, name).lower(): uses for name, uses in external.items() if name not in OPTIONAL}
    assert not {name: uses for name, uses in needed.items() if name not in base}, "setup.py does not list these"


def test_setup_has_no_torch_in_the_base(monkeypatch):
    arguments = setup_arguments(monkeypatch)
    assert not [r for r in arguments["install_requires"] if re.match("torch|transformers|tensorflow|diffusers", r)]
    extras = {"cuda", "tpu", "torch", "parity", "eval", "docs", "notebook", "rewards", "dev", "test"}
    assert extras <= set(arguments["extras_require"])
    assert not [r for rs in arguments["extras_require"].values() for r in rs if "<" in r.split(";")[0]]


def test_data_files_are_packaged(monkeypatch):
    patterns = setup_arguments(monkeypatch)["package_data"]["greedy_distill_jax"]
    packaged = {p for pattern in patterns for p in PACKAGE.glob(pattern)}
    data = {p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc") and "~" not in p.name}
    assert not {relative(p) for p in data - packaged}
    assert {p.parent for p in MODULES} <= {p.parent for p in MODULES if p.name == "__init__.py"}


def test_one_version(monkeypatch):
    import greedy_distill_jax

    assert setup_arguments(monkeypatch)["version"] == greedy_distill_jax.__version__
    assert f"[{greedy_distill_jax.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_commands_in_documents_name_files_that_exist(document):
    text = document.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```(?:bash|sh|shell|console)\n(.*?)```", text, re.DOTALL))
    files = re.findall(r"(?<![\w/.-])((?:launch|configs|benchmarks|notebooks|tests|\.ci)/[\w./-]+)", blocks)
    modules = re.findall(r"-m (greedy_distill_jax[\w.]*|benchmarks[\w.]*)", blocks)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if not re.match(r"mailto:|\w+://", link)]
    missing = [f for f in files if not (ROOT / f).exists()] + [f for f in links if not (document.parent / f).exists()]
    missing += [m for m in modules if not (ROOT / (m.replace(".", "/") + ".py")).exists()]
    assert not missing


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_code_cites_only_what_is_shipped(path):
    unshipped = r"(?:METHOD|FRONTIER|EVAL_RL)_SPEC|TINY_(?:RECIPE)|KERNEL_(?:NOTES)|WEIGHT_(?:NAMES)|DESIGN[.]md"
    named = re.findall(unshipped, path.read_text(encoding="utf-8"))
    assert not named, "cite the paper, or a section of docs/method.md"
    sections = re.findall(r"docs/method\.md,? sections? ([\d.]+\d|\d+)", path.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ ([\d.]+?)\.? ", (ROOT / "docs" / "method.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert not set(sections) - set(titles)


@pytest.mark.parametrize("script", [*sorted(ROOT.glob("launch/*.s*h")), ROOT / ".ci" / "run"], ids=relative)
def test_scripts_parse(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
