"""pytest-benchmark's clock, and the table of this run at its end."""

import harness
import pytest
import table


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=harness.Clock.read))


def pytest_terminal_summary(terminalreporter):
    if table.skipped:
        terminalreporter.section("skipped providers")
        for op, size, provider, why in table.skipped:
            terminalreporter.write_line(f"{provider}: {op}, {size}: {why}")
    if table.session:
        terminalreporter.section("native against its rivals")
        terminalreporter.write_line(table.markdown(table.session))
        terminalreporter.write_line(
            f"all columns: {table.RESULTS}; `python benchmarks/report.py` writes README and plots"
        )
