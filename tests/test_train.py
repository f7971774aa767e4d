"""Training, from a command line to a run's folder (train.py).

A step is Algorithm 1 as one would write it down. Every method trains, BERT on texts of two classes
and RoBERTa on pairs of three, and leaves a run that loads again to the same predictions. A run
that was stopped ends like the one that was not, bit for bit. The epoch is chosen on dev. What was
forgotten is measured on held-out texts. A step that is not finite changes no weight.
"""
import inspect
import itertools
import math
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers

import attacks
import data
import eval
import rift
import train
from tests import benchmark
from tests.conftest import save_model, tiny_encoder, write_task

L_TASK = {"ce", "kl"}
TERMS = {"standard": {"ce"}, "adv": L_TASK, "adv-mixout": L_TASK, "adv-ptwd": L_TASK | {"ptwd"},
         "rift-marginal": L_TASK | {"info"}, "rift": L_TASK | {"info"}}


def command(task, model, out, more=""):
    """A command line for train.py: 2 epochs of 4 steps of 8 texts. more: flags, as one string."""
    return (f"--task {task} --model {model} --neighbors {task}/neighbors.json --out {out} "
            "--epochs 2 --batch-size 8 --max-len 16 --adv-steps 2 --lr 1e-3 --device cpu "
            f"{more}").split()


