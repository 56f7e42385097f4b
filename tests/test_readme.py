"""The README's Python runs, and the commands that it names exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"make ([\w-]+)", TEXT))
    assert {"test", "demo"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target
