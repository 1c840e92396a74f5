"""The package as an artefact: who imports whom, what a wheel holds, what an import pulls in."""

import ast
import graphlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {
    "kernels": {"kernels"},
    "fused_rlhf": {"kernels", "fused_rlhf"},
    "trainers": {"kernels", "fused_rlhf", "trainers"},
}
OUTSIDE = {"tests", "bench"}


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
        return parts[1] if len(parts) > 1 and parts[1] in ("kernels", "trainers") else "fused_rlhf"
    return parts[0] if parts[0] in (*LAYERS, *OUTSIDE) else None


@pytest.mark.parametrize("folder", sorted(LAYERS))
def test_imports_point_one_way(folder):
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        for module, _ in imported(path):
            found = layer(module)
            assert found is None or found in LAYERS[folder], f"{path.name} imports {module}"


def test_triton_is_imported_by_the_kernels_alone():
    for path in (ROOT / "fused_rlhf").rglob("*.py"):
        assert not any(module.split(".")[0] == "triton" for module, _ in imported(path)), path


def test_bench_imports_have_no_circle():
    """Those inside functions and for the type checker count, too."""
    files = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in (ROOT / "bench").rglob("*.py")}
    names = {name: {module for module, _ in imported(path)} for name, path in files.items()}
    # "bench.cases.Case" is a name of bench.cases, "bench.report" a module.
    graph = {
        name: {m if m in files else m.rpartition(".")[0] for m in found} & set(files) for name, found in names.items()
    }
    assert graph["bench.document"] >= {"bench.cases", "bench.registry"}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the modules of a circle


def test_folders_without_init():
    for folder in ("kernels", "trainers", "bench", "tests"):
        assert not (ROOT / folder / "__init__.py").exists()


def run(code, cwd=ROOT, **env):
    import os

    variables = {**os.environ, "HF_HUB_OFFLINE": "1", **env}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=variables, capture_output=True, text=True)


def test_import_pulls_in_no_extra():
    code = """
import sys, fused_rlhf
extras = "triton transformers accelerate datasets peft tyro matplotlib tqdm liger_kernel trl".split()
print(sorted(set(extras) & set(sys.modules)))
"""
    before = run(code.replace(", fused_rlhf", ", torch"))
    after = run(code)
    assert after.returncode == 0, after.stderr
    assert after.stdout == before.stdout  # torch itself may bring some


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


@pytest.mark.slow
def test_wheel_holds_the_tree(tmp_path):
    tree = tmp_path / "tree"  # a copy: setuptools would take up what an earlier build left in the checkout
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "runs"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, tree]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {n for n in names if ".dist-info/" not in n}
    expected = {"fused_rlhf/py.typed"}
    for folder, prefix in (("fused_rlhf", ""), ("kernels", "fused_rlhf/"), ("trainers", "fused_rlhf/")):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml"):
                expected.add(prefix + path.relative_to(ROOT).as_posix())
    assert files == expected
    (top,) = (n for n in names if n.endswith("top_level.txt"))
    assert zipfile.ZipFile(wheel).read(top).decode().split() == ["fused_rlhf"]