def stopped(capsys, arguments, code):
    """train.main has to stop with this exit code -> the last line of its standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == code and "Traceback" not in error
    return error.strip().splitlines()[-1]


def log_of(folder):
    """log.jsonl without the time that each epoch took."""
    return [line | {"seconds": 0} for line in data.read_lines(folder / "log.jsonl")]


def weights(folder):
    """{name: tensor} of all that a finished run keeps."""
    encoder = safetensors.torch.load_file(folder / "encoder" / "model.safetensors")
    return ({f"encoder.{name}": p for name, p in encoder.items()}
            | safetensors.torch.load_file(folder / "model.safetensors"))


def same_weights(a, b, names="", atol=0.0):
    a, b = weights(a), weights(b)
    names = [name for name in a if name.startswith(names)]
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], 0, atol) for n in names)


def without_dropout(model, folder):
    path = shutil.copytree(model, folder) / "config.json"
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    data.write_json(path, data.read_json(path) | off)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("bert"), "bert")


@pytest.fixture
def task(plain_words, tmp_path):
    """Own data: 16 texts a class for training, 8 for dev and for test."""
    return write_task(tmp_path / "task")


# ---- Algorithm 1 ---------------------------------------------------------------------------------


def plain_step(model, adamw, batch, y, v, s):
    """One step as the paper has it: every candidate of every position is embedded, one by one."""
    ids, mask, subs, subs_mask = batch.values()
    (B, L, K), encoder = subs.shape, model.encoder
    first = 2 if encoder.config.model_type == "roberta" else 0

    def pooled(output):                                                             # (B, H)
        if s.pooling == "pooler":
            return output.pooler_output
        return (output.last_hidden_state * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def S(w):
        E = torch.stack([encoder.embeddings(subs[:, :, k], position_ids=torch.arange(
            first, first + L).expand(B, L)) for k in range(K)], 2)                  # (B, L, K, H)
        hook = encoder.embeddings.register_forward_hook(lambda *_: (w[..., None] * E).sum(2))
        S = pooled(encoder(ids, mask))
        hook.remove()
        return S

    def kl(clean, adversarial):
        p, q = torch.softmax(clean, -1), torch.softmax(adversarial, -1)
        return (p * (p / q).log()).sum(-1)                                          # (B,)

    x = F.one_hot(torch.zeros_like(ids), K).float()                                 # (B, L, K)
    v, clean = v.clone().requires_grad_(), model.head(S(x)).detach()
    adam = torch.optim.Adam([v], lr=s.adv_lr, weight_decay=s.adv_weight_decay)
    for _ in range(s.adv_steps):
        w = torch.softmax(torch.where(subs_mask, v, -500.0), -1)
        entropy = -(w * (w + 1e-30).log()).sum()
        v.grad, = torch.autograd.grad(s.sparsity * entropy / (300 * 128)
                                      - kl(clean, model.head(S(w))).sum(), v)
        adam.step()
    S_hat = S(torch.softmax(torch.where(subs_mask, v, -500.0), -1).detach())
    clean, T = model.head(S(x)), pooled(model.teacher(ids, mask))
    loss = F.cross_entropy(clean, y) + s.beta * kl(clean, model.head(S_hat)).mean()
    if s.method.startswith("rift"):
        y = torch.zeros_like(y) if s.method == "rift-marginal" else y
        for c in y.unique().tolist():
            N, g, h = (y == c).sum(), model.g[c](S_hat[y == c]), model.h[c](T[y == c])
            f = F.cosine_similarity(g[:, None], h[None], -1) / s.tau                # (N, N): s, t
            for j in range(N):
                loss = loss - s.alpha * f[:, j].log_softmax(0)[j] / N / len(y.unique())
    adamw.zero_grad()
    loss.backward()
    adamw.step()
    return loss.item()


@pytest.mark.parametrize("method, labels, pooling", [
    ("rift", ["no", "so", "yes"], "pooler"), ("rift", ["neg", "pos"], "mean"),
    ("rift-marginal", ["neg", "pos"], "pooler")])
def test_a_step_is_the_plain_formulation(plain_words, model_folder, tmp_path, method, labels,
                                         pooling):
    """The head, g and h decay, the encoder does not; so is a run of two steps without dropout."""
    task = write_task(tmp_path / "task", labels, n=8, pair=len(labels) == 3)
    model_folder = without_dropout(model_folder, tmp_path / "model")
    arguments = command(task, model_folder, tmp_path / "runs", (
        f"--method {method} --pooling {pooling} --batch-size {4 * len(labels)} --epochs 1 "
        "--beta 30 --alpha 2 --tau 0.5 --adv-steps 4 --weight-decay 1 --seeds 3 "
        "--adv-lr 0.5 --adv-weight-decay 0.1 --sparsity 200"))
    train.main(arguments)

    s = SimpleNamespace(**vars(train.parse(arguments)[1]), method=method)
    torch.manual_seed(3)
    encoder, tokenizer = data.load_encoder(model_folder)
    model = rift.RIFT(encoder, len(labels), pooling, method == "rift-marginal")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    own = [p for name, p in model.named_parameters() if name.startswith(("head", "g.", "h."))]
    adamw = torch.optim.AdamW([{"params": encoder.parameters(), "weight_decay": 0},
                               {"params": own, "weight_decay": 1}], lr=1e-3, eps=1e-6)
    examples, table = data.open_task(s).train, data.load_neighbors(task / "neighbors.json")
    vocabulary = data.Vocabulary(tokenizer, 16, table)
    y = torch.tensor([x.y for x in examples])
    lengths = [sum(map(len, x.words)) for x in examples]
    batches = data.balanced_batches(y, lengths, s.batch_size, np.random.default_rng([3, 1]))
    losses = []
    for step, rows in enumerate(batches):
        torch.manual_seed(data.seed_of(3, 1, step, 0))
        batch = vocabulary.encode([examples[i].words for i in rows], hull=True)
        v = torch.randn(batch["subs"].shape) * math.sqrt(2 / (16 * 10))
        losses.append(plain_step(model, adamw, batch, y[rows], v, s))
    assert len(batches) == 2
    assert log_of(tmp_path / "runs" / method)[0]["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    found = weights(tmp_path / "runs" / method)
    assert found.keys() == {name for name in before if not name.startswith("teacher.")}
    for name, p in model.named_parameters():
        # a shift of all keys changes no attention: its gradient is rounding, which Adam scales up
        if name in found and not name.endswith("key.bias"):
            change = (p - before[name]).norm()
            assert (found[name] - p).norm() <= 0.01 * change + 1e-6, name


def test_methods_without_their_weight_are_adv(task, bert, tmp_path):
    """alpha, lambda or p of 0: the encoder and the head of adv. Mixout with p = 0.7 is not adv."""
    model = without_dropout(bert, tmp_path / "model")
    train.main(command(task, model, tmp_path / "zero", "--method adv rift adv-ptwd adv-mixout "
                       "--epochs 1 --alpha 0 --ptwd 0 --mixout 0"))
    train.main(command(task, model, tmp_path / "more", "--method adv-mixout --epochs 1"))
    adv = tmp_path / "zero" / "adv"
    for method in ("rift", "adv-ptwd", "adv-mixout"):
        assert same_weights(adv, tmp_path / "zero" / method, ("encoder", "head"), 1e-4)
    assert not same_weights(adv, tmp_path / "more" / "adv-mixout", "encoder", 1e-4)


def test_each_step_has_dropout_and_noise_of_its_own(task, bert, tmp_path, monkeypatch):
    """In training mode; every step, epoch, seed and process has its own seed for both. The batches
    are those of the epoch and the seed, for every process."""
    seeds, modes, objective = [], [], rift.objective
    drawn, batches = [], data.balanced_batches

    def seen(o, *more):
        seeds.append(torch.initial_seed())
        modes.append(o.model.encoder.training)
        return objective(o, *more)

    monkeypatch.setattr(data, "balanced_batches",
                        lambda *args: drawn.append(batches(*args)) or drawn[-1])
    monkeypatch.setattr(rift, "objective", seen)
    monkeypatch.setattr(train, "average", lambda model, totals, world: totals)
    monkeypatch.setattr(train.dist, "barrier", lambda: None)
    for rank in (0, 1):
        monkeypatch.setattr(train, "processes", lambda: (rank, 2))
        train.main(command(task, bert, tmp_path / str(rank), "--method standard --seeds 0 1 "
                           "--batch-size 16"))
    assert all(modes) and len(seeds) == len(set(seeds)) == 2 * 2 * 2 * 2
    assert len(drawn) == 8 and len({np.concatenate(rows).tobytes() for rows in drawn}) == 4


def test_gradients_of_slices_add_up(task, bert, tmp_path):
    """Without dropout, L_info and an adversary, a batch in slices is the batch."""
    model = without_dropout(bert, tmp_path / "model")
    for out, size in (("whole", 10), ("slices", 4)):            # slices of 6 and 4
        train.main(command(task, model, tmp_path / out, "--method standard --epochs 1 "
                           f"--batch-size 10 --micro-batch-size {size}"))
    whole, slices = tmp_path / "whole" / "standard", tmp_path / "slices" / "standard"
    assert same_weights(whole, slices, atol=1e-4)
    assert log_of(whole)[0]["ce"] == pytest.approx(log_of(slices)[0]["ce"], rel=1e-4)


@pytest.mark.parametrize("C, N, size", [(2, 4, 4), (2, 16, 10), (3, 40, 40), (3, 5, 4), (2, 1, 4)])
def test_slices_share_a_batch_out(C, N, size):
    """No text is left over; each slice has its classes equally often, and two of each if it can,
    because L_info compares the texts of a class. Only for that it may be larger than asked for."""
    y = torch.arange(C).repeat_interleave(N)
    slices = train.slices(y, size)
    assert sorted(np.concatenate(slices)) == list(range(C * N))
    for part in slices:
        counts = np.bincount(y[part])
        assert len(counts) == C and len(set(counts)) == 1 and counts[0] >= min(N, 2)
        assert len(part) <= max(size, 3 * C)


@pytest.mark.parametrize("task, own", [
    ("imdb", dict(beta=10, alpha=0.1, batch_size=32, max_len=300)),
    ("snli", dict(beta=5, alpha=0.7, batch_size=120, max_len=80))])
def test_the_defaults_are_the_papers(monkeypatch, task, own):
    _, s = train.parse(["--task", task])
    s = vars(s)
    assert {key: s[key] for key in own} == own
    paper = dict(epochs=20, lr=2e-5, schedule=[0.1, 0.55, 1], weight_decay=2e-4, adam_eps=1e-6,
                 tau=0.2, adv_steps=10, adv_lr=1, adv_weight_decay=2e-5, sparsity=15,
                 candidates=10, ptwd=0.01, mixout=0.7, model="bert-base-uncased",
                 pooling="pooler", unknown_words="piece", micro_batch_size=None)
    assert {key: s[key] for key in paper} == paper
    assert s["neighbors"] == "published"
    s = eval.parse(["runs", "--attacks", "genetic"])
    assert s.num_examples == 300
    assert eval.keywords("genetic", None, s) == dict(population=60, generations=40)
    small = partial(attacks.genetic, population=4)              # an attack with numbers of its own
    monkeypatch.setitem(eval.ATTACKS, "small", small)
    assert eval.keywords("small", None, s) == dict(population=4, generations=40)
    assert eval.constraint(SimpleNamespace(task=task), s) == "scores"   # of the genetic attack only
    assert eval.constraint(SimpleNamespace(task=task), eval.parse(["runs"])) == "none"
    in_functions = {
        attacks.genetic: dict(population=60, generations=40), attacks.pwws: dict(unknown="NULL"),
        attacks.lm_constraint: dict(threshold=-5, radius=6),
        attacks.scores_constraint: dict(threshold=-5),
        rift.adversary: dict(steps=10, lr=1, weight_decay=2e-5, sparsity=15),
        rift.f_c: dict(tau=0.2), rift.L_info: dict(tau=0.2), rift.RIFT.__init__: dict(tau=0.2),
        data.Vocabulary.__init__: dict(unknown="piece", max_candidates=10),
        data.vector_neighbors: dict(k=8, max_sq_dist=0.5, vocabulary=50_000, skip=27)}
    for function, numbers in in_functions.items():
        defaults = inspect.signature(function).parameters
        assert {name: defaults[name].default for name in numbers} == numbers


@pytest.mark.parametrize("epochs, schedule", [
    (2, [1]), (3, [0.55, 1]), (5, [0.55, 1]), (6, [0.1, 0.55, 1]), (20, [0.1, 0.55, 1])])
def test_the_warm_up_takes_at_most_a_third_of_the_epochs(epochs, schedule):
    assert train.parse(["--task", "imdb", "--epochs", str(epochs)])[1].schedule == schedule


@pytest.mark.parametrize("bad", [lambda zero: torch.sqrt(zero), lambda zero: zero + math.inf])
def test_a_step_that_is_not_finite_changes_no_weight(task, bert, tmp_path, capsys, monkeypatch,
                                                     bad):
    """The gradient, 0 / 0, or the loss. The step is named, the last epoch's checkpoint stays."""
    steps, seen = itertools.count(1), {}

    def term(o):
        zero = o.clean.sum() * 0
        if next(steps) < 6:                                         # the second of epoch 2
            return zero
        seen.update({p: p.detach().clone() for p in o.model.parameters()})
        return bad(zero)

    monkeypatch.setitem(rift.METHODS, "odd", {rift.ce: 1, term: 1})
    error = stopped(capsys, command(task, bert, tmp_path / "runs", "--method odd"), 2)
    assert "epoch 2, step 2: the loss or its gradient is not finite (" in error
    assert seen and all(map(torch.equal, seen.keys(), seen.values()))
    kept, about = data.load_tensors(tmp_path / "runs" / "odd" / "checkpoint.safetensors")
    assert len(about["log"]) == 1 and all(p.isfinite().all() for p in kept.values())


