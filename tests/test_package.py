"""The package as an artefact: who imports whom, what a wheel holds, what an import pulls in."""

import ast
import collections
import graphlib
import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {
    "kernels": {"kernels"},
    "fused_rlhf": {"kernels", "fused_rlhf"},
    "trainers": {"kernels", "fused_rlhf", "trainers"},
    "bench": {"kernels", "fused_rlhf", "trainers", "bench"},
}


def imported(path):
    """(module, lazily) for every import statement of a file."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from ((f"{node.module}.{alias.name}", id(node) not in top) for alias in node.names)


def layer(module):
    parts = module.split(".")
    if parts[0] == "fused_rlhf":
        return parts[1] if len(parts) > 1 and parts[1] in LAYERS else "fused_rlhf"
    return parts[0] if parts[0] in (*LAYERS, "tests") else None


@pytest.mark.parametrize("folder", sorted(LAYERS))
def test_imports_point_one_way(folder):
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        for module, lazily in imported(path):
            found = layer(module)
            in_a_checkout = (folder, found, lazily) == ("bench", "tests", True)  # the tiny families of the tests
            assert found is None or found in LAYERS[folder] or in_a_checkout, f"{path.name} imports {module}"


def test_triton_is_imported_by_the_kernels_alone():
    for path in (ROOT / "fused_rlhf").rglob("*.py"):
        assert not any(module.split(".")[0] == "triton" for module, _ in imported(path)), path


def test_bench_imports_have_no_circle():
    """Those inside functions and for the type checker count, too."""
    files = {
        ".".join(("fused_rlhf", *p.relative_to(ROOT).with_suffix("").parts)): p for p in (ROOT / "bench").rglob("*.py")
    }
    names = {name: {module for module, _ in imported(path)} for name, path in files.items()}
    # "fused_rlhf.bench.cases.Case" is a name of a module, "fused_rlhf.bench.report" a module.
    graph = {
        name: {m if m in files else m.rpartition(".")[0] for m in found} & set(files) for name, found in names.items()
    }
    assert graph["fused_rlhf.bench.document"] >= {"fused_rlhf.bench.cases", "fused_rlhf.bench.registry"}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the modules of a circle


def test_folders_without_init():
    for folder in ("kernels", "trainers", "bench", "tests"):
        assert not (ROOT / folder / "__init__.py").exists()


def run(code, cwd=ROOT, **env):
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", **env}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=variables, capture_output=True, text=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_every_module_can_be_the_first():
    """No import of a part goes in a circle through the package's names."""
    files = [
        path for path in (ROOT / "fused_rlhf").rglob("*.py") if path.parent.name in ("fused_rlhf", "objectives", "op")
    ]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files}
    code = f"""
import importlib, os, traceback
import torch
for name in {sorted(names)}:
    if os.fork() == 0:
        try:
            importlib.import_module(name)
        except BaseException:
            print(name, traceback.format_exc(), flush=True)
        os._exit(0)
    os.wait()
"""
    found = run(code)
    assert found.returncode == 0, found.stderr
    assert found.stdout == ""


def test_import_pulls_in_no_extra():
    code = """
import sys, fused_rlhf
assert "torch" not in sys.modules
import torch
extras = set("triton transformers accelerate datasets peft tyro matplotlib tqdm liger_kernel trl".split())
before = extras & set(sys.modules)  # torch itself may bring some
fused_rlhf.linear_logprobs
from fused_rlhf import *
assert linear_logprobs is fused_rlhf.linear_logprobs and objectives is fused_rlhf.objectives
assert {"linear_logprobs", "GRPO", "__version__"} <= set(dir(fused_rlhf))
assert not hasattr(fused_rlhf, "linear_logprob")
print("more:", sorted(extras & set(sys.modules) - before))
"""
    found = run(code)
    assert found.returncode == 0, found.stderr
    assert found.stdout == "more: []\n"


def test_works_without_triton():
    code = """
import sys, importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] == "triton" else real(name, *a)
sys.modules["triton"] = None
import torch, fused_rlhf as fr
print(fr.linear_logprobs(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2, dtype=torch.int64)).logprobs.tolist())
try:
    fr.linear_logprobs(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2, dtype=torch.int64), backend="triton")
except RuntimeError as error:
    print(error)
"""
    found = run(code)
    assert found.returncode == 0, found.stderr
    assert "-1.386" in found.stdout
    assert "needs the package triton, which is missing" in found.stdout


