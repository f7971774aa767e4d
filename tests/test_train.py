"""Training, from a command line to a run's folder (train.py).

Every method trains BERT and RoBERTa on texts and on pairs, two classes and three, and leaves a run that loads again to
the same predictions. A step has the losses and gradients of the plain formulation. Two runs with one seed are equal bit
for bit; a run that was stopped at any step ends like the one that was not. The epoch is chosen on dev. Bad input is one
line and exit code 2, and writes nothing.
"""
import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import AutoModel

import data
import eval
import rift
import train
from tests import benchmark
from tests.conftest import save_model, write_task

SMALL = ["--epochs", "2", "--batch-size", "8", "--max-len", "16", "--adv-steps", "2", "--lr", "1e-3", "--device", "cpu"]


def arguments(task, model, out, *more):
    return ["--task", str(task), "--model", str(model), "--neighbors", str(task / "neighbors.json"), "--out", str(out), *SMALL,
            *map(str, more)]


def weights(folder):
    """All tensors that a finished run keeps."""
    return {**safetensors.torch.load_file(folder / "encoder" / "model.safetensors"),
            **safetensors.torch.load_file(folder / "model.safetensors")}


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def log_of(folder):
    """log.jsonl without the time that each epoch took."""
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("bert"), "bert")


# ------------------------------------------------------------------------------------------------ what a run is


@pytest.mark.parametrize("labels, pair", [(("neg", "pos"), False), (("no", "so", "yes"), True)])
def test_every_method_trains_and_its_run_loads(plain_words, model_folder, tmp_path, labels, pair):
    task = write_task(tmp_path / "task", labels, pair=pair)
    train.main(arguments(task, model_folder, tmp_path / "runs", "--batch-size", 9, "--method", *train.METHODS))
    for method in train.METHODS:
        folder = tmp_path / "runs" / method
        log, metrics = log_of(folder), json.loads((folder / "metrics.json").read_text())
        terms = {"ce", *train.METHODS[method]} - {"mixout"}
        assert [line["epoch"] for line in log] == [0, 1]
        for line in log:
            assert terms | {"loss", "dev_clean", "dev_hull", "params_l2", "cka", "lr"} == line.keys() - {"epoch"}
        assert metrics["method"] == method and 0 <= metrics["hull"] <= 1
        assert not list(folder.glob("*.tmp")) and not (folder / "checkpoint.safetensors").exists()
        victim = eval.load_run(folder)
        text = ("this movie is it", "a plot was very nice") if pair else "a plot was very nice"
        P = victim([text, text])
        assert P.shape == (2, len(labels)) and np.allclose(P.sum(1), 1, atol=1e-5) and np.array_equal(P[0], P[1])
        assert AutoModel.from_pretrained(folder / "encoder").config.hidden_size == 16
        examples = eval.open_task(victim.config["settings"]).test
        again = eval.accuracy(victim([data.to_text(x.words) for x in examples]).argmax(-1), examples)
        assert again == metrics["clean"]                             # what was measured is what was saved


def test_adv_is_rift_without_information(plain_words, bert, tmp_path):
    """With alpha 0 and the same seed, rift makes the encoder and head of adv, to the last bits."""
    task = write_task(tmp_path / "task")
    train.main(arguments(task, bert, tmp_path / "runs", "--method", "adv", "rift", "--alpha", 0, "--weight-decay", 0))
    adv, rift_ = weights(tmp_path / "runs" / "adv"), weights(tmp_path / "runs" / "rift")
    for name in adv:
        if name[0] not in "gh" or name.startswith("head"):
            assert torch.allclose(adv[name], rift_[name], atol=1e-6), name


def test_the_loss_is_the_weighted_sum(plain_words, bert, tmp_path):
    """loss = ce + beta * kl + alpha * info, and the schedule is lr * 0.1 and lr * 0.55 in the first two epochs."""
    task = write_task(tmp_path / "task")
    train.main(arguments(task, bert, tmp_path / "runs", "--beta", 3, "--alpha", 0.5))
    for line, factor in zip(log_of(tmp_path / "runs" / "rift"), (0.1, 0.55)):
        assert line["loss"] == pytest.approx(line["ce"] + 3 * line["kl"] + 0.5 * line["info"], rel=1e-6)
        assert line["lr"] == pytest.approx(1e-3 * factor)


