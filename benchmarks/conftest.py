"""The table of this run, at its end."""

import table


def pytest_terminal_summary(terminalreporter):
    if table.session:
        terminalreporter.section("native against its rivals")
        terminalreporter.write_line(table.markdown(table.session))
        terminalreporter.write_line(f"also in {table.RESULTS}; `python benchmarks/table.py` prints it again")
