"""What the package promises apart from numbers: a core without torch, light imports, backends, forked workers."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from harness import assert_sentence, normal, python

import tokenflow_ext
from tokenflow_ext import ops, reference
from tokenflow_ext.quantize import VectorQuantizer

ROOT = Path(__file__).parents[1]
PACKAGE = Path(tokenflow_ext.__file__).parent


def test_a_source_tree_finds_the_installed_core():
    """Python started in the clone imports the tree's own files, and the core that pip built."""
    done = python("import tokenflow_ext as t; print(t.__file__, t.build_info()['native'])", cwd=ROOT)
    assert done.stdout.split() == [str(ROOT / "tokenflow_ext" / "__init__.py"), "True"], done.stderr


def test_the_core_knows_no_torch():
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert len(sources) > 5
    for source in sources:
        assert not re.search(r"#\s*include\s*[<\"](torch|ATen|c10|caffe2)", source.read_text()), source


def test_files_of_an_instruction_set_include_c_headers_alone():
    """One inline std:: function compiled for AVX-512 could be the copy that the linker keeps."""
    for source in [*(ROOT / "csrc/cpu").glob("*"), *(ROOT / "csrc/common").glob("*")]:
        if source.stem != "isa":
            for header in re.findall(r"#\s*include\s*<([^>]+)>", source.read_text()):
                assert header.endswith(".h"), f"{source}: <{header}>"


def test_setup_is_tiny():
    assert len((ROOT / "setup.py").read_text().strip().split("\n")) <= 5


def test_build_info():
    info = tokenflow_ext.build_info()
    assert (
        info["native"] is True and info["version"] == tokenflow_ext.__version__ and info["torch"] == torch.__version__
    )
    assert {"compiler", "instruction_sets", "instruction_set", "cuda", "threads"} <= set(info)


def test_import_needs_torch_alone():
    """Neither importing nor running an op loads a package beyond the standard library that `import torch` does not."""
    script = (
        "import sys, torch; before = set(sys.modules)\n"
        "import tokenflow_ext as t, tokenflow_ext.quantize\n"
        "t.quantize.VectorQuantizer(4, 8)(torch.randn(3, 4)).loss.backward()\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "print(sorted(new))"
    )
    blocked = "import sys\nfor name in ('numpy', 'PIL', 'safetensors', 'tqdm', 'tyro'): sys.modules[name] = None\n"
    done = python(blocked + script)
    assert done.returncode == 0, done.stderr
    assert eval(done.stdout) == ["tokenflow_ext"]


def test_without_the_core_the_reference_runs():
    """An import of a tree that was never built goes on; auto warns once, native says how to rebuild."""
    script = """
import sys, warnings
sys.modules["tokenflow_ext._C"] = None
import torch, tokenflow_ext as t
assert t.build_info()["native"] is False
x, codebook = torch.randn(5, 4), torch.randn(9, 4)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        t.ops.nearest_code(x, codebook)
    t.quantize.VectorQuantizer(4, 8)(x)
assert len(caught) == 1, [str(w.message) for w in caught]
t.ops.nearest_code(x, codebook, backend="native")
"""
    done = python(script)
    assert done.returncode == 1
    last = done.stderr.strip().split("\n")[-1]
    assert last.startswith("RuntimeError: nearest_code: backend: wanted native") and "pip install" in last, done.stderr


def test_backend_of_the_environment(monkeypatch):
    x, codebook = normal(5, 4), normal(9, 4)
    called = []
    original = reference.nearest_code
    monkeypatch.setattr(reference, "nearest_code", lambda *a, **k: called.append(1) or original(*a, **k))
    monkeypatch.setenv("TOKENFLOW_BACKEND", "reference")
    ops.nearest_code(x, codebook)
    assert called == [1]
    ops.nearest_code(x, codebook, backend="native")
    assert called == [1], "an argument goes before the environment"
    monkeypatch.setenv("TOKENFLOW_BACKEND", "fast")
    assert_sentence(ValueError, "nearest_code", "backend", ops.nearest_code, x, codebook)
    monkeypatch.setenv("TOKENFLOW_BACKEND", "native")
    VectorQuantizer(4, 8)(x)
    assert called == [1]