def test_the_best_epoch_on_dev_is_kept(plain_words, bert, tmp_path):
    """A run of 4 epochs whose best is epoch b ends with the weights that a run of b + 1 epochs ends with."""
    task = write_task(tmp_path / "task")
    train.main(arguments(task, bert, tmp_path / "long", "--method", "standard", "--epochs", 4))
    log = log_of(tmp_path / "long" / "standard")
    best = json.loads((tmp_path / "long" / "standard" / "metrics.json").read_text())["best_epoch"]
    assert best == int(np.argmax([line["dev_hull"] for line in log]))
    train.main(arguments(task, bert, tmp_path / "short", "--method", "standard", "--epochs", best + 1))
    assert same_weights(tmp_path / "long" / "standard", tmp_path / "short" / "standard")


def test_the_encoder_is_not_decayed_and_the_head_is(bert):
    """Section 1: weight decay 2e-4 on head and projections, biases included, none on the encoder; no teacher."""
    encoder, _ = eval.load_encoder(bert)
    model = rift.RIFT(encoder, 2)
    s = {"weight_decay": 2e-4, "lr": 1e-3, "adam_eps": 1e-6}
    groups = train.Training(model, s, train.Processes()).adamw.param_groups
    own = [*model.head.parameters(), *model.g.parameters(), *model.h.parameters()]
    assert [g["weight_decay"] for g in groups] == [0.0, 2e-4] and all(g["eps"] == 1e-6 for g in groups)
    assert {id(p) for p in groups[0]["params"]} == {id(p) for p in encoder.parameters()}
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in own}


def test_gradients_of_slices_add_up(plain_words, bert, tmp_path):
    """Without dropout, L_info and an adversary, a batch in slices is the batch: the same weights but for rounding."""
    task = write_task(tmp_path / "task")
    config = json.loads((bert / "config.json").read_text())
    shutil.copytree(bert, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(
        config | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}))
    common = arguments(task, tmp_path / "model", tmp_path / "whole", "--method", "standard", "--epochs", 1)
    train.main(common)
    train.main([*common, "--out", str(tmp_path / "slices"), "--micro-batch-size", "4"])
    a, b = weights(tmp_path / "whole" / "standard"), weights(tmp_path / "slices" / "standard")
    assert all(torch.allclose(a[k], b[k], atol=2e-5) for k in a)
    y = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    parts = train.slices(y, 4)
    assert [y[p].tolist() for p in parts] == [[0, 0, 1, 1]] * 2       # every slice has every class equally often
    assert sorted(torch.cat(parts).tolist()) == list(range(8))


# ------------------------------------------------------------------------------------------------ repeatable


@pytest.mark.parametrize("name", ["imdb", "snli"])
def test_a_step_is_the_plain_formulations(name):
    """All that makes a step fast is exact: losses and gradients are those of the benchmark's baseline, which is written
    line by line as the paper has it, step by step in float32, and in float64 to a millionth of the benchmark's tolerances."""
    args = benchmark.parse(["train", "--batches", "2", "--batch-size", "6", "--adv-steps", "2", "--device", "cpu"])
    bench = benchmark.Bench(args)
    bench.table = {word: others[:i % 9] for i, (word, others) in enumerate(bench.table.items())}     # from none to eight
    found = benchmark.training(bench, name)[f"train/{name}/fp32"]
    assert found["by_step"] and found["float64"]


def test_one_seed_one_result(plain_words, bert, tmp_path):
    task = write_task(tmp_path / "task")
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        train.main(arguments(task, bert, tmp_path / out, "--seeds", seed))
    assert same_weights(tmp_path / "a" / "rift", tmp_path / "b" / "rift")
    assert log_of(tmp_path / "a" / "rift") == log_of(tmp_path / "b" / "rift")
    assert not same_weights(tmp_path / "a" / "rift", tmp_path / "c" / "rift")


