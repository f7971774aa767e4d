"""It keeps working: killed, stopped, fed with nonsense, out of disk space, or run twice at once.

A run killed with SIGKILL at any moment ends, after --resume, with the weights, the metrics and the
log of the run that was never killed. Bad input to train.py and eval.py is one line that says what
would be right, exit code 2, and no file is changed; what is cheap to check is checked before a text
is read. Random files are read or refused. Odd texts train, evaluate and are attacked. A full or
read-only disk is one line with the path, and what was there stays. Ctrl-C is one line. A log file
gets one line for each epoch and no progress bars.
"""
import errno
import json
import multiprocessing
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import PreTrainedModel

import data
import eval
import rift
import train
from tests.conftest import TABLE, review, save_model, write_task

ROOT = Path(__file__).parents[1]
TRAIN = """--task task --model bert --neighbors task/neighbors.json --out runs --epochs 2
    --batch-size 8 --max-len 16 --adv-steps 1 --lr 1e-3 --device cpu""".split()
KILLED = [*TRAIN, "--out", "killed", "--epochs", "3"]
RUN = "runs/standard"
FORKSERVER = multiprocessing.get_context("forkserver")  # its children need not import torch anew
FORKSERVER.set_forkserver_preload(["tests.test_robustness"])


def children(target, *arguments):
    """Runs target(*args) for each args, all at once, each in a process of its own: exit codes."""
    processes = [FORKSERVER.Process(target=target, args=args) for args in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]


def files_of(folder):
    """{path: content} of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def enter(folder):
    """What the fixtures do, for a child: its folder, its cache, one thread, words without NLTK."""
    torch.set_num_threads(1)                    # their number decides on the last bits
    os.chdir(folder)
    os.environ["RIFT_CACHE"] = str(folder / "cache")
    data.prepare_nltk = lambda *args, **kwargs: None
    data.words_of = lambda text: text.lower().split()


def make_base(folder):
    enter(folder)
    write_task(folder / "task")
    save_model(folder / "bert", "bert")
    train.main([*TRAIN, "--method", "standard", "--epochs", "1"])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a task, a model, and a finished run of one epoch: task, bert, runs/standard."""
    folder = tmp_path_factory.mktemp("base")
    assert children(make_base, (folder,)) == [0]
    return folder