def test_extras_hold_what_the_messages_say():
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    cli, info = (importlib.import_module(f"fused_rlhf.trainers.{name}") for name in ("cli", "info"))
    names = {"yaml": "pyyaml", "liger_kernel": "liger-kernel"}
    apart = {"tokenizers", "safetensors"}  # of transformers
    for package, extra in cli.EXTRAS.items():
        if package not in apart:
            assert any(need.startswith(names.get(package, package)) for need in extras[extra]), package
    for package, (_, how) in info.PACKAGES.items():
        if extra := how.partition("[")[2].partition("]")[0]:
            assert any(need.startswith(package) for need in extras[extra]), package
    heavy = [need for need in [*project["dependencies"], *extras["train"]] if need.startswith(("triton", "liger"))]
    assert not heavy


@pytest.mark.slow
@pytest.mark.parametrize("with_hf_kernels", [False, True])
def test_transformers_works_from_the_root(tmp_path, with_hf_kernels):
    """Our kernels/ folder must not pass for the Hugging Face package of that name, installed or not."""
    if with_hf_kernels:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("MARK = 'hub'\n")
        meta = tmp_path / "kernels-0.0.1.dist-info"
        meta.mkdir()
        (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.0.1\n")
    code = """
import sys, torch, transformers
if {hub}:
    import kernels; assert kernels.MARK == "hub"
config = transformers.Qwen2Config(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                  num_attention_heads=2, num_key_value_heads=2)
transformers.AutoModelForCausalLM.from_config(config).save_pretrained(sys.argv[1] if len(sys.argv) > 1 else {folder!r})
model = transformers.AutoModelForCausalLM.from_pretrained({folder!r})
print(model.generate(torch.ones(1, 2, dtype=torch.int64), max_new_tokens=2, do_sample=False).shape)
import fused_rlhf.kernels.interface, fused_rlhf.trainers.cli
"""
    path = str(tmp_path) if with_hf_kernels else ""
    found = run(code.format(hub=with_hf_kernels, folder=str(tmp_path / "model")), PYTHONPATH=path)
    assert found.returncode == 0, found.stderr[-2000:]
    assert "(1, 4)" in found.stdout or "[1, 4]" in found.stdout


def test_each_file_has_one_name():
    """The links give a file two paths in a checkout, never two modules; here, and in whatever this process ran before."""
    importlib.import_module("fused_rlhf.trainers.grpo")
    names = collections.defaultdict(list)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and any(Path(file).resolve().is_relative_to(ROOT / folder) for folder in (*LAYERS, "tests")):
            names[Path(file).resolve()].append(name)
    assert ROOT / "trainers" / "grpo.py" in names
    assert not {path: found for path, found in names.items() if len(found) > 1}


# A tree as it can come: with the links of a checkout, with the text files that stand for links on Windows and in a zip
# that pip or Python unpacks, and without either, as in an sdist.
TREES = ["links", "texts", "sdist"]
WAYS = ["checkout", "wheel", "editable", "compat", "strict"]
LINKS = ["bench", "kernels", "trainers"]
BUILD = """
import sys
from setuptools import build_meta
kind, out, *mode = sys.argv[1:]
getattr(build_meta, "build_" + kind)(out, **({"config_settings": {"editable_mode": mode[0]}} if mode else {}))
"""
# Started with -S: the packages of this environment, but not what is installed in it as editable. Each installation is
# imported in a fork of one process that has the big packages.
USE = """
import collections, json, os, site, sys, traceback
sys.path.append(sys.argv[1])
import accelerate, peft, torch, transformers, tyro
transformers.AutoModelForCausalLM, transformers.AutoTokenizer  # imported when they are asked for

def modules():
    import fused_rlhf.bench.command, fused_rlhf.kernels.interface, fused_rlhf.trainers.flags, fused_rlhf.trainers.grpo
    found = collections.defaultdict(list)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and name.split(".")[0] in ("fused_rlhf", "bench", "kernels", "trainers"):
            found[os.path.realpath(file)].append(name)
    return found, sorted(fused_rlhf.trainers.flags.RECIPES)

for name, (folder, installed) in json.loads(sys.argv[2]).items():
    if os.fork() == 0:
        try:
            sys.path.insert(0, folder)
            if installed:
                site.addsitedir(folder)
            print(json.dumps([name, *modules()]), flush=True)
        except BaseException:
            print(json.dumps([name, None, traceback.format_exc()]), flush=True)
        os._exit(0)
    os.wait()
"""


def files_of(tree):
    """What a wheel of this tree is to hold."""
    expected = {"fused_rlhf/py.typed"}
    for folder, prefix in (("fused_rlhf", ""), *((link, "fused_rlhf/") for link in LINKS)):
        for path in (tree / folder).rglob("*"):  # does not follow links
            if path.suffix in (".py", ".yaml"):
                expected.add(prefix + path.relative_to(tree).as_posix())
    return expected


def build(kind, tree, out, *mode):
    out.mkdir(parents=True, exist_ok=True)
    found = subprocess.run([sys.executable, "-c", BUILD, kind, out, *mode], cwd=tree, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """{name: a tree of that kind, and an archive of one}"""
    folder = tmp_path_factory.mktemp("trees")
    for name in ("links", "texts"):
        (folder / name).mkdir()
        for part in ("fused_rlhf", *LINKS, "pyproject.toml", "README.md", "LICENSE"):
            if (ROOT / part).is_dir():
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / part, folder / name / part, symlinks=True, ignore=ignore)
            else:
                shutil.copy(ROOT / part, folder / name / part)
        for link in LINKS:
            path = folder / name / "fused_rlhf" / link
            path.unlink(missing_ok=True)  # this checkout may itself have been unpacked without links
            if name == "links":
                path.symlink_to(Path("..") / link)
            else:
                path.write_text(f"../{link}")
    archive = build("sdist", folder / "links", folder / "dist")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    (folder / archive.name.removesuffix(".tar.gz")).rename(folder / "sdist")
    return {**{name: folder / name for name in TREES}, "archive": archive}


def test_a_checkout_links_to_the_parts_beside_it():
    for link in LINKS:
        path = ROOT / "fused_rlhf" / link
        if path.exists() or path.is_symlink():  # not in an sdist
            assert (path.readlink().as_posix() if path.is_symlink() else path.read_text()) == f"../{link}"


@pytest.mark.slow
def test_sdist_holds_every_file_once(trees):
    with tarfile.open(trees["archive"]) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
        assert not any(member.issym() or member.islnk() for member in archive.getmembers())
    sources = [name for name in names if Path(name).suffix in (".py", ".yaml", ".typed")]
    parts = tuple(f"fused_rlhf/{link}/" for link in LINKS)
    expected = {n.removeprefix("fused_rlhf/") if n.startswith(parts) else n for n in files_of(trees["links"])}
    assert sorted(sources) == sorted(expected)


@pytest.mark.slow
@pytest.mark.parametrize("tree", TREES)
def test_wheel_holds_the_tree(trees, tree, tmp_path):
    wheel = zipfile.ZipFile(build("wheel", trees[tree], tmp_path))
    assert sorted(n for n in wheel.namelist() if ".dist-info/" not in n) == sorted(files_of(ROOT))
    (top,) = (n for n in wheel.namelist() if n.endswith("top_level.txt"))
    assert wheel.read(top).decode().split() == ["fused_rlhf"]


@pytest.fixture(scope="module")
def installations(trees, tmp_path_factory):
    """{tree-how: (where its modules are to be, {file: names}, recipes)}"""
    folders, homes = {}, {}
    for tree, how in itertools.product(TREES, WAYS):
        name, home = f"{tree}-{how}", trees[tree]
        if how == "checkout":
            folders[name], homes[name] = (str(home), False), home
            continue
        folder = tmp_path_factory.mktemp(name)
        kind, mode = ("wheel", []) if how == "wheel" else ("editable", [how] if how != "editable" else [])
        zipfile.ZipFile(build(kind, home, folder / "dist", *mode)).extractall(folder / "site")
        folders[name], homes[name] = (str(folder / "site"), True), folder if how == "wheel" else home
    command = [sys.executable, "-S", "-c", USE, sysconfig.get_path("purelib"), json.dumps(folders)]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(command, cwd=trees["archive"].parent, env=env, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    lines = [json.loads(line) for line in found.stdout.splitlines() if line.startswith("[")]
    return {name: (homes[name].resolve(), modules, recipes) for name, modules, recipes in lines}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("tree", TREES)
def test_every_installation_has_each_module_once(installations, tree, how):
    """The parts are importable under their one name, however the package came to be there."""
    home, modules, recipes = installations[f"{tree}-{how}"]
    assert modules is not None, recipes
    assert all(Path(path).is_relative_to(home) for path in modules), modules
    assert all(len(names) == 1 and names[0].startswith("fused_rlhf") for names in modules.values()), modules
    assert recipes == sorted(path.stem for path in (ROOT / "trainers" / "recipes").glob("*.yaml"))