# ---- What a run is -------------------------------------------------------------------------------


def test_every_method_trains_and_its_run_loads(plain_words, model_folder, tmp_path):
    """Two classes of texts with BERT, three of pairs with RoBERTa."""
    pair = model_folder.name == "roberta"
    labels = ["no", "so", "yes"] if pair else ["neg", "pos"]
    task = write_task(tmp_path / "task", labels, pair=pair)
    train.main(command(task, model_folder, tmp_path / "runs",
                       f"--batch-size 9 --schedule 0.5 1 --method {' '.join(TERMS)}"))
    for method, terms in TERMS.items():
        folder = tmp_path / "runs" / method
        log, metrics = log_of(folder), data.read_json(folder / "metrics.json")
        assert [(line["epoch"], line["lr"]) for line in log] == [(1, 5e-4), (2, 1e-3)]
        always = {"epoch", "loss", "lr", "seconds", "dev_clean", "dev_hull", "dev_cka",
                  "dev_retained", "params_l2"}
        info = {"dev_info", "info_n"} if "info" in terms else set()
        assert all(line.keys() == always | terms | info for line in log)
        assert metrics["method"] == method
        files = {path.name for path in folder.iterdir()}
        assert files == {"config.json", "encoder", "log.jsonl", "metrics.json", "model.safetensors",
                         "neighbors.json"}
        assert transformers.AutoModel.from_pretrained(folder / "encoder").config.hidden_size == 16
        victim, (s, _) = eval.load_run(folder), eval.settings_of(folder)
        own, kept = data.open_task(s), log[metrics["best_epoch"] - 1]
        for split, clean, hull in ((own.test, metrics["clean"], metrics["hull"]),
                                   (own.dev, kept["dev_clean"], kept["dev_hull"])):
            # what was measured on these texts is what the saved model does
            P = victim([data.to_text(x.words) for x in split])
            assert P.shape == (len(split), len(labels)) and P.dtype == np.float32
            assert np.allclose(P.sum(1), 1, atol=1e-6)
            attacked, _, _ = eval.hull_attack(victim, split, **eval.search_settings(s))
            assert eval.accuracy(split, P.argmax(1)) == clean
            assert eval.accuracy(split, P.argmax(1), attacked) == hull


