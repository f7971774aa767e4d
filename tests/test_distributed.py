"""Two processes are one (train.Processes): with dropout off and the adversary's start given, the losses and the
gradients of two gloo processes that share a batch are the single process's, for two classes and for three, for texts
of one class and for the marginal bound, with and without weights that no loss reaches. Two processes that share the
examples of an evaluation end with the single process's table and files. A run under torchrun leaves one run's files; when
one process dies all stop, and the run goes on from its checkpoint.
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import data
import eval
import rift
import train
from tests.conftest import save_model, tiny_encoder, write_task
from tests.test_rift import example, start

SETTINGS = dict(weight_decay=2e-4, lr=1e-3, adam_eps=1e-6)


def losses_and_gradients(processes, method, C):
    """One batch of 4 texts a class through adversary, loss and backward, in this process's share."""
    torch.manual_seed(0)
    model = rift.RIFT(tiny_encoder("bert", initializer_range=0.2), C, marginal=method == "rift-marginal").eval()
    training = train.Training(model, SETTINGS, processes)
    y = np.repeat(np.arange(C), 4)
    batch = example(model.encoder, B=4 * C)
    v, T = start(batch), torch.randn(4 * C, 16, generator=torch.Generator().manual_seed(7))
    rows = torch.as_tensor(processes.share(np.arange(4 * C), y))
    part = {name: tensor[rows] for name, tensor in batch.items()}
    adds = train.METHODS[method]
    w = rift.adversary(model.encoder, model.head, **part, v=v[rows]) if "kl" in adds else None
    terms = training.parallel(**part, y=torch.as_tensor(y)[rows], w=w, T=T[rows] if "info" in adds else None,
                              ptwd="ptwd" in adds, gather=processes.gather)
    sum(terms.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return processes.mean({name: value.item() for name, value in terms.items()}), gradients


CASES = [("standard", 2), ("adv-ptwd", 2), ("rift", 2), ("rift", 3), ("rift-marginal", 3)]


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for method, C in CASES:
        terms, gradients = losses_and_gradients(train.Processes(), method, C)
        eval.save_tensors(f"{folder}/{method}-{C}-{rank}", gradients, terms)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder in which two processes have left their losses and gradients for every case."""
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(one_of_two, (str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("method, C", CASES)
def test_two_processes_are_one(two_processes, method, C):
    terms, gradients = losses_and_gradients(train.Processes(), method, C)
    for rank in (0, 1):
        gradients_2, terms_2 = eval.load_tensors(two_processes / f"{method}-{C}-{rank}")
        assert terms_2 == pytest.approx(terms, rel=1e-4, abs=1e-6)
        # DistributedDataParallel fills in zeros for weights that this loss does not reach
        assert gradients.keys() <= gradients_2.keys()
        for name, gradient in gradients.items():
            assert torch.allclose(gradients_2[name], gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item() + 1e-8), name


def test_the_shares_make_up_the_batch():
    """Every class equally often in each share, no text twice; what the processes do not divide is left out."""
    y = np.repeat([0, 1, 2], 5)
    processes = train.Processes()
    shares = []
    for processes.rank in (0, 1):
        processes.world = 2
        shares.append(processes.share(np.arange(15), y))
        assert np.bincount(y[shares[-1]]).tolist() == [2, 2, 2]
    assert len(set(np.concatenate(shares))) == 12


# ------------------------------------------------------------------------------------------------ evaluation


def plain(text):
    return text.lower().split()


def evaluate(folder):
    eval.main([f"{folder}/standard", "--attacks", "pwws", "genetic", "hull", "--num-examples", "16", "--population", "4",
               "--generations", "2", "--device", "cpu", "--show", "0"])


def half_of_an_evaluation(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    data.prepare_nltk, data.words_of = (lambda *args, **kwargs: None), plain
    evaluate(folder)
    dist.destroy_process_group()


def test_two_processes_attack_what_one_does(tmp_path, plain_words, capfd):
    task = write_task(tmp_path / "task")
    train.main(["--task", str(task), "--model", str(save_model(tmp_path / "bert", "bert")), "--neighbors",
                str(task / "neighbors.json"), "--method", "standard", "--out", str(tmp_path / "one"), "--epochs", "3",
                "--batch-size", "8", "--max-len", "16", "--lr", "1e-2", "--device", "cpu"])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    capfd.readouterr()
    evaluate(tmp_path / "one")
    table = capfd.readouterr().out
    torch.multiprocessing.spawn(half_of_an_evaluation, (str(tmp_path / "two"),), nprocs=2)
    assert capfd.readouterr().out.replace("/two/", "/one/") == table            # printed once
    one, two = (Path(tmp_path, name, "standard") for name in ("one", "two"))
    for name in ("eval.json", "metrics.json"):
        assert json.loads((one / name).read_text()) == json.loads((two / name).read_text())
    lines = [sorted((folder / "attacks.jsonl").read_text().splitlines()) for folder in (one, two)]
    assert lines[0] == lines[1] and len(lines[0]) > 16


# ------------------------------------------------------------------------------------------------ torchrun

SCRIPT = """
import os, sys
import data, train
data.prepare_nltk, data.words_of = (lambda *args, **kwargs: None), lambda text: text.lower().split()
step, dies = train.train_step, sys.argv.pop(1)
def train_step(training, *args):
    if dies == os.environ["RANK"] and training.progress["epoch"] == 1:
        os._exit(3)
    return step(training, *args)
train.train_step = train_step
train.main(sys.argv[1:])
"""


def torchrun(folder, dies, *more):
    """Two processes train in folder/run; the one of rank `dies` ends without a word in the second epoch."""
    (folder / "script.py").write_text(SCRIPT)
    argv = ["--task", folder / "task", "--model", folder / "bert", "--neighbors", folder / "task" / "neighbors.json",
            "--method", "rift", "--out", folder / "run", "--epochs", "3", "--batch-size", "8", "--max-len", "16",
            "--adv-steps", "2", "--device", "cpu", *more]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               folder / "script.py", dies, *argv]
    environment = os.environ | {"PYTHONPATH": str(Path(train.__file__).parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=120)


def test_torchrun_leaves_one_run_and_stops_when_a_process_dies(tmp_path):
    write_task(tmp_path / "task")
    save_model(tmp_path / "bert", "bert")
    run = tmp_path / "run" / "rift"
    assert torchrun(tmp_path, "1").returncode != 0
    assert not (run / "metrics.json").exists() and len((run / "log.jsonl").read_text().splitlines()) == 1
    ended = torchrun(tmp_path, "none", "--resume")
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.count("test clean") == 1                                # printed once
    assert [json.loads(line)["epoch"] for line in (run / "log.jsonl").read_text().splitlines()] == [0, 1, 2]
    assert json.loads((run / "metrics.json").read_text())["method"] == "rift"
    assert not [path for path in run.rglob("*.tmp")]
    eval.load_run(run, "cpu")