@pytest.mark.parametrize("name", ops.__all__)
def test_twins_have_the_same_signature(name):
    """Names, order, kinds and defaults; `backend` is the op's own."""
    op, twin = (inspect.signature(getattr(module, name)).parameters for module in (ops, reference))
    described = [{n: (p.kind, p.default) for n, p in parameters.items() if n != "backend"} for parameters in (op, twin)]
    assert described[0] == described[1] and list(described[0]) == list(described[1])
    assert op["backend"].default == "auto" and op["backend"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("name", ops.__all__)
def test_ops_say_what_they_are(name):
    for module in (ops, reference):
        assert getattr(module, name).__doc__
    doc = getattr(ops, name).__doc__
    assert all(word in doc for word in ("Args:", "Returns:", "Raises:"))


def test_a_forked_child_runs_an_op():
    """libgomp's threads do not survive a fork: a DataLoader worker must not wait for them."""
    script = """
import os, torch
from tokenflow_ext import ops
torch.set_num_threads(2)
x, codebook = torch.randn(4096, 8), torch.randn(512, 8)
expected = ops.nearest_code(x, codebook, backend="native")
child = os.fork()
if child == 0:
    x.requires_grad_()
    out = ops.quantize(x, codebook, metric="l2", backend="native")
    out.loss.backward()
    os._exit(0 if torch.equal(out.indices, expected) and bool(x.grad.any()) else 3)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
assert torch.equal(ops.nearest_code(x, codebook, backend="native"), expected)
"""
    done = python(script)
    assert done.returncode == 0, done.stderr


def test_two_python_threads_at_once():
    """Kernels release the GIL and keep no state: calls from several threads give their own results."""
    from concurrent.futures import ThreadPoolExecutor

    problems = [(normal(700, 8, seed=s), normal(300, 8, seed=s + 50)) for s in range(6)]
    expected = [ops.nearest_code(*p, backend="native") for p in problems]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda p: ops.nearest_code(*p, backend="native"), problems * 5))
    assert all(torch.equal(a, b) for a, b in zip(found, expected * 5))


def test_tensors_travel_in_capsules_where_torch_has_no_exchange_table():
    """torch < 2.10: the same ids, values and gradients, and nothing of the capsules stays behind."""
    script = """
import torch
if {old}: del torch.Tensor.__dlpack_c_exchange_api__
from tokenflow_ext import ops
x = torch.randn(70, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
codebook = torch.randn(40, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
quantized, ids, loss = ops.quantize(x[::2], codebook, backend="native")
loss.backward()
ops.code_statistics(x, torch.zeros(70, dtype=torch.int64), 3, backend="native")
print(ids.tolist(), quantized.tolist(), x.grad.tolist(), codebook.grad.tolist())
"""
    new, old = (python(script.format(old=old)) for old in (False, True))
    assert new.returncode == old.returncode == 0, new.stderr + old.stderr
    assert new.stdout == old.stdout


def test_the_core_refuses_what_is_no_tensor_of_its_types():
    from tokenflow_ext import _C

    y = torch.empty(2, 3)
    types = (torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2, 3, dtype=torch.complex64))
    nowhere = torch._efficientzerotensor(2, 3)
    for wrong in (1, "x", [1.0], *types, nowhere):
        with pytest.raises(TypeError):
            _C.normalize_rows(wrong, y, 1)
    for wrong in (
        torch.zeros(2, 3).T,
        torch.zeros(2, 3, dtype=torch.float64),
        torch.zeros(()),
        torch.zeros(3, 3),
        None,
    ):
        with pytest.raises(ValueError, match="wanted"):
            _C.normalize_rows(wrong, y, 1)
    with pytest.raises(RuntimeError):
        _C.normalize_rows(y.to("meta"), y, 1)