@pytest.fixture
def here(base, tmp_path, monkeypatch, plain_words):
    """A copy of base, which is also the working directory."""
    shutil.copytree(base, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


# ---- Killed --------------------------------------------------------------------------------------

MOMENTS = [(rift, "objective"), (os, "replace"), (Path, "write_bytes"), (Path, "unlink"),
           (shutil, "rmtree"), (PreTrainedModel, "save_pretrained")]


def killed_at(n, folder, resume):
    """Trains, and is killed before its n-th step, writing, renaming or deletion; of a writing half
    of the bytes are there. Without a kill the number of these moments is left in the file count."""
    enter(folder)
    count = 0

    def counted(real, name):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == n:
                if name == "write_bytes":
                    real(args[0], args[1][:len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call

    for owner, name in MOMENTS:
        setattr(owner, name, counted(getattr(owner, name), name))
    train.main([*KILLED, *["--resume"] * resume])
    Path("count").write_text(str(count))


def outcome(run):
    """{file: content} of a run; of its log all but the time that each epoch took, of its settings
    all but where its texts were."""
    files = files_of(run)
    lines = map(json.loads, files["log.jsonl"].splitlines())
    config = json.loads(files["config.json"])
    config["settings"].pop("task")
    return files | {"log.jsonl": [line | {"seconds": 0} for line in lines], "config.json": config}


@pytest.fixture(scope="module")
def unkilled(base, tmp_path_factory):
    """What the run is that was never killed, and its number of moments."""
    folder = shutil.copytree(base, tmp_path_factory.mktemp("unkilled") / "here")
    assert children(killed_at, (0, folder, False)) == [0]
    return outcome(folder / "killed" / "rift"), int((folder / "count").read_text())


@pytest.mark.parametrize("draw", range(2))
def test_a_run_killed_at_random_ends_like_one_that_was_never_killed(base, unkilled, tmp_path, draw):
    """Killed three times, each time gone on with. Its epochs are the second half of its moments."""
    expected, total = unkilled
    folder, rng = shutil.copytree(base, tmp_path / "here"), random.Random(draw)
    moments = [rng.randint(total // 2, total), rng.randint(1, total // 2), rng.randint(1, 20)]
    for i, n in enumerate(moments):
        code, = children(killed_at, (n, folder, i > 0))
        assert code == -signal.SIGKILL or i and code == 0           # 0: less was left to do
    assert children(killed_at, (0, folder, True)) == [0]
    assert outcome(folder / "killed" / "rift") == expected


def test_a_run_killed_while_it_finishes_ends_like_one_that_was_never_killed(
        base, unkilled, tmp_path):
    """At each of its last moments, from half of the model to all but one of the deletions."""
    expected, total = unkilled
    last_epoch = shutil.copytree(base, tmp_path / "last-epoch")
    assert children(killed_at, (total - 11, last_epoch, False)) == [-signal.SIGKILL]
    assert (last_epoch / "killed" / "rift" / "best.safetensors").exists()
    whole = shutil.copytree(last_epoch, tmp_path / "whole")
    assert children(killed_at, (0, whole, True)) == [0]
    total = int((whole / "count").read_text())
    folders = {n: shutil.copytree(last_epoch, tmp_path / str(n))
               for n in range(total - 11, total + 1)}
    killed = children(killed_at, *[(n, folder, True) for n, folder in folders.items()])
    assert killed == [-signal.SIGKILL] * 12
    assert children(killed_at, *[(0, folder, True) for folder in folders.values()]) == [0] * 12
    for n, folder in folders.items():
        assert outcome(folder / "killed" / "rift") == expected, f"killed at {n} of {total}"


# ---- Ctrl-C --------------------------------------------------------------------------------------


@pytest.mark.parametrize("script, module", [("train.py", "torch"), ("eval.py", "numpy")])
def test_ctrl_c_during_the_imports_leaves_no_traceback(tmp_path, script, module):
    """As soon as the module is imported; Python itself says when that is."""
    process = subprocess.Popen([sys.executable, "-X", "importtime", ROOT / script], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
    while not process.stderr.readline().endswith(f" {module}\n"):
        pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    said = [line for line in err.splitlines() if line and not line.startswith("import time:")]
    assert process.returncode == -signal.SIGINT and not said and not out


def test_a_log_file_has_a_line_for_each_epoch_and_no_carriage_returns(here, capfd):
    """Standard error is a file here, as on a cluster."""
    train.main([*TRAIN, "--method", "adv", "rift"])
    eval.main(["runs/adv", "--attacks", "pwws", "hull"])
    out, err = capfd.readouterr()
    starts = [f"{method} seed 0: epoch {epoch} " for method in ("adv", "rift") for epoch in (1, 2)]
    starts += ["runs/adv: pwws ", "runs/adv: hull "]
    assert out.startswith("runs/adv: trains on ")
    assert "\r" not in out + err and len(err.splitlines()) == len(starts), err
    assert all(line.startswith(start) for line, start in zip(err.splitlines(), starts)), err


# ---- Bad input -----------------------------------------------------------------------------------

GOOD = "label\ttext\n" + "neg\ta bad film\npos\ta good film\n" * 9


def changed(part=None, **values):
    """A change of a JSON file, or of a part of it: its content, bytes -> the new one."""
    def change(content):
        whole = json.loads(content)
        (whole[part] if part else whole).update(values)
        return json.dumps(whole)
    return change


def without(name):
    """A change of a .safetensors file: it loses the tensors whose names start like this."""
    def change(content):
        tensors = safetensors.torch.load(content)
        kept = {key: p for key, p in tensors.items() if not key.startswith(name)}
        return safetensors.torch.save(kept, {"about": "{}", "format": "pt"})
    return change


WEIGHTS, CONFIG, MODEL = "bert/model.safetensors", f"{RUN}/config.json", f"{RUN}/model.safetensors"
LOG, METRICS, TABLE_FILE = f"{RUN}/log.jsonl", f"{RUN}/metrics.json", f"{RUN}/neighbors.json"
# Each row: files that are written first (None: deleted, a function: changed), arguments besides
# TRAIN or RUN, and what the one line has to say.
BEFORE_TEXTS_ARE_READ = [
    ({}, "--task imbd", "--task imbd: no such folder, and not toy, imdb or snli"),
    ({}, "--task toy --model bert", "--model bert: the toy task has an encoder"),
    ({}, "--neighbors tabel.json", "neighbour table tabel.json: no such file here"),
    ({}, f"--model {RUN}", f"model {RUN}: is a run, whose model is {RUN}/encoder"),
    ({}, "--model task", "model task: has no config.json, wanted the folder of a BERT or RoB"),
    ({}, "--task imdb --data-dir nowhere", "nowhere: no such folder (--data-dir"),
    ({}, "--max-len 600", "model bert: has positions for 34 tokens, --max-len is 600"),
    ({}, "--method standard", f"{RUN}: holds a run already; --resume goes on with it, --ov"),
    ({CONFIG: changed("settings", task="imdb")}, "--method standard", "(it is a run on imdb)"),
    ({"taken": ""}, "--out taken/below", "taken/below/rift"),
    ({}, "--resume --overwrite", "--resume and --overwrite: only one of them"),
    ({}, "--device cuda:99", "--device cuda:99: not on this machine"),
    ({}, "--seeds 9999999999", "has to be an integer of at least 0 and at most 4"),
    ({}, "--lr 1e999", "--lr: '1e999' has to be a number above 0"),
    ({}, f"--epochs 1{'0' * 400}", "has to be an integer of at least 1"),
    ({WEIGHTS: lambda content: content[:999]}, "", "model bert: cannot be loaded"),
    ({WEIGHTS: "version https://git-lfs\n"}, "", f"{WEIGHTS}: is a Git LFS pointer, not the wei"),
    ({WEIGHTS: None, "bert/pytorch_model.bin": ""}, "", "has only pytorch_model.bin, which can ru"),
    ({}, "--data-dir ~nobody-here", "~nobody-here: no such folder"),
    ({"bert/config.json": changed(model_type="deberta")}, "", "has model_type 'deberta', wanted"),
    ({"bert/config.json": changed(hidden_size=32)}, "", "37 tensors are missing or of the wrong"),
    ({WEIGHTS: without("encoder.layer.1.")}, "", "16 tensors are missing or of the wrong shape"),
    ({}, "--model ./nowhere", "model ./nowhere: no such folder"),
    ({}, "--model a/b/c", "model a/b/c: no such folder"),
    ({"bert/config.json": changed(pad_token_id=3)}, "", "the tokenizer is another model's"),
    ({"bert/tokenizer.json": "{"}, "", "the files of its tokenizer are missing or damaged"),
    ({"bert/tokenizer.json": None, "bert/vocab.txt": None}, "", "its tokenizer knows none of the"),
]
BAD_TRAIN = [
    ({}, "--dev-size 2 --out new/runs", "--dev-size: dev has 2 texts, wanted at least 4"),
    ({"mine/aclImdb/x": ""}, "--task imdb --data-dir mine", "holds no aclImdb/train/neg/*.txt"),
    ({}, "--method standard --resume",
     "the run in it was started with epochs 1, and goes on with the same only, not 2"),
    ({f"task/{split}.tsv": GOOD + "so\ta film\n" * 9 for split in ("train", "dev", "test")},
     "--batch-size 5", "--batch-size 5: wanted at least 6, two texts of each of 3 classes"),
    ({"task/neighbors.json": "{}"}, "", "task/neighbors.json: has no synonym for any word of the"),
]
BAD_EVAL = [
    ({}, "--attacks hotflip", "invalid choice: 'hotflip'"),
    ({}, "--num 3", "unrecognized arguments: --num 3"),
    ({}, "--attacks genetic --lm-constraint scores --data-dir /nowhere", "/nowhere: "),
    ({}, "--csv texts.csv", "--csv writes what --attacks found: which attacks?"),
    ({}, "--attacks pwws --csv task", "task: wanted the name of a file"),
    ({}, "--plot no/figure.png", "no/figure.png: wanted the name of a file in a folder that"),
    ({}, "--attacks exhaustive", "--attacks exhaustive tries every combination of swaps"),
    ({}, "--attacks genetic --lm-constraint bert", "lm-constraint bert: neither none, scores nor"),
    ({}, "--attacks pwws --plot figure.docx", "figure.docx: wanted one of the formats "),
    ({}, "--attacks pwws --plot x.pgf", "x.pgf: wanted one of the formats "),
    ({}, "--plot x.png --plot-attack genetic", "on test was without genetic: first run eval.py"),
    ({}, "--attacks pwws --plot x.png --plot-attack genetic", "name it among --attacks as well"),
    ({RUN: None}, "", f"{RUN}: not a run of train.py, no such folder"),
    ({CONFIG: None}, "", f"{RUN}: not a run of train.py, it has no config.json"),
    ({CONFIG: "{}"}, "", f"{CONFIG}: is not that of a run of train.py"),
    ({CONFIG: changed("settings", max_len=512)}, "", "positions for 34 tokens, --max-len is 512"),
    ({CONFIG: changed("settings", train_size=8)}, "", f"{RUN}: was trained on other data than is"),
    ({CONFIG: changed("settings", method="own")}, "", "its method own is not in rift.METHODS"),
    ({}, "runs/../runs/standard --attacks pwws", f"the settings and the seed of {RUN};"),
    ({}, "--task nowhere", "nowhere is not there; --task FOLDER says where it is now"),
    ({CONFIG: changed("settings", task="imdb")}, "--task task", "but these runs are on imdb"),
    ({LOG: "[1]\n"}, "--plot x.png", f"{LOG}, line 1: {data.NOT_OURS}"),
    ({LOG: None}, "--plot x.png", f"{LOG}: lacks epoch 1, the kept one"),
    ({f"{RUN}/attacks.jsonl": "[]\n"}, "--attacks pwws", f"jsonl, line 1: {data.NOT_OURS}"),
    ({f"{RUN}/eval.json": '{"settings": 3}'}, "--plot x.png --plot-attack pwws", "without pwws"),
    ({CONFIG: changed(labels=["neg", "pos", "so"])}, "", f"{MODEL}: of another run, or damaged"),
    ({MODEL: without("g.0.0.weight")}, "", "of another run, or damaged, see g.0.0.weight"),
    ({MODEL: without("h.1.2.bias")}, "", "of another run, or damaged, see h.1.2.bias"),
    ({f"{RUN}/encoder/model.safetensors": without("pooler.")}, "", "encoder: 2 tensors are miss"),
    ({MODEL: lambda content: content[:9000]}, "", f"{MODEL}: {data.NOT_OURS}"),
    ({METRICS: None}, "", f"{RUN}: the run is not finished; train.py --resume goes"),
    ({TABLE_FILE: None}, "", f"{TABLE_FILE}: cannot be read"),
    ({TABLE_FILE: "{}"}, "", f"{TABLE_FILE}: is not the table that the run"),
    ({f"{RUN}/encoder": None}, "", f"{RUN}/encoder: no such folder"),
    ({f"{RUN}/eval.json": '{"cle'}, "", f"{RUN}/eval.json: {data.NOT_OURS}"),
]


def prepare(files):
    for path, content in zip(map(Path, files), files.values()):
        content = content(path.read_bytes()) if callable(content) else content
        data.remove(path)
        if content is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


def refused(capsys, main, arguments):
    """The one line with which main(arguments) ends, exit code 2; no file was changed."""
    before = files_of(Path())
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and len(err.splitlines()) == 1 and out == "", err
    assert files_of(Path()) == before and err.startswith(f"{main.__module__}.py: error: "), err
    return err


def each_of(rows):
    return pytest.mark.parametrize("files, arguments, message", rows, ids=[x[2][:50] for x in rows])


@each_of(BEFORE_TEXTS_ARE_READ)
def test_what_is_cheap_to_check_is_one_line_before_a_text_is_read(
        here, capsys, monkeypatch, files, arguments, message):
    monkeypatch.setattr(data, "load_task", lambda *_, **__: pytest.fail("texts were read"))
    prepare(files)
    assert message in refused(capsys, train.main, [*TRAIN, *arguments.split()])


@each_of(BAD_TRAIN)
def test_bad_input_to_training_is_one_line_before_the_teacher_reads(
        here, capsys, monkeypatch, files, arguments, message):
    monkeypatch.setattr(eval.Victim, "features", lambda *_, **__: pytest.fail("texts were read"))
    prepare(files)
    assert message in refused(capsys, train.main, [*TRAIN, *arguments.split()])
    assert not Path("new").exists()                             # no empty folder is left


@each_of(BAD_EVAL)
def test_bad_input_to_evaluation_is_one_line(here, capsys, files, arguments, message):
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    prepare(files)
    assert message in refused(capsys, eval.main, [RUN, *arguments.split(), "--num-examples", "4"])


def test_the_data_of_all_runs_are_looked_for_before_the_first_attack(here, capsys):
    shutil.copytree(RUN, "runs/other")
    for change in (changed("settings", task="gone"), changed("fingerprints", data="others")):
        prepare({"runs/other/config.json": change})
    arguments = [RUN, "runs/other", "--attacks", "pwws", "--num-examples", "4"]
    error = refused(capsys, eval.main, arguments)
    assert "runs/other: its data folder" in error and "gone is not there" in error


def test_without_matplotlib_it_is_one_line(here, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in refused(capsys, eval.main, [RUN, "--plot", "figure.png"])


def as_script(name, *arguments):
    sys.argv = [name, *arguments]
    runpy.run_path(str(ROOT / name), run_name="__main__")


def test_bad_input_to_a_command_is_one_line(here):
    """Also in a process of its own, where libraries print what they like."""
    ended = subprocess.run([sys.executable, ROOT / "train.py", *TRAIN, "--max-len", "600"],
                           text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said, = ended.stdout.splitlines()
    assert ended.returncode == 2 and said.startswith("train.py: error: ")
    assert children(as_script, ("eval.py", "bert")) == [2]


# ---- Random files --------------------------------------------------------------------------------

ODD = ["", " ", "good", "...", "?!,;", "😀 👩‍👩‍👧 مرحبا 你好 नमस्ते", "a\tgood\nmovie\r\n\x0bb",
       "zyxxyz qwrtp", "[SEP] [CLS] good </s> <s> <mask> [MASK] <pad> [PAD]", "the the the",
       "\u2028 \x00 \x7f \x85 \xa0 \u200b é ﬁ İ", "good[SEP]movie </s></s>", "a" * 5000,
       "GOOD Movie", "<br /><br />", "nan - 1e999"]


def mutated(rng, content):
    """Bytes of which a few are replaced, cut out, or doubled; some are cut off."""
    content = bytearray(content)
    for _ in range(rng.randint(0, 3)):
        i = rng.randrange(len(content) + 1)
        j = min(len(content), i + rng.randint(0, 6))
        odd = rng.choice([*ODD, "\t", "\n", '"', "\\ud800"]).encode()
        content[i:j] = rng.choice([b"", content[i:j] * 2, rng.randbytes(1), odd])
    return bytes(content[:rng.randint(0, len(content))] if rng.random() < 0.1 else content)


def test_random_files_are_read_or_refused(tmp_path):
    """What is read has two labels or more, and texts without tabs and line breaks."""
    rng, refusals = random.Random(0), 0
    (tmp_path / "test.tsv").write_text(GOOD)
    for _ in range(300):
        (tmp_path / "train.tsv").write_bytes(mutated(rng, GOOD.encode()))
        try:
            labels, splits = data.read_folder(tmp_path)
        except data.InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            refusals += 1
            continue
        assert len(labels) >= 2 and sorted(set(labels)) == labels and all(map(str.strip, labels))
        for texts, y in splits["train"]:
            assert 0 <= y < len(labels) and len(texts) in (1, 2)
            assert not any("\t" in text or "\n" in text for text in texts)
    assert 30 < refusals < 270, refusals


# ---- Odd texts -----------------------------------------------------------------------------------


def write_odd(folder):
    """The archives' folders with odd texts: reviews; or premises, hypotheses and both."""
    rng, odd, files = np.random.default_rng(0), [*ODD, "very " * 100_000], {}
    for split in ("train", "dev", "test"):
        for y, label in enumerate(["neg", "pos"]):
            texts = [*odd, *(review(rng, y) for _ in range(8))]
            files |= {f"aclImdb/{split}/{label}/{i}.txt": text for i, text in enumerate(texts)}
        pairs = [pair for text in odd for pair in (
            (text, review(rng, 0)), (review(rng, 1), text), (text, text))]
        labels = ["entailment", "contradiction", "neutral"] * len(odd)
        files[f"snli_1.0/snli_1.0_{split}.jsonl"] = "\n".join(
            json.dumps({"gold_label": label, "sentence1": a, "sentence2": b})
            for label, (a, b) in zip(labels, pairs))
    prepare({folder / name: content for name, content in files.items()})


def test_odd_texts_train_evaluate_and_are_attacked(model_folder, tmp_path, monkeypatch,
                                                   plain_words):
    """Reviews are read by BERT, pairs by RoBERTa."""
    monkeypatch.chdir(tmp_path)
    write_odd(Path("data"))
    task = {"bert": "imdb", "roberta": "snli"}[model_folder.name]
    odd_table = TABLE | {"good": ["</s>", "[sep]", "great", "😀"], "...": ["?!"]}
    data.write_json(Path("table.json"), odd_table)
    more = f"--task {task} --data-dir data --model {model_folder} --neighbors table.json --epochs 1"
    train.main([*TRAIN, *more.split(), "--batch-size", "9"])
    run = Path("runs/rift").absolute()
    monkeypatch.chdir(model_folder)                 # from another folder it finds its data as well
    eval.main([str(run), *"--attacks pwws genetic hull --lm-constraint none --population 2 "
               "--generations 2".split()])
    attacked = {line["attack"] for line in data.read_lines(run / "attacks.jsonl")}
    assert attacked == {"pwws", "genetic", "hull"}
    seen = [x.words for x in data.open_task(eval.settings_of(run)[0]).train]
    assert (((), ()) if task == "snli" else ((),)) in seen
    words = {word for texts in seen for text in texts for word in text}
    assert {"😀", "[sep]", "</s>", "...", "zyxxyz"} <= words


def test_rare_classes_and_one_that_dev_and_test_lack_train_and_evaluate(here):
    """200, 4 and 3 texts of a class in train; dev and test have none of the third."""
    rng, counts = np.random.default_rng(0), {"neg": 200, "pos": 4, "so": 3}
    rows = [f"{label}\t{review(rng, label == 'pos')}\n" for label in counts
            for _ in range(counts[label])]
    prepare({"task/train.tsv": "".join(["label\ttext\n", *rows]),
             "task/dev.tsv": GOOD, "task/test.tsv": GOOD})
    train.main([*TRAIN, "--batch-size", "6", "--out", "rare"])
    eval.main(["rare/rift", "--attacks", "pwws", "hull"])
    assert data.read_json("rare/rift/eval.json").keys() >= {"clean", "pwws", "hull"}


# ---- Several at once -----------------------------------------------------------------------------


def fills_the_cache(folder, meeting):
    """Makes the toy encoder, when the other process has found the cache empty too."""
    enter(folder)
    pretrain = train.pretrain_toy

    def together(new):
        meeting.wait(60)
        pretrain(new, steps=3)
        meeting.wait(60)                        # the encoder is renamed only after this

    train.pretrain_toy = together
    encoder, _ = data.load_encoder(train.toy_encoder())
    assert all(torch.isfinite(p).all() for p in encoder.parameters())


def test_processes_that_fill_the_cache_at_once_all_succeed(tmp_path):
    meeting = FORKSERVER.Barrier(2)
    assert children(fills_the_cache, *[(tmp_path, meeting)] * 2) == [0, 0]
    there, = (tmp_path / "cache").iterdir()
    assert there.match("toy-encoder-*")


# ---- Full and read-only disks --------------------------------------------------------------------


@pytest.mark.parametrize("name, nth", [
    ("checkpoint.safetensors", 2), ("best.safetensors", 2), ("encoder", 1)])
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(here, unkilled, capsys, monkeypatch,
                                                           name, nth):
    """The system stops the n-th writing of this file after 10 bytes. What is there stays; the best
    weights are written twice, then those in the checkpoint have to do."""
    replacing, limits = data.replacing, resource.getrlimit(resource.RLIMIT_FSIZE)
    times, before = [], {}

    @contextmanager
    def full(path):
        with replacing(path) as tmp:
            times.extend([path] * (path.name == name))
            if path.name == name and len(times) == nth:
                before.update(files_of(here))
                resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
            try:
                yield tmp
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(data, "replacing", full)
    with pytest.raises(SystemExit) as stop:
        train.main(KILLED)
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and files_of(here) == before
    assert line == f"train.py: error: killed/rift/{name}: cannot be written (File too large)"
    monkeypatch.setattr(data, "replacing", replacing)
    train.main([*KILLED, "--resume"])
    assert outcome(here / "killed" / "rift") == unkilled[0]


def test_a_read_only_disk_is_one_line_before_a_text_is_read(here, capsys, monkeypatch):
    """And before anything is deleted."""
    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(data, "load_task", lambda *_, **__: pytest.fail("texts were read"))
    for name in ("mkdir", "unlink", "write_bytes"):
        monkeypatch.setattr(Path, name, read_only)
    line = refused(capsys, train.main, [*TRAIN, "--method", "standard", "--overwrite"])
    assert f"error: {RUN}" in line and "cannot be written (Read-only file system)" in line