def test_resume_says_if_there_is_nothing_to_go_on_with(tmp_path, capsys):
    """As after `--seeds 0 1`, whose folders end in the seed, with `--seeds 1 --resume`."""
    s = SimpleNamespace(neighbors=None)
    for folder, said in (("rift", 1), ("rift-1", 0)):
        data.write_json(tmp_path / "rift-1" / "config.json", {})
        train.check_first([tmp_path / folder], s, resume=True, overwrite=False)
        err = capsys.readouterr().err
        assert err.count(f"such as {tmp_path / folder}; they start anew") == said


def test_a_parameter_of_ones_own_is_trained_whatever_its_name(task, bert, tmp_path, monkeypatch):
    init, L_info = rift.RIFT.__init__, rift.RIFT.L_info

    def with_scale(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.teacher_scale = torch.nn.Parameter(torch.ones(()))

    monkeypatch.setattr(rift.RIFT, "__init__", with_scale)
    monkeypatch.setattr(rift.RIFT, "L_info", lambda self, *a: L_info(self, *a) * self.teacher_scale)
    train.main(command(task, bert, tmp_path / "runs", "--epochs 1"))
    tensors, _ = data.load_tensors(tmp_path / "runs" / "rift" / "model.safetensors")
    assert tensors["teacher_scale"] != 1


def test_several_methods_and_seeds_see_the_same_texts(plain_words, bert, tmp_path, monkeypatch):
    """The teacher reads them once for all runs; --resume leaves finished runs alone."""
    task = write_task(tmp_path / "task", n=32, dev=False)
    bars, features = [], eval.Victim.features
    monkeypatch.setattr(eval.Victim, "features", lambda self, texts, encoder=None, bar=None: (
        bars.append(bar) or features(self, texts, encoder, bar)))
    arguments = command(task, bert, tmp_path / "runs",
                        "--method standard adv --seeds 0 1 --epochs 1 --train-size 8")
    train.main(arguments)
    assert bars.count("teacher's features") == 2                    # of train and of dev
    folders = [tmp_path / "runs" / f"{m}-{seed}" for m in ("standard", "adv") for seed in (0, 1)]
    assert len({eval.settings_of(folder)[0].fingerprints["data"] for folder in folders}) == 1
    assert not same_weights(*folders[:2], names="encoder")          # another seed is another run
    before = [(folder / "metrics.json").stat().st_mtime_ns for folder in folders]
    load = Mock(side_effect=data.load_encoder)
    monkeypatch.setattr(data, "load_encoder", load)
    train.main([*arguments, "--resume"])
    assert before == [(folder / "metrics.json").stat().st_mtime_ns for folder in folders]
    assert load.call_count == 1                                     # for the fingerprint
    (folders[0] / "metrics.json").unlink()      # made again, it has no encoder of the earlier one
    (folders[0] / "encoder" / "earlier").touch()
    train.main([*arguments, "--resume"])
    assert not (folders[0] / "encoder" / "earlier").exists()


@pytest.mark.parametrize("method, clean, hull, best", [
    ("standard", [0.5, 0.9, 0.9, 0.7], [0.2, 0, 0, 0], 3),          # hull says nothing about it
    ("adv", [0.8, 0.8, 0.7, 0.9], [0.5, 0.5, 0.5, 0.4], 2)])
def test_the_best_epoch_on_dev_is_kept(task, bert, tmp_path, monkeypatch, method, clean, hull,
                                       best):
    """Of equals the later. The run ends with the weights that a run of so many epochs has."""
    for out, epochs in (("long", 4), ("short", best)):
        dev = iter([{"dev_clean": c, "dev_hull": h} for c, h in zip(clean, hull)])
        monkeypatch.setattr(train, "measure", lambda *_: next(dev))
        train.main(command(task, bert, tmp_path / out,
                           f"--method {method} --epochs {epochs} --schedule 1"))
    long, short = tmp_path / "long" / method, tmp_path / "short" / method
    assert same_weights(long, short) and len(log_of(long)) == 4
    metrics = data.read_json(long / "metrics.json")
    assert metrics["best_epoch"] == best and metrics["best_rule"].endswith("of equals the later")
    by_hull = [hull[best - 1]] if method == "adv" else []
    assert metrics["best_score"] == [*by_hull, clean[best - 1]]


def test_settings_of_words_and_precision_reach_training_and_loading(task, bert, tmp_path,
                                                                    monkeypatch):
    made, dtypes = [], set()
    vocabulary, parameters_in = data.Vocabulary, rift.parameters_in
    monkeypatch.setattr(data, "Vocabulary", lambda *a: made.append(vocabulary(*a)) or made[-1])
    monkeypatch.setattr(rift, "parameters_in", lambda encoder, dtype: (
        dtypes.add(dtype) or parameters_in(encoder, dtype)))
    train.main(command(task, bert, tmp_path / "runs", "--method adv --epochs 1 "
                       "--unknown-words unk --candidates 2 --precision bf16 --tau 0.3"))
    victim = eval.load_run(tmp_path / "runs" / "adv", "cpu")
    assert len(made) == 2 and dtypes == {torch.bfloat16} and victim.model.dtype == torch.bfloat16
    assert victim.model.tau == 0.3
    for words in made:
        assert words.token("unheard") == words.unk and len(words.candidates("good")) == 2


def test_the_test_texts_decide_nothing(task, bert, tmp_path):
    """With the wrong labels for all of them the run is the same, only its test accuracy is not."""
    more = "--method standard --epochs 3 --schedule 1"
    train.main(command(task, bert, tmp_path / "right", more))
    swapped = {"neg": "pos", "pos": "neg", "label": "label"}
    lines = [line.split("\t") for line in (task / "test.tsv").read_text().splitlines()]
    (task / "test.tsv").write_text("".join(f"{swapped[y]}\t{text}\n" for y, text in lines))
    train.main(command(task, bert, tmp_path / "wrong", more))
    right, wrong = tmp_path / "right" / "standard", tmp_path / "wrong" / "standard"
    assert log_of(right) == log_of(wrong) and same_weights(right, wrong)
    before, after = (data.read_json(run / "metrics.json") for run in (right, wrong))
    assert before["best_epoch"] == after["best_epoch"]
    assert before["clean"] == pytest.approx(1 - after["clean"])


def test_the_benchmark_runs_and_its_sides_agree(tmp_path, monkeypatch):
    for task, shorter in (("imdb", 104), ("snli", 30)):
        monkeypatch.setitem(train.TASKS[task], "max_len", shorter)
    benchmark.main(["train", "clean", "attacks", "--device", "cpu", "--json",
                    str(tmp_path / "rows.json"), "--batches", "1", "--batch-size", "6",
                    "--adv-steps", "1", "--num-clean", "4", "--attack-examples", "1"])
    rows = data.read_json(tmp_path / "rows.json")
    assert len(rows) == 10 and all(rows[name]["agrees"] for name in rows if "fp32" in name)


# ---- How much was forgotten ----------------------------------------------------------------------


def test_what_is_measured_of_what(task, bert, tmp_path, monkeypatch):
    """dev_retained: what clean S says about T; dev_info: what S of adversarial texts does."""
    given = {}
    for module, name in ((rift, "retained"), (train, "held_out_info")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, real=real: (
            given.update({name: a}) or real(*a)))
    train.main(command(task, bert, tmp_path / "runs", "--lr 1e-2 --epochs 1"))
    run, (teacher, _) = tmp_path / "runs" / "rift", data.load_encoder(bert)
    victim, (s, _) = eval.load_run(run, "cpu"), eval.settings_of(run)
    own = data.open_task(s)
    by_class = sorted(own.train, key=lambda x: x.y)
    for split, numbers in ((by_class, given["retained"][:3]), (own.dev, given["retained"][3:])):
        (S, T, y), words = numbers, [x.words for x in split]
        assert torch.allclose(S, victim.features(words), atol=1e-5)
        assert torch.allclose(T, victim.features(words, teacher), atol=1e-5)
        assert y.tolist() == [x.y for x in split] and not torch.allclose(S, T, atol=1e-2)
    _, S_hat, T_info, _, N = given["held_out_info"]
    found = eval.hull_attack(victim, own.dev, **eval.search_settings(s))[2]
    assert torch.allclose(S_hat, found, atol=1e-5) and not torch.allclose(S_hat, S, atol=1e-2)
    assert torch.equal(T, T_info) and N == 4                        # of a class, as in a batch
    line, = log_of(run)
    assert line["dev_cka"] == pytest.approx(rift.debiased_cka(S, T), abs=1e-4)
    moved = rift.pretrained_distance(victim.model.encoder, teacher).item()
    assert line["params_l2"] == pytest.approx(moved, rel=1e-4)

    monkeypatch.setattr(train, "processes", lambda: (0, 2))
    s.micro_batch_size = 4                      # L_info compares the slices of both processes
    T_own = victim.features([x.words for x in own.train], teacher)
    train.measure(victim.model, victim, own, s, T_own, T)
    assert given["held_out_info"][4] == 4


@pytest.mark.parametrize("marginal", [False, True])
def test_information_has_as_many_competitors_as_in_training(marginal):
    """Equal features are told apart, unrelated ones are not."""
    model = rift.RIFT(tiny_encoder("bert"), 2, marginal=marginal)
    model.g = model.h = torch.nn.ModuleList([torch.nn.Identity()] * 2)
    y = torch.arange(128) % 2
    S, T = torch.randn(2, 128, 16, generator=torch.Generator().manual_seed(0))

    def bound(S, T, N=8):
        line = train.held_out_info(model, S, T, y, N)
        assert line["info_n"] == (2 * N if marginal else N)
        return math.log(line["info_n"]) - line["dev_info"]

    assert bound(S, S) > 1 and bound(S, T) < 0.2


# ---- Stopping and going on -----------------------------------------------------------------------


def test_a_stopped_run_ends_like_one_that_was_not(task, bert, tmp_path, capsys, monkeypatch):
    """Ctrl-C in the n-th step, each time gone on with: the same weights and files, bit for bit.

    It is one line and exit code 130, and says how to go on where an epoch was finished.
    """
    arguments = command(task, bert, tmp_path / "whole", "--method adv-mixout standard")
    train.main(arguments)
    arguments[arguments.index("--out") + 1] = str(tmp_path / "parts")
    objective, steps = rift.objective, iter(())
    monkeypatch.setattr(rift, "objective", lambda *args: (
        signal.raise_signal(signal.SIGINT) if next(steps, 0) else objective(*args)))
    goes_on = "the same command with {} goes on".format
    for n, more, said in ((3, [], "no epoch was finished yet"),
                          (6, ["--overwrite"], goes_on("--resume in place of --overwrite")),
                          (3, ["--resume"], goes_on("--resume"))):
        steps = iter([0] * (n - 1) + [1])
        assert stopped(capsys, [*arguments, *more], 130) == f"train.py: stopped; {said}"
    assert not (tmp_path / "parts" / "standard").exists()
    train.main([*arguments, "--resume"])
    for name in ("adv-mixout", "standard"):
        whole, parts = tmp_path / "whole" / name, tmp_path / "parts" / name
        assert same_weights(whole, parts) and log_of(whole) == log_of(parts)
        assert (whole / "metrics.json").read_text() == (parts / "metrics.json").read_text()
        assert {p.name for p in whole.iterdir()} == {p.name for p in parts.iterdir()}


def test_a_damaged_checkpoint_is_refused_by_name(task, bert, tmp_path, capsys, monkeypatch):
    arguments = command(task, bert, tmp_path / "runs", "--method standard")
    monkeypatch.setattr(train, "finish", lambda *_: signal.raise_signal(signal.SIGINT))
    stopped(capsys, arguments, 130)
    path = tmp_path / "runs" / "standard" / "checkpoint.safetensors"
    content, (tensors, about) = path.read_bytes(), data.load_tensors(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}    # not mapped to the file
    other = {"model.head.0.bias": torch.ones(3)}
    for damaged in ((other, about), (tensors | other, about), (tensors, {}), None):
        if damaged:
            data.save_tensors(path, *damaged)
        else:
            path.write_bytes(content[:len(content) // 2])
        error = stopped(capsys, [*arguments, "--resume"], 2)
        assert "checkpoint.safetensors: " in error and "damaged" in error


def test_overwrite_leaves_no_old_run_to_go_on_with(task, bert, tmp_path, capsys, monkeypatch):
    """Stopped in the first of two runs, --resume makes both anew."""
    arguments = command(task, bert, tmp_path / "runs", "--method standard adv --epochs 1")
    train.main(arguments)
    with monkeypatch.context() as patch:
        patch.setattr(rift, "objective", Mock(side_effect=KeyboardInterrupt))
        stopped(capsys, [*arguments, "--lr", "0.5", "--overwrite"], 130)
    train.main([*arguments, "--lr", "0.5", "--resume"])
    assert [log_of(tmp_path / "runs" / x)[0]["lr"] for x in ("standard", "adv")] == [0.5] * 2


def test_a_run_is_told_by_what_it_is_made_of_not_by_paths(task, bert, tmp_path, capsys,
                                                          monkeypatch):
    """--resume finds the same texts, table and encoder under other names; others are refused."""
    monkeypatch.chdir(tmp_path)
    train.main(command(task, bert, "runs", "--method standard --epochs 1"))
    other = [shutil.copytree(path, tmp_path / "moved" / path.name) for path in (task, bert)]
    moved = command(*other, "./runs", "--method standard --epochs 1 --resume")
    train.main(moved)
    assert "runs/standard: finished already" in capsys.readouterr().err
    data.write_json(other[0] / "neighbors.json", {"good": ["great"]})
    assert "runs/standard: the run in it was started with neighbors " in stopped(capsys, moved, 2)


def test_seeds_are_one_method_also_where_the_pooler_was_never_trained(task, tmp_path):
    """It is drawn for each seed, as RoBERTa's is, but is no part of the encoder's fingerprint. Each
    seed's teacher has the pooler of that seed: where nothing is learned, nothing is forgotten."""
    model = save_model(tmp_path / "roberta", "roberta")
    tensors = safetensors.torch.load_file(model / "model.safetensors")
    kept = {name: p for name, p in tensors.items() if not name.startswith("pooler.")}
    safetensors.torch.save_file(kept, model / "model.safetensors", {"format": "pt"})
    train.main(command(task, model, tmp_path / "runs",
                       "--method standard --epochs 1 --lr 1e-30 --seeds 0 1"))
    a, b = (tmp_path / "runs" / f"standard-{seed}" for seed in (0, 1))
    assert not same_weights(a, b, "encoder.pooler") and same_weights(a, b, "encoder.encoder", 1e-6)
    runs = [SimpleNamespace(run=eval.settings_of(folder)[0]) for folder in (a, b)]
    assert eval.by_settings(runs) == {"standard": runs}
    assert [log_of(run)[0]["dev_cka"] for run in (a, b)] == pytest.approx([1, 1], abs=1e-3)


@pytest.mark.parametrize("moment", ["warn", "measure"])         # before the first epoch, after it
def test_an_older_command_notices_that_another_one_has_taken_its_folder(
        task, bert, tmp_path, capsys, monkeypatch, moment):
    """It stops with one line, before it writes anything between the other one's files."""
    arguments = command(task, bert, tmp_path / "runs", "--method standard --overwrite")
    real, after = getattr(train, moment), []

    def files():
        paths = sorted((tmp_path / "runs").rglob("*"))
        return {path: path.read_bytes() for path in paths if path.is_file()}

    def meanwhile(*args):
        monkeypatch.setattr(train, moment, real)
        train.main([*arguments, "--seeds", "5"])
        after.append(files())
        return real(*args)

    monkeypatch.setattr(train, moment, meanwhile)
    assert "another train.py has started in it meanwhile" in stopped(capsys, arguments, 2)
    assert after == [files()]
    assert data.read_json(tmp_path / "runs" / "standard" / "metrics.json")["seed"] == 5


def test_parts_that_share_their_parameters_are_saved_and_loaded(task, bert, tmp_path, capsys,
                                                                monkeypatch):
    class Shared(rift.RIFT):
        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            self.h = self.g

    monkeypatch.setattr(rift, "RIFT", Shared)
    train.main(command(task, bert, tmp_path / "runs", "--epochs 1"))
    model = eval.load_run(tmp_path / "runs" / "rift", "cpu").model
    assert model.g is model.h


# ---- Bad input is refused early ------------------------------------------------------------------


def test_a_path_is_a_folder_whatever_its_last_name(task, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task.rename(tmp_path / "imdb")
    for path in ("./imdb", "imdb/", str(tmp_path / "imdb")):
        args, s = train.parse(["--task", path])
        assert s.task == str(tmp_path / "imdb") and args.out == Path("runs/imdb")
    assert train.parse(["--task", "imdb"])[1].task == "imdb"
    assert "the folder here is --task ./imdb" in capsys.readouterr().err
    (tmp_path / "toy").symlink_to("imdb")
    assert data.load_task("toy").name == "toy"
    with pytest.raises(data.InputError, match="wanted --out DIR as well"):
        train.parse(["--task", "./toy"])
    assert train.parse(["--task", "./toy", "--out", "x"])[0].task == str(tmp_path / "toy")


def test_part_of_torchruns_environment_is_one_line(task, bert, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = stopped(capsys, command(task, bert, tmp_path / "runs"), 2)
    assert "the environment has WORLD_SIZE but not RANK: start with torchrun" in error


def test_what_is_allowed_but_hardly_meant_is_a_line(plain_words, bert, tmp_path, capsys,
                                                    monkeypatch):
    """Words that the model does not know, premises without room behind them, slow arithmetic, and
    a class so rare that an epoch is short."""
    task = write_task(tmp_path / "task", pair=True)
    monkeypatch.setattr(data, "unknown_share", lambda *_: 0.3)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    train.main(command(task, bert, tmp_path / "runs",
                       "--method standard --epochs 1 --precision bf16 --max-len 7"))
    said = capsys.readouterr().err
    assert "30% of the training words are unknown to the model's tokenizer, or cut to one" in said
    assert "100.0% of the training pairs have a first text that fills --max-len 7: no word" in said
    assert "--precision bf16: this processor has no bf16 arithmetic" in said
    assert "batches have every class" not in said
    rows = (task / "train.tsv").read_text().splitlines(keepends=True)
    rare = [row for row in rows if row.startswith("neg")][:2]
    common = [row for row in rows if row.startswith("pos")] * 2
    (task / "train.tsv").write_text("".join([rows[0], *rare, *common]))
    (task / "test.tsv").write_text("".join([rows[0], *common]))
    train.main(command(task, bert, tmp_path / "rare", "--method standard --epochs 1"))
    said = capsys.readouterr().err
    assert "test has no text of class neg" in said and "dev has no" not in said
    assert ("batches have every class equally often: an epoch reads only 4 of 34 training texts, "
            "because neg has 2") in said


# ---- The toy task --------------------------------------------------------------------------------


def test_the_toy_encoder_is_taken_from_the_cache(tmp_path, capsys, monkeypatch):
    """The run that pre-trains it and the one that finds it end with the same weights."""
    real, texts = train.pretrain_toy, data.toy_pretraining_texts(400)
    monkeypatch.setattr(train, "pretrain_toy", lambda folder: real(folder, steps=3))
    monkeypatch.setattr(data, "toy_pretraining_texts", lambda: texts)
    for out in ("pretrains", "finds"):
        train.main(["--epochs", "1", "--method", "standard", "--train-size", "16", "--dev-size",
                    "4", "--test-size", "4", "--out", str(tmp_path / out)])
        said = capsys.readouterr().err
        assert ("pre-trained encoder is taken from" in said) == (out == "finds")
    assert same_weights(tmp_path / "pretrains" / "standard", tmp_path / "finds" / "standard")
    settings = data.read_json(tmp_path / "finds" / "standard" / "eval.json")["settings"]
    assert settings.keys() >= {"pwws", "genetic"}
    folder = train.toy_encoder()
    monkeypatch.setattr(data, "toy_pretraining_texts", lambda: ["a film"] * 40)
    assert train.toy_encoder() != folder                            # its texts are in its name
