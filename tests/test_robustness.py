"""It keeps working: what the project does when it is killed, fed with nonsense, or out of disk space.

- A training run killed with SIGKILL before, after or in the middle of any write ends, after --resume, with the weights,
  the metrics and the log of the run that was never killed, and leaves nothing else behind.
- Every bad input (BAD_TRAIN, BAD_EVAL) is one line that says what would be right, exit code 2, and changes no file.
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
from transformers import PreTrainedModel

import attacks
import data
import eval
import train
from tests.conftest import TABLE, WORDS, review, save_model, write_task

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
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


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The number of threads decides on the last bits: here and in the children it is one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


# ------------------------------------------------------------------------------------------------ bad input


GOOD = "label\ttext\n" + "neg\ta bad film\npos\ta good film\n" * 9
RUN = "runs/standard"


def tar(path, *members):
    """A .tar.gz of (name, type, link target)."""
    with tarfile.open(path, "w:gz") as file:
        for name, kind, target in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, 7 if kind == tarfile.REGTYPE else 0
            file.addfile(info, io.BytesIO(b"content"))


def zipped(path, **files):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)


def tsv(content, split="train"):
    return lambda: Path(f"task/{split}.tsv").write_bytes(content if isinstance(content, bytes) else content.encode())


def file(name, content):
    def write():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return write


def folder(name):
    return lambda: Path(name).mkdir(parents=True)


def changed(name, **values):
    def write():
        content = json.loads(Path(name).read_text())
        (content.get("settings", content)).update(values)
        Path(name).write_text(json.dumps(content))
    return write


def checkpoint(change):
    """A run that was stopped after its first step, whose checkpoint is then changed: (tensors, progress) -> both."""
    def write():
        shutil.rmtree("runs")
        with pytest.MonkeyPatch.context() as patch:
            real = train.train_step
            patch.setattr(train, "train_step", lambda training, *args: real(training, *args) if
                          training.progress["step"] == 0 else (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(SystemExit):
                train.main([*TRAIN, *SMALL, "--method", "standard"])
        path = Path(RUN, "checkpoint.safetensors")
        eval.save_tensors(path, *change(*eval.load_tensors(path)))
    return write


def without(start, tensors, progress):
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(start)}, progress


def wrong_shape(tensors, progress):
    name = "adamw.head.0.weight.exp_avg"
    return tensors | {name: tensors[name][:, :8]}, progress


def more_tokens():
    config = json.loads(Path("bert/config.json").read_text())
    weights = safetensors.torch.load_file("bert/model.safetensors")
    name = "embeddings.word_embeddings.weight"
    weights[name] = weights[name][:12].clone()
    safetensors.torch.save_file(weights, "bert/model.safetensors", {"format": "pt"})
    Path("bert/config.json").write_text(json.dumps(config | {"vocab_size": 12}))


def of_pairs():
    shutil.rmtree("task")
    write_task(Path("task"), pair=True)


RESUME = ["--method", "standard", "--epochs", "2", "--resume"]
IMDB = ["--task", "imdb", "--data-dir", "mine"]
SNLI = ["--task", "snli", "--data-dir", "mine"]
# What is done to a copy of `base`, the arguments besides TRAIN and SMALL, and what the one line must hold.
BAD_TRAIN = [
    # flags
    (None, ["--task", "imbd"], "--task imbd: has to be toy, imdb, snli, or a folder"),
    (None, ["--task", "toy", "--model", "bert"], "--model bert: the toy task has its own"),
    (None, ["--model", "./nowhere"], "model ./nowhere: cannot be loaded"),
    (None, ["--model", "task"], "model task: cannot be loaded as a safetensors BERT or RoBERTa encoder"),
    (None, ["--method", "rfit"], "--method: invalid choice: 'rfit'"),
    (None, ["--method"], "--method: expected at least one argument"),
    (None, ["--pooling", "max"], "--pooling: invalid choice: 'max'"),
    (None, ["--unknown-words", "skip"], "--unknown-words: invalid choice: 'skip'"),
    (None, ["--precision", "fp16"], "--precision: invalid choice: 'fp16'"),
    (None, ["--device", "warp"], "--device warp: "),
    (None, ["--device", "meta"], "--device meta: "),
    (None, ["--seeds", "-1"], "--seeds: '-1' has to be an integer of at least 0"),
    (None, ["--seeds", str(2 ** 70)], "has to be an integer of at least 0 and at most"),
    (None, ["--split-seed", "-1"], "--split-seed: '-1' has to be an integer of at least 0"),
    (None, ["--train-size", "0"], "--train-size: '0' has to be an integer of at least 1"),
    (None, ["--train-size", "2"], "class 'neg' has 1 training examples"),
    (None, ["--train-size", "5000"], "train: 5000 examples are 2500 of each class, wanted 1 to 16"),
    (None, ["--dev-size", "x"], "--dev-size: 'x' has to be an integer"),
    (None, ["--dev-size", "1"], "dev: 1 examples are 0 of each class, wanted 1 to"),
    (None, ["--test-size", "-3"], "--test-size: '-3' has to be an integer of at least 1"),
    (None, ["--test-size", "999"], "test: 999 examples are 499 of each class, wanted 1 to"),
    (None, ["--max-len", "3"], "--max-len: '3' has to be an integer of at least 4"),
    (None, ["--max-len", "35"], "--max-len 35: bert has positions for 34 tokens at most"),
    (None, ["--epochs", "0"], "--epochs: '0' has to be an integer of at least 1"),
    (None, ["--batch-size", "3"], "batches of 3 from classes of [16, 16] examples"),
    (None, ["--micro-batch-size", "0"], "--micro-batch-size: '0' has to be"),
    (None, ["--eval-batch-size", "0"], "--eval-batch-size: '0' has to be"),
    (None, ["--lr", "0"], "--lr: '0' has to be a number above 0"),
    (None, ["--lr", "1e999"], "--lr: '1e999' has to be a number above 0"),
    (None, ["--schedule", "1", "-1"], "--schedule: '-1' has to be a number of at least 0"),
    (None, ["--weight-decay", "-1"], "--weight-decay: '-1' has to be"),
    (None, ["--adam-eps", "0"], "--adam-eps: '0' has to be a number above 0"),
    (None, ["--alpha", "nan"], "--alpha: 'nan' has to be a number of at least 0"),
    (None, ["--beta", "-1"], "--beta: '-1' has to be"),
    (None, ["--tau", "0"], "--tau: '0' has to be a number above 0"),
    (None, ["--adv-steps", "2.5"], "--adv-steps: '2.5' has to be an integer of at least 0"),
    (None, ["--adv-lr", "-1"], "--adv-lr: '-1' has to be"),
    (None, ["--adv-weight-decay", "-1"], "--adv-weight-decay: '-1' has to be"),
    (None, ["--sparsity", "inf"], "--sparsity: 'inf' has to be"),
    (None, ["--candidates", "0"], "--candidates: '0' has to be an integer of at least 1"),
    (None, ["--candidates", "1000000000"], "--candidates: '1000000000' has to be"),
    (None, ["--ptwd", "-1"], "--ptwd: '-1' has to be"),
    (None, ["--mixout", "1"], "--mixout: '1' has to be a number of at least 0 and at most 0.999"),
    (None, ["--save-minutes", "-1"], "--save-minutes: '-1' has to be"),
    (None, ["--resume", "--overwrite"], "--resume and --overwrite: only one of them"),
    (None, ["--learning-rate", "1"], "unrecognized arguments: --learning-rate 1"),
    # own data
    (tsv(""), [], "task/train.tsv, line 1: '', wanted the header"),
    (tsv("label\ttext\n"), [], "task/train.tsv, line 1: 'label\\ttext', wanted the header"),
    (tsv("text\tlabel\na\tb\n"), [], "line 1: 'text\\tlabel', wanted the header"),
    (tsv(GOOD + "neg\n"), [], "task/train.tsv, line 20: ['neg'], wanted 'label\\ttext' with a label"),
    (tsv(GOOD + "neg\ta\tb\n"), [], "task/train.tsv, line 20: ['neg', 'a', 'b'], wanted"),
    (tsv(GOOD + "\ta film\n"), [], "task/train.tsv, line 20: ['', 'a film'], wanted"),
    (tsv(b"label\ttext\nneg\t\xff\n"), [], "task/train.tsv, line 2: not UTF-8 (byte 0xff)"),
    (tsv("label\ttext\nneg\ta\nneg\tb\n"), [], "task/train.tsv: only one class, 'neg'"),
    (tsv(GOOD + "odd\tone\n"), [], "task: class 'odd' has 1 training examples"),
    (tsv("label\ttext\nso\ta\n", "test"), [], "task/test.tsv, line 2: label 'so' does not occur in train.tsv"),
    (tsv("label\ttext\nso\ta\n", "dev"), [], "task/dev.tsv, line 2: label 'so' does not occur in train.tsv"),
    (tsv("label\ttext\nneg\ta\n", "test"), ["--test-size", "2"], "test: 2 examples are 1 of each class, wanted 1 to 0"),
    (tsv("label\ttext\ttext2\nneg\ta\tb\n", "test"), [], "task/test.tsv, line 1: 'label\\ttext\\ttext2', wanted"),
    (lambda: Path("task/test.tsv").unlink(), [], "task/test.tsv: cannot be read (No such file"),
    (lambda: (Path("task/test.tsv").unlink(), Path("task/test.tsv").mkdir()), [], "test.tsv: cannot be read (Is a d"),
    # public data
    (None, ["--task", "imdb", "--data-dir", "nowhere"], "nowhere: no such folder (--data-dir wants one"),
    (file("mine/aclImdb_v1.tar.gz", b"<html>"), IMDB, "aclImdb_v1.tar.gz: cannot be read"),
    (file("mine/aclImdb_v1.tar.gz", b""), IMDB, "aclImdb_v1.tar.gz: "),
    (lambda: (Path("mine").mkdir(), tar("mine/aclImdb_v1.tar.gz", ("../evil/train/pos/1.txt", tarfile.REGTYPE, ""))),
     IMDB, "holds no aclImdb/train/neg/*.txt"),
    (lambda: (Path("mine").mkdir(), tar("mine/aclImdb_v1.tar.gz", ("aclImdb/train/neg/1.txt", tarfile.SYMTYPE,
                                                                  "/etc/passwd"))), IMDB, "holds no aclImdb/train/neg"),
    (folder("mine/aclImdb"), IMDB, "aclImdb: holds no aclImdb/train/neg/*.txt"),
    (file("mine/snli_1.0.zip", b"PK\x03\x04cut"), SNLI, "snli_1.0.zip: cannot be read"),
    (file("mine/snli_1.0/snli_1.0_train.jsonl", "{}\n"), SNLI, "snli_1.0_train.jsonl, line 1: '{}', wanted JSON"),
    (file("mine/snli_1.0/snli_1.0_dev.jsonl", '{"gold_label": "maybe", "sentence1": "", "sentence2": ""}'), SNLI,
     "snli_1.0_dev.jsonl, line 1: "),
    (folder("mine/snli_1.0"), SNLI, "snli_1.0: holds no snli_1.0_train.jsonl"),
    # substitution tables
    (None, ["--neighbors", "nowhere.json"], "nowhere.json: cannot be read (No such file"),
    (None, ["--neighbors", "task"], "task: wanted `wordnet`, a neighbour table .json, or a vector file .txt or .zip"),
    (folder("t.json"), ["--neighbors", "t.json"], "t.json: cannot be read (Is a directory"),
    (file("t.json", "[]"), ["--neighbors", "t.json"], "t.json: wanted a JSON object that maps a word to a list"),
    (file("t.json", '{"a": "b"}'), ["--neighbors", "t.json"], "t.json: 'a' maps to b, wanted a list of single"),
    (file("t.json", '{"a": [1]}'), ["--neighbors", "t.json"], "t.json: 'a' maps to [1], wanted a list of single"),
    (file("t.json", '{"a": ["B c"]}'), ["--neighbors", "t.json"], "t.json: 'a' maps to ['B c'], wanted a list"),
    (file("t.json", '{"a": ["\\ud800"]}'), ["--neighbors", "t.json"], "t.json: 'a' maps to"),
    (file("t.json", '{"a": ["b"'), ["--neighbors", "t.json"], "t.json: wanted a JSON object"),
    (file("v.txt", "a 1 2\nb 1\n"), ["--neighbors", "v.txt"], "v.txt, line 2: 'b 1', wanted a word and 2 numbers"),
    (file("v.txt", "a 1 2\nb 1 x\n"), ["--neighbors", "v.txt"], "v.txt, line 2: 'b 1 x', wanted a word and 2"),
    (file("v.txt", "a 1 2\nb 1 nan\n"), ["--neighbors", "v.txt"], "v.txt, line 2: 'b 1 nan', wanted"),
    (file("v.txt", "zebra 1 2\n"), ["--neighbors", "v.txt"], "v.txt: none of the "),
    (file("v.zip", b"cut"), ["--neighbors", "v.zip"], "v.zip: cannot be read"),
    (lambda: zipped("v.zip", readme=""), ["--neighbors", "v.zip"], "v.zip: wanted one .txt file in it, there are 0"),
    # models
    (lambda: Path("bert/model.safetensors").unlink(), [], "model bert: cannot be loaded"),
    (lambda: os.truncate("bert/model.safetensors", 999), [], "model bert: cannot be loaded"),
    (changed("bert/config.json", hidden_size=32), [], "model bert: "),
    (changed("bert/config.json", model_type="gpt2"), [], "model bert: "),
    (more_tokens, [], "model bert: its tokenizer has 29 tokens, its encoder embeddings for 12"),
    # run folders and checkpoints
    (None, ["--method", "standard"], "runs/standard: holds a run already; --resume goes on with it, --overwrite"),
    (None, ["--method", "standard", "--resume"], "runs/standard: --resume with epochs 2, but the run has 1"),
    (tsv(GOOD), ["--method", "standard", "--epochs", "1", "--resume"], "runs/standard: --resume with data "),
    (file(f"{RUN}/config.json", "{"), RESUME, "runs/standard/config.json: is not JSON"),
    (file(f"{RUN}/config.json", '{"settings": []}'), RESUME, "runs/standard/config.json: has no settings"),
    (file("taken", ""), ["--out", "taken/below"], "taken/below/rift: cannot be written (Not a directory"),
    (checkpoint(partial(without, "model.head.0.bias")), RESUME, "checkpoint.safetensors: model.head.0.bias is nothing"),
    (checkpoint(partial(without, "adamw.head.0.bias.exp_avg_sq")), RESUME, "adamw.head.0.bias.exp_avg_sq is nothing"),
    (checkpoint(partial(without, "adamw.")), RESUME, "checkpoint.safetensors: adamw."),
    (checkpoint(wrong_shape), RESUME, "adamw.head.0.weight.exp_avg is (256, 8) there, the model needs (256, 16)"),
    (checkpoint(lambda tensors, progress: (tensors | {"adamw.x": torch.ones(1)}, progress)), RESUME, "adamw.x is (1,)"),
    (checkpoint(lambda tensors, progress: (tensors, {"epoch": 0})), RESUME, "does not say where the run stands"),
    (checkpoint(lambda tensors, progress: (tensors, [])), RESUME, "does not say where the run stands"),
]
BAD_EVAL = [
    (None, [], "the following arguments are required: RUN"),
    (None, ["nowhere"], "nowhere/config.json: No such file"),
    (None, ["task"], "task/config.json: No such file"),
    (None, ["bert"], "bert/config.json: has "),
    (None, [RUN, "--attacks", "hotflip"], "--attacks: invalid choice: 'hotflip'"),
    (None, [RUN, "--num-examples", "0"], "--num-examples: '0' has to be an integer of at least 1"),
    (None, [RUN, "--split", "train"], "--split: invalid choice: 'train'"),
    (None, [RUN, "--population", "1"], "--population: '1' has to be an integer of at least 2"),
    (None, [RUN, "--generations", "0"], "--generations: '0' has to be"),
    (None, [RUN, "--seed", "-1"], "--seed: '-1' has to be"),
    (None, [RUN, "--batch-size", "0"], "--batch-size: '0' has to be"),
    (None, [RUN, "--show", "x"], "--show: 'x' has to be an integer of at least 0"),
    (None, [RUN, "--precision", "fp8"], "--precision: invalid choice: 'fp8'"),
    (None, [RUN, "--device", "cuda:99"], "--device cuda:99: "),
    (None, [RUN, "--plot-attack", "all"], "--plot-attack: invalid choice: 'all'"),
    (None, [RUN, "--data-dir", "nowhere", "--attacks", "genetic", "--lm-constraint", "scores"], "no such folder"),
    (None, [RUN, "--attacks", "genetic", "--lm-constraint", "bert"], "--lm-constraint bert: is neither none, scores"),
    (None, [RUN, "--attacks", "genetic", "--lm-constraint", "task"], "--lm-constraint task: is neither none, scores"),
    (None, [RUN, "--neighbors", "nowhere.json", "--attacks", "pwws"], "nowhere.json: cannot be read"),
    (lambda: Path(RUN, "metrics.json").unlink(), [RUN], "the run is not finished (no metrics.json)"),
    (lambda: os.truncate(f"{RUN}/model.safetensors", 500), [RUN], "model.safetensors: not a readable checkpoint"),
    (changed(f"{RUN}/config.json", max_len=-5), [RUN], "longest input -5"),
    (changed(f"{RUN}/config.json", method="adv"), [RUN], "config.json has method adv, metrics.json standard"),
    (changed(f"{RUN}/config.json", unknown_words="skip"), [RUN], "unknown words 'skip'"),
    (changed(f"{RUN}/config.json", pooling="max"), [RUN], "pooling is 'max'"),
    (changed(f"{RUN}/config.json", task="gone"), [RUN], "unknown task 'gone'"),
    (changed(f"{RUN}/config.json", split_seed=-1), [RUN], "split seed -1"),
    (tsv(GOOD), [RUN], "was trained on other data than is found now"),
    (of_pairs, [RUN], "was trained on other data than is found now"),
    (file(f"{RUN}/neighbors.json", "3"), [RUN], "neighbors.json: wanted a JSON object"),
    (file(f"{RUN}/attacks.jsonl", "{}\n"), [RUN, "--attacks", "pwws"], "attacks.jsonl: there is no eval.json"),
    (lambda: shutil.rmtree(f"{RUN}/encoder"), [RUN], "runs/standard/encoder: no such folder"),
]


def refused(capsys, main, arguments, before):
    """The one line with which main(arguments) ends, exit code 2, no file changed."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr().err.replace("\r", "\n").splitlines()
    said = [line for line in said if line.strip() and "it/s]" not in line]          # but for progress bars
    assert stop.value.code == 2 and len(said) == 1, said
    after = files_of(Path())
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
            and not name.startswith("cache")} == set()
    return said[0]


