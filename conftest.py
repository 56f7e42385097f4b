"""pytest for tests/ and, with --benchmark, for benchmarks/: against the installed package, with the native core."""

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent
EMULATED = (
    "compat_unitok compat_var entropy_loss golden lookup multiscale multiscale_golden nearest_code normalize quantize"
    " related_golden shared soft_quantize statistics var_golden"
).split()
"""The suites that `pytest --emulated` runs: those of the ops with a CUDA kernel, against published values too."""
NOT_EMULATED = {
    "threads": "about the CPU's threads",
    "large_results": "about the CPU's cache",
}
"""Parts of a test's name, and why it is left out there."""
IN_PLACE = any((ROOT / "tokenflow_ext").glob("_C*.so"))

# The source tree would shadow the installed package, which is the one that holds the compiled core.
sys.path[:] = [p for p in sys.path if pathlib.Path(p or ".").resolve() != ROOT]
if IN_PLACE:
    sys.path[:0] = [str(ROOT), str(ROOT / "python")]


def pytest_addoption(parser):
    parser.addoption("--benchmark", action="store_true", help="run benchmarks/ instead of tests/")
    parser.addoption("--emulated", action="store_true", help="the CUDA kernels, emulated, in place of the CPU's")


def pytest_configure(config):
    if config.getoption("--benchmark") and config.args_source != config.ArgsSource.ARGS:
        config.args = [str(ROOT / "benchmarks")]
    from tokenflow_ext import build_info

    if not build_info()["native"]:
        pytest.exit("tokenflow_ext was imported without its native core: run `pip install .` first", returncode=4)
    if config.getoption("--emulated"):
        if config.args_source != config.ArgsSource.ARGS:
            config.args = [str(ROOT / "tests" / f"test_{name}.py") for name in EMULATED]
        sys.path.insert(0, str(ROOT / "tests"))
        from emulator import InPlaceOfTheCpu

        from tokenflow_ext.ops import _native

        _native._C = InPlaceOfTheCpu(_native._C)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--emulated"):
        left_out = [item for item in items if any(part in item.name for part in NOT_EMULATED)]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


def pytest_sessionfinish(session):
    if session.config.getoption("--emulated") and session.testscollected:
        from tokenflow_ext.ops import _native

        if _native._C.calls["emulated"] == 0:
            session.exitstatus = 1  # nothing of what was to be tested ran


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--emulated"):
        from tokenflow_ext.ops import _native

        terminalreporter.line(
            "calls: {emulated} of emulated CUDA kernels, {cpu} in float64 of the CPU's".format(**_native._C.calls)
        )


def pytest_ignore_collect(collection_path, config):
    if collection_path.name.startswith("bench_") and not config.getoption("--benchmark"):
        return True


@pytest.fixture(autouse=True)
def poisoned(request):
    """Every torch.empty holds NaN (or the largest integer), so that an element nobody wrote fails its test."""
    import torch

    if request.config.getoption("--benchmark"):
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def one_thread():
    """For tiny layers, which gain nothing from a second thread, and lose much where another process wants the same cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
