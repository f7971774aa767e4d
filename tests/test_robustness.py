"""It keeps working: what the project does when it is killed, fed with nonsense, or out of disk space.

- A training run killed with SIGKILL before, after or in the middle of any write ends, after --resume, with the weights,
  the metrics and the log of the run that was never killed, and leaves nothing else behind.
- Every bad input is one line that says what would be right, with exit code 2, and changes no file (BAD_TRAIN, BAD_EVAL).
- Random and mutated files are loaded to something that is sound, or refused; no text becomes a special token, no
  attack leaves its table.
- Odd texts of every kind train, evaluate and are attacked, as single texts, premises and hypotheses.
- Processes that fill one cache at once all succeed. A full disk or a read-only folder is one line, and what was there
  before stays. Classes that are rare or missing are handled, or refused in one line.
"""
import errno
import http.server
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import attacks
import data
import eval
import train
from tests.conftest import TABLE, WORDS, review, save_model, write_task

ROOT = Path(__file__).parents[1]
SMALL = ["--epochs", "2", "--batch-size", "8", "--max-len", "16", "--adv-steps", "1", "--lr", "1e-3", "--device", "cpu"]
SPAWN = multiprocessing.get_context("forkserver")           # children start from a process that has imported torch only
SPAWN.set_forkserver_preload(["tests.test_robustness"])


def children(target, *arguments):
    """Runs target(*args) in a process of its own for each args, at once -> their exit codes."""
    processes = [SPAWN.Process(target=target, args=args) for args in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]


def files_of(folder):
    """{path: content} of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a task, a model, and a finished run of them: task, bert, runs/standard."""
    folder = tmp_path_factory.mktemp("base")
    write_task(folder / "task")
    save_model(folder / "bert", "bert")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RIFT_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        patch.setattr(data, "prepare_nltk", lambda *args, **kwargs: None)
        patch.setattr(data, "words_of", lambda text: text.lower().split())
        train.main([*TRAIN, *SMALL, "--method", "standard", "--epochs", "1"])
    return folder


TRAIN = "--task task --model bert --neighbors task/neighbors.json --out runs".split()


@pytest.fixture
def here(base, tmp_path, monkeypatch, plain_words):
    """A copy of base, which is also the working directory."""
    shutil.copytree(base, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


# ------------------------------------------------------------------------------------------------ killed


KILLING = [(train, "train_step"), (os, "replace"), (Path, "write_bytes"), (Path, "unlink"), (shutil, "rmtree")]


def killed_at(n, folder, resume):
    """Trains in a folder like `here`, counting its steps, writes, renamings and deletions; SIGKILL at the n-th: before
    it, after it, or when half of the bytes are written. A run that is not killed leaves the count in ../count."""
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ["RIFT_CACHE"] = str(folder / "cache")
    data.prepare_nltk, data.words_of = (lambda *args, **kwargs: None), (lambda text: text.lower().split())
    count = 0

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(real, name):
        def call(*args, **kwargs):
            nonlocal count
            mine = count = count + 1
            if mine == n and n % 2 and name == "write_bytes":
                real(args[0], args[1][:len(args[1]) // 2])
            if mine == n and (n % 2 or name == "train_step"):
                kill()
            result = real(*args, **kwargs)
            if mine == n:
                kill()
            return result
        return call

    for owner, name in KILLING:
        setattr(owner, name, counted(getattr(owner, name), name))
    train.main([*TRAIN, *SMALL, "--save-minutes", "0", "--out", "killed", *["--resume"] * resume])
    (folder.parent / "count").write_text(str(count))


def outcome(run):
    """All that a finished run is, but for the time it took and the name of its folder."""
    files = files_of(run)
    files["log.jsonl"] = [json.loads(line) | {"seconds": 0} for line in files["log.jsonl"].splitlines()]
    return files


@pytest.fixture(scope="module")
def unkilled(base, tmp_path_factory):
    """The run that was never killed, and its number of steps, writes, renamings and deletions."""
    folder = shutil.copytree(base, tmp_path_factory.mktemp("unkilled") / "here")
    assert children(killed_at, (0, folder, False)) == [0]
    return outcome(folder / "killed" / "rift"), int((folder.parent / "count").read_text())


def kill_and_resume(folder, moments, expected):
    """The run in `folder`, killed at each of the moments (counted from where it goes on), ends as expected."""
    codes = [children(killed_at, (n, folder, i > 0))[0] for i, n in enumerate(moments)]
    assert codes[0] == -signal.SIGKILL and set(codes) <= {0, -signal.SIGKILL}       # 0: less was left to do
    assert children(killed_at, (0, folder, True)) == [0]
    assert outcome(folder / "killed" / "rift") == expected


@pytest.mark.parametrize("draw", range(5))
def test_a_run_killed_at_random_ends_like_one_that_was_never_killed(base, unkilled, tmp_path, draw):
    expected, total = unkilled
    rng = random.Random(draw)
    moments = [rng.randint(1, total), rng.randint(1, total // 2), rng.randint(1, total // 3)]
    kill_and_resume(shutil.copytree(base, tmp_path / "here"), moments, expected)


def test_a_run_killed_while_it_finishes_ends_like_one_that_was_never_killed(base, unkilled, tmp_path):
    """At each of its last moments: the last epoch's log and checkpoint, the model, the encoder, the metrics."""
    expected, total = unkilled
    for n in range(total - 24, total + 1, 3):
        kill_and_resume(shutil.copytree(base, tmp_path / str(n)), [n], expected)
