"""Several processes train like one.

With dropout off and the adversary's start given, the losses and gradients of two processes that
share a batch are the single process's, for two classes and for three, for texts of one class and
for the marginal bound. As torchrun starts them they leave one run's files; when one dies all stop,
and the run goes on from its last epoch, with as many processes as before.
"""
import os
import socket
import sys
from collections import Counter
from datetime import timedelta
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

import data
import eval
import rift
import train
from tests.conftest import save_model, tiny_encoder, write_task
from tests.test_rift import example, start
from tests.test_robustness import children, enter

CASES = [("standard", 2), ("adv-ptwd", 2), ("rift", 2), ("rift", 3), ("rift-marginal", 3)]


def losses_and_gradients(method, C):
    """One batch of 4 texts a class through adversary, loss and backward: this process's share.

    Returns (this process's terms, their means over the processes, the gradients' means).
    """
    rank, world = train.processes()
    torch.manual_seed(0)
    encoder = tiny_encoder("bert", initializer_range=0.2)
    model = rift.RIFT(encoder, C, marginal=method == "rift-marginal").eval()
    batch, y = example(encoder, B=4 * C), torch.arange(C).repeat_interleave(4)
    T = torch.randn(4 * C, 16, generator=torch.Generator().manual_seed(7))
    rows = torch.as_tensor(train.share(np.arange(4 * C), y, rank, world))
    part, w = {name: tensor[rows] for name, tensor in batch.items()}, None
    if rift.has_adversary(method):
        w = rift.adversary(encoder, model.head, **part, v=start(batch)[rows])
    terms = rift.objective(model(**part, y=y[rows], w=w, T=T[rows]), method,
                           dict(beta=10, alpha=0.1, ptwd=0.01))
    terms["loss"].backward()
    own = {name: value.item() for name, value in terms.items()}
    means = train.average(model, Counter(own), world)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return own, means, gradients


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for method, C in CASES:
        own, means, gradients = losses_and_gradients(method, C)
        about = {"own": own, "means": means}
        data.save_tensors(f"{folder}/{method}-{C}-{rank}", gradients, about)
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    """Of every case they leave their losses and gradients in a folder."""
    assert children(one_of_two, (0, tmp_path), (1, tmp_path)) == [0, 0]
    for method, C in CASES:
        terms, _, gradients = losses_and_gradients(method, C)
        for rank in (0, 1):
            gradients_2, about = data.load_tensors(tmp_path / f"{method}-{C}-{rank}")
            assert about["means"] == pytest.approx(terms, rel=1e-4, abs=1e-6)
            assert about["own"].get("info", 0) == pytest.approx(terms.get("info", 0), rel=1e-4)
            assert gradients_2.keys() == gradients.keys()
            for name, gradient in gradients.items():
                atol = 1e-4 * gradient.abs().max().item() + 1e-8
                assert torch.allclose(gradients_2[name], gradient, 1e-4, atol), (method, C, name)


def test_the_shares_make_up_the_batch():
    """Every class equally often in each share, no text twice, one of each left out of 5."""
    y = torch.arange(3).repeat_interleave(5)
    shares = [train.share(np.arange(15), y, rank, 2) for rank in (0, 1)]
    assert all(np.bincount(y[rows]).tolist() == [2, 2, 2] for rows in shares)
    assert len(set(np.concatenate(shares))) == 12
    with pytest.raises(data.InputError, match="--batch-size: each of 6 processes needs a text"):
        train.share(np.arange(15), y, 0, 6)


def arguments_for(folder):
    """A command line of train.py, for a task and a model that are made in this folder."""
    task, bert = write_task(folder / "task"), save_model(folder / "bert", "bert")
    return (f"--task {task} --model {bert} --neighbors {task}/neighbors.json --out {folder}/runs "
            "--max-len 16 --device cpu").split()


def test_a_batch_too_small_to_share_is_left_out(plain_words, tmp_path, monkeypatch):
    """16 texts a class in batches of 7 are 7, 7 and 2, too few for three processes."""
    monkeypatch.setattr(train, "processes", lambda: (0, 3))         # the first of three
    monkeypatch.setattr(train, "average", lambda model, totals, world: totals)
    monkeypatch.setattr(dist, "barrier", lambda: None)
    train.main([*arguments_for(tmp_path), *"--method standard --epochs 2 --batch-size 14".split()])


def test_what_is_left_out_is_not_always_the_longest():
    y, lengths = torch.arange(2).repeat(500), np.arange(1000)
    left_out = []                                                   # their place in their batch
    for rows in data.balanced_batches(y, lengths, 10, np.random.default_rng(0)):
        used = [train.share(rows, y[rows], rank, 2) for rank in (0, 1)]
        left_out += [sum(rows < i) for i in set(rows) - set(np.concatenate(used))]
    assert len(left_out) == 200 and abs(np.mean(left_out) - 4.5) < 1


def test_how_processes_start(monkeypatch):
    """Each has its own GPU, the run's device decides how they talk, and they wait for hours: for
    the first one, which reads the texts and measures test."""
    started, own_gpu = mock.Mock(side_effect=KeyboardInterrupt), mock.Mock()
    monkeypatch.setattr(dist, "init_process_group", started)
    monkeypatch.setattr(torch.cuda, "set_device", own_gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "3")
    for device, backend in (("cpu", "gloo"), ("cuda", "nccl")):
        monkeypatch.setattr(data, "pick_device", lambda name: torch.device(name))
        with pytest.raises(SystemExit):
            train.main(["--device", device, "--precision", "fp32"])
        assert started.call_args.args == (backend,)
    own_gpu.assert_called_with(3)
    assert started.call_args.kwargs["timeout"] >= timedelta(hours=10)


# ---- torchrun ------------------------------------------------------------------------------------


def one_of_torchruns(rank, port, folder, dies, *arguments):
    """train.py in one of two processes; if it is the one that dies, it does so in its 6th step."""
    enter(folder)
    os.environ |= dict(WORLD_SIZE="2", RANK=str(rank), MASTER_ADDR="localhost",
                       MASTER_PORT=str(port))
    sys.stdout = open(folder / f"stdout-{rank}", "w")
    objective, steps = rift.objective, []

    def dying(*args):
        steps.append(1)
        if rank == dies and len(steps) == 6:
            os._exit(3)
        return objective(*args)

    rift.objective = dying
    train.main(arguments)


def test_torchrun_leaves_one_run_and_stops_when_a_process_dies(tmp_path, plain_words, capsys):
    """The one that dies does so in the second epoch."""
    arguments = [*arguments_for(tmp_path), *"--epochs 3 --batch-size 8 --adv-steps 2".split()]
    run = tmp_path / "runs" / "rift"

    def torchrun(dies, *more):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        return children(one_of_torchruns, *[
            (rank, port, tmp_path, dies, *arguments, *more) for rank in (0, 1)])

    def epochs():
        return [line["epoch"] for line in data.read_lines(run / "log.jsonl")]

    assert 0 not in torchrun(1)
    assert not (run / "metrics.json").exists() and epochs() == [1]
    with pytest.raises(SystemExit):
        train.main([*arguments, "--resume"])
    message = "the run in it was started with processes 2, and goes on with the same only, not 1"
    assert message in capsys.readouterr().err
    assert torchrun(None, "--resume") == [0, 0] and epochs() == [1, 2, 3]
    said = [(tmp_path / f"stdout-{rank}").read_text() for rank in (0, 1)]
    assert said[0].count("test clean") == 1 and said[1] == ""
    assert not list(run.rglob("*.tmp")) and not (run / "checkpoint.safetensors").exists()
    eval.load_run(run, "cpu")