@pytest.mark.parametrize("prepare, arguments, message", BAD_TRAIN, ids=[case[2][:50] for case in BAD_TRAIN])
def test_bad_input_to_training_is_one_line(here, capsys, prepare, arguments, message):
    if prepare:
        prepare()
    line = refused(capsys, train.main, [*TRAIN, *SMALL, *arguments], files_of(here))
    assert line.startswith("train.py: error: ") and message in line, line


@pytest.mark.parametrize("prepare, arguments, message", BAD_EVAL, ids=[case[2][:50] for case in BAD_EVAL])
def test_bad_input_to_evaluation_is_one_line(here, capsys, prepare, arguments, message):
    if prepare:
        prepare()
    line = refused(capsys, eval.main, [*arguments, "--device", "cpu"] if "--device" not in arguments else arguments,
                   files_of(here))
    assert line.startswith("eval.py: error: ") and message in line, line


@pytest.mark.parametrize("script, prepare, arguments, message", [
    ("train", None, ["--mixout", "1"], "--mixout: '1' has to be a number of at least 0 and at most 0.999"),
    ("train", tsv("text\tlabel\na\tb\n"), [], "task/train.tsv, line 1: "),
    ("train", file("mine/aclImdb_v1.tar.gz", b"<html>"), IMDB, "aclImdb_v1.tar.gz: cannot be read"),
    ("eval", None, ["task"], "task/config.json: No such file"),
    ("eval", file(f"{RUN}/config.json", "{"), [RUN], "runs/standard/config.json: is not JSON"),
])
def test_bad_input_to_a_command_is_one_line(here, script, prepare, arguments, message):
    if prepare:
        prepare()
    before = files_of(here)
    arguments = [*TRAIN, *SMALL, *arguments] if script == "train" else arguments
    done = subprocess.run([sys.executable, str(ROOT / f"{script}.py"), *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
    assert message in done.stderr and files_of(here) == before


# ------------------------------------------------------------------------------------------------ random input


PIECES = [*WORDS, "[SEP]", "[CLS]", "</s>", "<s>", "<mask>", "<pad>", "[unk]", "😀", "👩‍👩‍👧", "مرحبا", "你好", "\u0130",
          "don't", "...", "!?", "a" * 300, "<br />", "\x00",
          "\u200b", "\ud800", "\u2028", "\x85", "\xa0", "1e999", "nan",
          "-", "ﬁ", "[sep]"]
GAPS = [" ", " ", " ", "", "\t", "\n", "\r\n", "  ", "\x0b"]


def random_text(rng, most=12):
    def piece():
        return rng.choice([rng.choice(PIECES), rng.choice(WORDS), chr(rng.randrange(0x110000))])

    return "".join(piece() + rng.choice(GAPS) for _ in range(rng.randint(0, most)))


def mutated(rng, content):
    """Bytes with a few of them changed, cut out, doubled, or cut off."""
    content = bytearray(content)
    for _ in range(rng.randint(0, 3)):
        i = rng.randrange(len(content) + 1)
        j = min(len(content), i + rng.randint(1, 6))
        content[i:j] = rng.choice([b"", bytes(content[i:j]) * 2, rng.randbytes(1), b"\t", b"\n", b'"', b" nan",
                                   "é".encode()])
    return bytes(content[:rng.randint(0, len(content))] if rng.random() < 0.1 else content)


def either(load, *arguments):
    """load(*arguments), None where that raises InputError, in one line; anything else is raised."""
    try:
        return load(*arguments)
    except data.InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return None


def test_random_tsv_files_are_read_or_refused(tmp_path):
    rng, read = random.Random(0), 0
    (tmp_path / "test.tsv").write_text(GOOD)
    for n in range(1000):
        rows = [rng.choice(["neg", "pos", "so"]) + "\t" + random_text(rng) for _ in range(6)]
        content = "\n".join([rng.choice(["label\ttext"] * 3 + ["label\ttext\ttext2", ""]), *rows])
        content = (GOOD if n % 2 else content).encode("utf-8", "surrogatepass" if n % 3 else "replace")
        (tmp_path / "train.tsv").write_bytes(mutated(rng, content))
        if found := either(data.read_folder, tmp_path):
            read += 1
            labels, splits = found
            assert len(labels) >= 2 and sorted(set(labels)) == labels and all(label.strip() for label in labels)
            for texts, y in splits["train"] + splits["test"]:
                assert 0 <= y < len(labels) and len(texts) in (1, 2) and not any("\t" in t or "\n" in t for t in texts)
    assert 100 < read < 900


def test_random_tables_are_read_or_refused(tmp_path):
    rng, read = random.Random(1), 0
    for n in range(1000):
        table = {random_text(rng, 1): [random_text(rng, 1).strip() for _ in range(rng.randint(0, 3))] for _ in range(3)}
        table = TABLE if n % 2 else rng.choice([table, list(table), {"a": table}, n, None])
        content = json.dumps(table, ensure_ascii=n % 3 == 0).encode("utf-8", "replace")
        (tmp_path / "table.json").write_bytes(mutated(rng, content))
        found = either(data.read_neighbors, tmp_path / "table.json")
        if found is not None:
            read += 1
            for word in [*found, *(other for others in found.values() for other in others)]:
                assert word.split() == [word] == [word.lower()]
            assert not any("\ud800" in other for others in found.values() for other in others)
    assert 100 < read < 900


def test_random_vectors_are_read_or_refused(tmp_path):
    rng, read = random.Random(2), 0
    for n in range(1000):
        rows = [f"{word} " + " ".join(rng.choice(["1", "-0.5", "1e3", "1e308" if n % 5 == 0 else "2"]) for _ in "xyz")
                for word in rng.sample(WORDS, 4)]
        (tmp_path / "v.txt").write_bytes(mutated(rng, "\n".join(rows).encode()))
        found = either(data.read_vectors, tmp_path / "v.txt", set(WORDS))
        if found is not None:
            read += 1
            assert len({len(row) for row in found.values()}) <= 1
            assert all(np.isfinite(row).all() and len(row) for row in found.values())
    assert 100 < read < 900


def random_words(rng, most=12):
    return tuple(random_text(rng, most).encode("utf-8", "replace").decode().lower().split())


def test_words_come_back_and_none_is_a_special_token(model_folder):
    """Of random texts and pairs: strings and back, encoding, candidates, substitution."""
    rng = random.Random(3)
    _, tokenizer = eval.load_encoder(model_folder)
    words_of = str.split
    try:
        data.prepare_nltk(SHARED if SHARED.is_dir() else None)
        words_of = data.words_of
    except data.InputError:
        pass                                                # without NLTK's data, texts are split at white space
    for n in range(1200):
        vocabulary = data.Vocabulary(tokenizer, rng.randint(3, 34), {word: [*random_words(rng, 2), *TABLE.get(word, [])]
                                                                    for word in random_words(rng) + tuple(TABLE)},
                                     rng.choice(["piece", "unk"]), rng.randint(1, 12))
        special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        split = words_of if n % 3 else str.split            # a caller's own texts may be in capitals: [SEP]
        texts = [[random_text(rng, 30).encode("utf-8", "replace").decode() for _ in range(n % 2 + 1)] for _ in range(2)]
        batch = [tuple(tuple(split(text)) for text in pair) for pair in texts]
        out = {name: tensor.tolist() for name, tensor in vocabulary.encode(batch, hull=True).items()}
        for b, words in enumerate(batch):
            assert data.from_text(data.to_text(words)) == words
            seen, ids = vocabulary.visible(words), vocabulary.input_ids(words)
            assert len(ids) <= vocabulary.max_len and sum(out["attention_mask"][b]) == len(ids)
            assert ids == out["input_ids"][b][:len(ids)] == [subs[0] for subs in out["subs"][b][:len(ids)]]
            ends = np.cumsum([0] + [len(text) + 1 for text in seen]).tolist()       # [CLS], and [SEP] after each text
            assert [l for l, i in enumerate(ids) if i in special] == ends and len(ids) == ends[-1] + 1
            for l, (subs, mask) in enumerate(zip(out["subs"][b], out["subs_mask"][b])):
                assert sum(mask) == 1 or l < ends[-1] and not special & {i for i, real in zip(subs, mask) if real}
            choice = [rng.randrange(sum(mask)) for mask in out["subs_mask"][b]]
            *premise, new = vocabulary.substitute(words, choice)
            assert premise == list(seen[:-1]) and len(new) == len(seen[-1])
            assert all(v == w or v in vocabulary.neighbors[w] for v, w in zip(new, seen[-1]))


def test_attacks_on_random_texts_stay_in_their_table():
    """And find what they say, whatever the words; the victim is any function of the text."""
    rng = random.Random(4)

    def victim(texts):
        P = np.array([[1 + hash_of(text) % 7] for text in texts]) / 10
        return np.hstack([P, 1 - P])

    def hash_of(text):
        return sum(map(ord, "".join(text)))

    table = {word: list(dict.fromkeys(random_words(rng, 3))) for word in PIECES + WORDS}
    examples = []
    for n in range(300):
        words = " ".join(random_words(rng))
        examples.append((n, (" ".join(random_words(rng)), words) if n % 2 else words, n // 2 % 2))
    for method in (attacks.pwws, partial(attacks.genetic, population=3, generations=2)):
        results = {r.index: r for r in attacks.attack(victim, examples, method, table, progress=False)}
        assert len(results) == len(examples) and any(r.success for r in results.values())
        for n, text, y in examples:
            r = results[n]
            *premise, old = data.from_text(r.original)
            *kept, new = data.from_text(r.adversarial)
            assert r.original == text and kept == premise and len(old) == len(new)
            assert all(v == w or v in table[w] for v, w in zip(new, old))
            assert r.prediction == victim([r.adversarial])[0].argmax()
            assert r.success == (r.correct and r.prediction != y)
            assert r.words_changed == sum(v != w for v, w in zip(new, old)) and r.queries >= 1


# ------------------------------------------------------------------------------------------------ odd texts


ODD = ["", " ", "good", "...", "?!,;", "😀 👩‍👩‍👧 مرحبا 你好 नमस्ते", "[SEP] [CLS] good </s> <s> <mask> [MASK] <pad> [PAD]",
       "a\tgood\nmovie\r\n\x0bb", "zyxxyz qwrtp", "the the the", "very " * 100_000, "\u2028 \x00 \x7f é ﬁ İ",
       "good[SEP]movie </s></s>", "a" * 5000, "GOOD Movie", "<br /><br />"]


@pytest.mark.parametrize("pair", [False, True], ids=["texts", "pairs"])
def test_odd_texts_train_evaluate_and_are_attacked(model_folder, tmp_path, plain_words, monkeypatch, pair):
    """As training text and test text, as premise and hypothesis; special tokens stand at the ends of texts only."""
    rng = np.random.default_rng(0)
    if pair:
        labels, folder = ("entailment", "contradiction", "neutral"), tmp_path / "data" / "snli_1.0"
        folder.mkdir(parents=True)
        plain = lambda i: review(rng, i % 2)
        for split in ("train", "dev", "test"):
            pairs = [both for i, odd in enumerate(ODD) for both in ((odd, plain(i)), (plain(i), odd), (odd, odd))]
            rows = [{"gold_label": labels[i % 3], "sentence1": a, "sentence2": b} for i, (a, b) in enumerate(pairs)]
            (folder / f"snli_1.0_{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        for split in ("train", "test"):
            for c, label in enumerate(("neg", "pos")):
                folder = tmp_path / "data" / "aclImdb" / split / label
                folder.mkdir(parents=True)
                for i, odd in enumerate([*ODD, *(review(rng, c) for _ in range(8))]):
                    (folder / f"{i}_1.txt").write_bytes(odd.encode())
    (tmp_path / "table.json").write_text(json.dumps(TABLE | {"good": ["</s>", "[sep]", "great", "😀"], "...": ["?!"]}))
    encode, seen = data.Vocabulary.encode, []

    def checked(self, batch, hull=False):
        out = encode(self, batch, hull)
        for b, words in enumerate(batch):
            ids = out["input_ids"][b, :out["attention_mask"][b].sum()].tolist()
            ends = np.cumsum([0] + [len(text) + 1 for text in self.visible(words)]).tolist()
            special = set(self.tokenizer.all_special_ids) - {self.unk}
            assert [l for l, i in enumerate(ids) if i in special] == ends and len(ids) <= self.max_len
            seen.append(words)
            if hull:
                others = out["subs"][b, :, 1:][out["subs_mask"][b, :, 1:]].tolist()
                assert not special & set(others)
        return out

    monkeypatch.setattr(data.Vocabulary, "encode", checked)
    task = "snli" if pair else "imdb"
    train.main(["--task", task, "--data-dir", str(tmp_path / "data"), "--model", str(model_folder), "--neighbors",
                str(tmp_path / "table.json"), "--out", str(tmp_path / "runs"), *SMALL, "--epochs", "1",
                "--batch-size", "9"])
    run = tmp_path / "runs" / "rift"
    eval.main([str(run), "--attacks", "pwws", "genetic", "hull", "--lm-constraint", "none", "--population", "4",
               "--generations", "2", "--device", "cpu"])
    lines = [json.loads(line) for line in (run / "attacks.jsonl").read_text().splitlines()]
    assert {line["attack"] for line in lines} == {"pwws", "genetic", "hull"} and len(seen) > 100
    assert ((), ()) in seen if pair else ((),) in seen
    words = {word for texts in seen for text in texts for word in text}
    assert {"😀", "[sep]", "</s>", "...", "zyxxyz"} <= words


# ------------------------------------------------------------------------------------------------ at once


class Server(http.server.BaseHTTPRequestHandler):
    """Serves BODY, slowly: those who ask at once are answered at once."""
    meet = threading.Barrier(3)
    body = bytes(random.Random(0).randbytes(200_000))

    def do_GET(self):
        self.meet.wait(60)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args):
        pass


def locates(cache, url):
    os.environ["RIFT_CACHE"] = str(cache)
    data.RESOURCES["imdb"] = ("a.tar.gz", "a", url, None)
    assert data.locate("imdb").read_bytes() == Server.body


def test_processes_that_download_at_once_all_succeed(tmp_path):
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{httpd.server_address[1]}/a"
    assert children(locates, *[(tmp_path / "new", url)] * 3) == [0, 0, 0]
    httpd.shutdown()
    httpd.server_close()
    assert files_of(tmp_path) == {"new/a.tar.gz": Server.body}


def pretrains(cache, meeting):
    """Pre-trains for three steps, but starts only when the others have found the cache empty too."""
    torch.set_num_threads(1)
    os.environ["RIFT_CACHE"] = str(cache)
    real = train.pretrain_toy

    def together(folder):
        meeting.wait(60)
        real(folder, steps=3)
        meeting.wait(60)

    train.pretrain_toy = together
    encoder, _ = eval.load_encoder(train.toy_encoder())
    assert all(torch.isfinite(p).all() for p in encoder.parameters())


def test_processes_that_pretrain_at_once_all_succeed(tmp_path):
    meeting = SPAWN.Barrier(2)
    assert children(pretrains, *[(tmp_path / "cache", meeting)] * 2) == [0, 0]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["toy-encoder-1"]


def test_a_folder_that_another_process_was_quicker_to_make_stays(tmp_path):
    with data.replacing(tmp_path / "folder") as tmp:
        tmp.mkdir()
        (tmp / "a").write_text("second")
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "a").write_text("first")
    assert files_of(tmp_path) == {"folder/a": b"first"}


# ------------------------------------------------------------------------------------------------ disk full, read-only


STEP = [*TRAIN, *SMALL, "--save-minutes", "0", "--out", "full"]


@pytest.mark.parametrize("owner, name", [(os, "replace"), (Path, "write_bytes"), (PreTrainedModel, "save_pretrained")],
                         ids=["replace", "write", "encoder"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
def test_a_disk_that_is_full_is_one_line(here, unkilled, capsys, monkeypatch, owner, name, error):
    """While a checkpoint or the finished encoder is written: what was there stays, and --resume ends as it would."""
    real, calls, before = getattr(owner, name), [], {}

    def full(*args, **kwargs):
        calls.append("checkpoint" in str(args))
        if name == "save_pretrained" or calls[-1] and sum(calls) == 3:
            before.update(files_of(here / "full"))
            raise OSError(error, os.strerror(error))
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, full)
    with pytest.raises(SystemExit) as stop:
        train.main(STEP)
    said = capsys.readouterr().err.strip().replace("\r", "\n").splitlines()[-1].strip()
    assert stop.value.code == 2 and said.startswith("train.py: error: full/rift/") and os.strerror(error) in said
    assert "checkpoint.safetensors: cannot be written" in said or "encoder: cannot be written" in said
    after = files_of(here / "full")
    assert {k: v for k, v in before.items() if ".tmp" not in k} == after and "rift/checkpoint.safetensors" in after
    monkeypatch.setattr(owner, name, real)
    train.main([*STEP, "--resume"])
    assert outcome(here / "full" / "rift") == unkilled[0]


def test_a_folder_that_cannot_be_written_is_one_line(here, capsys, monkeypatch):
    """Also with --overwrite, before anything is deleted."""
    before = files_of(here / "runs")

    def read_only(self, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "unlink", read_only)
    monkeypatch.setattr(Path, "mkdir", read_only)
    for extra in (["--method", "standard", "--overwrite"], ["--out", "new"]):
        with pytest.raises(SystemExit) as stop:
            train.main([*TRAIN, *SMALL, *extra])
        assert stop.value.code == 2 and "cannot be written (Read-only" in capsys.readouterr().err.splitlines()[-1]
    assert files_of(here / "runs") == before and not (here / "new").exists()


# ------------------------------------------------------------------------------------------------ classes


def test_heavy_imbalance_and_a_label_missing_in_test_train_and_evaluate(here):
    """200 texts of one class, 4 of another, 3 of a third that neither dev nor test has: all batches are balanced."""
    rng = np.random.default_rng(0)
    counts = {"neg": 200, "pos": 4, "so": 3}
    rows = [f"{label}\t{review(rng, label == 'pos')}" for label, n in counts.items() for _ in range(n)]
    tsv("\n".join(["label\ttext", *rows]) + "\n")()
    for split in ("dev", "test"):
        tsv("label\ttext\n" + "neg\ta bad film\npos\ta good film\n" * 3, split)()
    batches, real = [], train.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", lambda training, batch, y, *rest: batches.append(y.tolist()) or
                      real(training, batch, y, *rest))
        train.main([*TRAIN, *SMALL, "--batch-size", "6", "--out", "odd"])
    assert batches and all(set(Counter(y).values()) == {2} and len(set(y)) == 3 for y in batches)
    eval.main(["odd/rift", "--attacks", "pwws", "hull", "--device", "cpu"])
    assert len(json.loads(Path("odd/rift/config.json").read_text())["labels"]) == 3


def test_more_processes_than_texts_of_a_class_are_refused(here, capsys, monkeypatch):
    """Instead of epochs without a single step."""
    real = train.Processes

    class Many(real):
        def __init__(self):
            super().__init__()
            self.world = 8

        def wrap(self, model):
            return model

        def wait(self):
            pass

        def mean(self, values):
            return values

    monkeypatch.setattr(train, "Processes", Many)
    with pytest.raises(SystemExit) as stop:
        train.main([*TRAIN, *SMALL, "--out", "many"])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "--batch-size 8: too small for 2 classes on 8 processes: each needs one text of every class" in said