@pytest.mark.parametrize("method", ["rift", "adv-mixout"])
@pytest.mark.parametrize("stops", [[0], [3, 5], [4], [1, 2, 6]])
def test_a_stopped_run_ends_like_one_that_was_not(plain_words, bert, tmp_path, monkeypatch, method, stops):
    """Stopped before any of its 8 steps (4 an epoch), each time gone on with --resume: bit for bit the same end."""
    task = write_task(tmp_path / "task")
    train.main(arguments(task, bert, tmp_path / "whole", "--method", method))
    step, real, left = [0], train.train_step, list(stops)

    def interrupted(training, *args):
        if left and training.progress["step"] == left[0]:
            left.pop(0)
            raise KeyboardInterrupt
        return real(training, *args)

    monkeypatch.setattr(train, "train_step", interrupted)
    for i in range(len(stops)):
        with pytest.raises(SystemExit) as stop:
            train.main(arguments(task, bert, tmp_path / "parts", "--method", method, *["--resume"] * (i > 0)))
        assert stop.value.code == 130
    train.main(arguments(task, bert, tmp_path / "parts", "--method", method, "--resume"))
    whole, parts = tmp_path / "whole" / method, tmp_path / "parts" / method
    assert same_weights(whole, parts) and log_of(whole) == log_of(parts)
    assert (whole / "metrics.json").read_text() == (parts / "metrics.json").read_text()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_last_epoch_is_heard(plain_words, bert, tmp_path, monkeypatch, capsys, signum):
    """Ctrl-C while dev is measured after the last step: the run stops before it is finished, says how to go on, and the
    next method does not start; gone on with, it ends."""
    task, real = write_task(tmp_path / "task"), train.accuracies
    command = arguments(task, bert, tmp_path / "runs", "--epochs", 1, "--method", "standard", "adv")
    monkeypatch.setattr(train, "accuracies", lambda *args, **how: os.kill(os.getpid(), signum) or real(*args, **how))
    with pytest.raises(SystemExit) as stop:
        train.main([*command, "--overwrite"])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 130 and said.endswith("--resume") and "--overwrite" not in said
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["standard"]
    assert not (tmp_path / "runs" / "standard" / "metrics.json").exists()
    monkeypatch.setattr(train, "accuracies", real)
    train.main([*command, "--resume"])
    assert (tmp_path / "runs" / "adv" / "metrics.json").exists()


def test_several_methods_and_seeds_see_the_same_texts(plain_words, bert, tmp_path):
    """Each run has its folder, one data fingerprint, and a finished run is left alone by --resume."""
    task = write_task(tmp_path / "task", dev=False)
    common = arguments(task, bert, tmp_path / "runs", "--method", "standard", "adv", "--seeds", 0, 1, "--train-size", 8)
    train.main(common)
    folders = [tmp_path / "runs" / f"{m}-{s}" for m in ("standard", "adv") for s in (0, 1)]
    assert len({json.loads((f / "config.json").read_text())["fingerprints"]["data"] for f in folders}) == 1
    before = [(f / "metrics.json").stat().st_mtime_ns for f in folders]
    train.main([*common, "--resume"])
    assert before == [(f / "metrics.json").stat().st_mtime_ns for f in folders]


# ------------------------------------------------------------------------------------------------ bad input


BAD = [
    (["--task", "imbd"], "--task imbd: has to be toy, imdb, snli"),
    (["--method", "rfit"], "invalid choice: 'rfit'"),
    (["--model", "/nowhere"], "model /nowhere"),
    (["--max-len", "35"], "--max-len 35: .* positions for 34 tokens"),
    (["--max-len", "3"], "--max-len: '3' has to be an integer of at least 4"),
    (["--alpha", "-0.1"], "--alpha: '-0.1' has to be a number of at least 0"),
    (["--alpha", "nan"], "--alpha: 'nan' has to be a number"),
    (["--beta", "-1"], "--beta: '-1' has to be"),
    (["--beta", "inf"], "--beta: 'inf' has to be"),
    (["--tau", "0"], "--tau: '0' has to be a number above 0"),
    (["--lr", "0"], "--lr: '0' has to be a number above 0"),
    (["--lr", "fast"], "--lr: 'fast' has to be a number"),
    (["--adv-steps", "-1"], "--adv-steps: '-1' has to be an integer of at least 0"),
    (["--adv-steps", "2.5"], "--adv-steps: '2.5' has to be an integer"),
    (["--mixout", "1"], "--mixout: '1' has to be a number of at least 0 and at most 0.999"),
    (["--epochs", "0"], "--epochs: '0' has to be an integer of at least 1"),
    (["--batch-size", "3"], "batches of 3 from classes of"),
    (["--train-size", "1000"], "train: 1000 examples are 500 of each class, wanted 1 to"),
    (["--train-size", "1"], "train: 1 examples are 0 of each class"),
    (["--test-size", "999"], "test: 999 examples are 499 of each class"),
    (["--seeds", "-1"], "--seeds: '-1' has to be an integer of at least 0"),
    (["--precision", "fp16"], "invalid choice: 'fp16'"),
    (["--device", "warp"], "--device warp"),
    (["--neighbors", "/nowhere.json"], "/nowhere.json: cannot be read"),
    (["--neighbors", "table.csv"], "table.csv: wanted"),
    (["--resume", "--overwrite"], "--resume and --overwrite: only one"),
    (["--learning-rate", "1"], "unrecognized arguments: --learning-rate 1"),
]


