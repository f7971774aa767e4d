"""The README is true: every function that it names exists, its examples run, and its commands parse."""
import importlib
import re
import shlex
from pathlib import Path

import pytest

import eval
import train

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMES = sorted({name for name in re.findall(r"`((?:rift|attacks|data|train|eval)\.[\w.]+)(?:\([^`]*\))?`", README)
                if not re.search(r"\.(py|jsonl?|tsv)$", name)})
EXAMPLES = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "from_pretrained" not in code]
COMMANDS = [line.strip().split("#")[0] for line in README.replace("\\\n", " ").splitlines()    # joined where a \ breaks them
            if line.startswith("    python ")]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_exists(name):
    module, *parts = name.split(".")
    thing = importlib.import_module(module)
    for part in parts:
        thing = getattr(thing, part)
    assert callable(thing) or isinstance(thing, dict)


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: code.split("\n")[1])
def test_every_example_runs(code):
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command, tmp_path):
    _, script, *argv = shlex.split(command)
    if script == "-m":
        assert importlib.util.find_spec(argv[0])
        return
    argv = [str(tmp_path) if word == "FOLDER" else word for word in argv]
    {"train.py": train.parse, "eval.py": eval.parse}[script](argv)


def test_the_tables_are_those_of_results():
    """Every row of a table with intervals or spreads in the README stands in a file of results/, to the letter."""
    results = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "results").glob("*.txt"))
    rows = [line.strip() for line in README.splitlines() if re.search(r"\d \(sd \d|\d \[[-+]?\d\.\d+, ", line)]
    assert len(rows) >= 7 and all(row in results for row in rows)


def test_there_is_something_to_check():
    """The patterns above still find what they are for."""
    assert len(NAMES) > 30 and len(EXAMPLES) == 3 and len(COMMANDS) >= 4
