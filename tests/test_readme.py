"""README.md and results/README.md are true: names exist, examples run, commands parse, and every
figure in a table is in a file that a command has printed into results/."""
import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest

import eval
import rift
import train

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = {path.name: path.read_text(encoding="utf-8")
           for path in (ROOT / "results").glob("*.*") if path.suffix in (".md", ".txt")}
NAMES = set(re.findall(r"`((?:rift|attacks|data|train|eval)\.\w[\w.]*)`", README))
NAMES = sorted(name for name in NAMES if not re.search(r"\.(py|jsonl?|tsv)$", name))
EXAMPLES = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
            if "from_pretrained" not in code]
COMMANDS = [line.strip().split("#")[0]
            for text in (README, RESULTS["README.md"])
            for line in text.replace("\\\n", " ").splitlines() if line.startswith("    python ")]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_exists(name):
    module, *parts = name.split(".")
    thing = importlib.import_module(module)
    for part in parts:
        thing = getattr(thing, part)
    assert callable(thing) or isinstance(thing, dict)


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: code.split("\n")[1])
def test_every_example_runs(code, monkeypatch):
    monkeypatch.setattr(rift, "METHODS", dict(rift.METHODS))
    exec(compile(code, "README.md", "exec"), {})


def test_the_loop_to_copy_makes_the_calls_of_training():
    """In the same order: the start, x^, both passes, the weighted sum, the gradient."""
    loop, = [code for code in EXAMPLES if "for step in range" in code]
    calls = ['rift.noise(batch["subs"].shape', "model.adversary(**batch, v=v",
             "model(**batch, y=y, w=w, T=T", "rift.objective(outputs, ", ".backward()"]
    assert len(loop.splitlines()) <= 25
    for code in (loop, inspect.getsource(train.algorithm_1) + inspect.getsource(train.train)):
        places = [code.index(call) for call in calls]
        assert places == sorted(places)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command, tmp_path, monkeypatch):
    monkeypatch.setitem(eval.ATTACKS, "random", None)           # the attack that the README adds
    _, script, *argv = shlex.split(command)
    if script == "-m":
        assert importlib.util.find_spec(argv[0])
        return
    argv = [str(tmp_path) if word == "./FOLDER" else word for word in argv]
    {"train.py": train.parse, "eval.py": eval.parse}[script](argv)


def test_the_tables_are_those_of_results():
    """Each row with intervals, spreads or ranges is in a file of results/, under the same name."""
    printed = "\n".join(text for name, text in RESULTS.items() if name.endswith(".txt"))
    cells, *tables = ([re.split(r"  +|\s*\|\s*", line.strip(" |")) for line in text.splitlines()]
                      for text in (printed, README, RESULTS["README.md"]))
    figure = r"[-+]?\d+\.\d+ (\(sd|\[[-+]?\d|\(\d.* to )"
    front, more = ([row for row in rows if any(re.match(figure, cell) for cell in row)]
                   for rows in tables)
    assert len(front) >= 7 and len(more) >= 8
    for name, *figures in front + more:
        figures = {figure for figure in figures if re.search(r"\d\.\d", figure)}
        assert any(name == row[0] and figures <= set(row) for row in cells), (name, figures)


def test_there_is_something_to_check():
    """The patterns above still find what they are for."""
    assert len(NAMES) > 30 and len(EXAMPLES) >= 3 and len(COMMANDS) >= 8