@pytest.mark.parametrize("extra, message", BAD, ids=[" ".join(extra) for extra, _ in BAD])
def test_bad_flags_are_one_line(plain_words, bert, tmp_path, capsys, extra, message):
    task = write_task(tmp_path / "task")
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(task, bert, tmp_path / "runs", *extra))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert len(error.splitlines()) == 1 and error.startswith("train.py: error: ")
    assert re.search(message, error), error
    assert not (tmp_path / "runs").exists()


def test_a_taken_folder_is_refused(plain_words, bert, tmp_path, capsys):
    task = write_task(tmp_path / "task")
    common = arguments(task, bert, tmp_path / "runs", "--method", "standard", "--epochs", 1)
    train.main(common)
    before = {p: p.read_bytes() for p in (tmp_path / "runs").rglob("*") if p.is_file()}
    for extra, message in (([], "holds a run already"), (["--resume", "--lr", "0.5"], "--resume with lr 0.5")):
        with pytest.raises(SystemExit):
            train.main([*common, *extra])
        assert message in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in (tmp_path / "runs").rglob("*") if p.is_file()}
    train.main([*common, "--overwrite", "--seeds", "5"])
    assert json.loads((tmp_path / "runs" / "standard" / "metrics.json").read_text())["seed"] == 5


def test_a_loss_that_is_not_finite_stops_the_run(plain_words, bert, tmp_path, capsys):
    """With the step, the terms and the learning rate; the checkpoint is the last good one."""
    task = write_task(tmp_path / "task")
    with pytest.raises(SystemExit):
        train.main(arguments(task, bert, tmp_path / "runs", "--lr", 1e28, "--schedule", 1e-31, 1))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the loss is not finite at step" in error and "learning rate 1e+28" in error
    kept, progress = eval.load_tensors(tmp_path / "runs" / "rift" / "checkpoint.safetensors")
    assert progress["epoch"] == 1 and all(torch.isfinite(t).all() for t in kept.values())


DAMAGE = [
    ("cut short", lambda path: path.write_bytes(path.read_bytes()[:-200])),
    ("not safetensors", lambda path: path.write_bytes(b"\x80\x04pickle")),
    ("empty", lambda path: path.write_bytes(b"")),
    ("another model", lambda path: eval.save_tensors(path, {"model.x": torch.zeros(3)}, {"epoch": 0})),
]


@pytest.mark.parametrize("damage", [d for _, d in DAMAGE], ids=[name for name, _ in DAMAGE])
def test_a_damaged_checkpoint_is_refused_by_name(plain_words, bert, tmp_path, capsys, monkeypatch, damage):
    task = write_task(tmp_path / "task")
    real = train.train_step
    monkeypatch.setattr(train, "train_step", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit):
        train.main(arguments(task, bert, tmp_path / "runs"))
    monkeypatch.setattr(train, "train_step", real)
    damage(tmp_path / "runs" / "rift" / "checkpoint.safetensors")
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(task, bert, tmp_path / "runs", "--resume"))
    assert stop.value.code == 2 and "checkpoint.safetensors" in capsys.readouterr().err.splitlines()[-1]


# ------------------------------------------------------------------------------------------------ the toy task


def test_the_toy_encoder_in_the_cache_or_not_is_the_same_run(tmp_path, monkeypatch):
    """The run that pre-trains the toy encoder and the one that finds it in the cache end with the same weights."""
    real = train.pretrain_toy
    monkeypatch.setattr(train, "pretrain_toy", lambda folder: real(folder, steps=3))
    for out in ("pretrains", "finds"):
        train.main(["--epochs", "1", "--method", "standard", "--train-size", "16", "--dev-size", "8", "--test-size", "8",
                    "--out", str(tmp_path / out)])
    assert same_weights(tmp_path / "pretrains" / "standard", tmp_path / "finds" / "standard")
    assert json.loads((tmp_path / "finds" / "standard" / "eval.json").read_text())["settings"].keys() >= {"pwws", "genetic"}


def test_the_toy_grammar():
    """Synonyms are of one concept, all of a table's words are real candidates, and labelled texts are of fewer aspects."""
    table = data.toy_neighbors()
    assert all(word in table[other] for word in table for other in table[word]) and set(map(len, table.values())) == {3}
    task = data.load_task("toy")
    words = {split: {word for x in getattr(task, split) for word in x.words[0]} for split in ("train", "dev", "test")}
    assert words["dev"] <= set(table) | {"the", "was"} and len(words["train"]) < len(words["test"])
    assert not {x.words for x in task.train} & {x.words for x in task.test}
    assert data.load_task("toy").fingerprint == task.fingerprint != data.load_task("toy", split_seed=1).fingerprint
