"""Fine-tune BERT or RoBERTa with RIFT, or with a method that the paper compares it with.

    python train.py                                   the embedded toy task: train, attack, compare
    python train.py --task imdb                       the paper's setting
    torchrun --nproc-per-node 8 train.py --task imdb  on eight GPUs, see "Several processes"

Algorithm 1 is the loop in train(), with algorithm_1() for one batch. All that is random in a step
follows from the seed, the epoch, the step and the process: a run that was killed goes on from its
last finished epoch, on a CPU to the same weights bit for bit (a GPU adds some numbers up in another
order each time).
"""
import signal

if __name__ == "__main__":      # Ctrl-C without a traceback while the imports below take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import inspect
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import nltk
import numpy as np
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm
from transformers import (BertConfig, BertForMaskedLM, BertModel, BertTokenizer,
                          DataCollatorForLanguageModeling)

import data
import eval
import rift
from data import InputError

# The paper's numbers: what its tasks share, and what each has of its own. A folder of own data has
# those of imdb, the toy task others.
PAPER = dict(method=["rift"], model="bert-base-uncased", pooling="pooler", epochs=20, lr=2e-5,
             neighbors="published")
TASKS = {
    "imdb": PAPER | dict(max_len=300, batch_size=32, beta=10.0, alpha=0.1),
    "snli": PAPER | dict(max_len=80, batch_size=120, beta=5.0, alpha=0.7),
    "toy": dict(method=["standard", "adv", "rift"], model="toy", pooling="mean", epochs=10, lr=2e-3,
                neighbors=None, max_len=64, batch_size=16, beta=5.0, alpha=0.2),
}
PROBE = 1000                # training texts from which dev_retained's regression is fitted

# ---- Algorithm 1 ---------------------------------------------------------------------------------


def algorithm_1(model, batch, y, T, s):
    """The loss on a batch and its terms, {name: scalar}, ready for backward().

    model: a rift.RIFT; batch: from data.Vocabulary.encode, every class equally often; y: (B,)
    int64; T: (B, H), the teacher's features of the clean texts; s: settings, as in train().
    """
    w = None
    if rift.has_adversary(s.method):
        v = rift.noise(batch["subs"].shape, s.max_len).to(y.device)                 # (B, L, K)
        # the mixing weights of x^ = argmax KL, (B, L, K); they are not rounded to words
        w = model.adversary(**batch, v=v, **eval.search_settings(s))
    outputs = model(**batch, y=y, w=w, T=T)     # makes x^ from w; one pass on x, one on x^
    return rift.objective(outputs, s.method, vars(s))                   # L_task + alpha * L_info


def train(model, task, vocabulary, s, folder, started, T, T_dev):
    """Fine-tunes a model, keeps its best epoch on dev, and measures that once on test.

    model: a rift.RIFT on its device; task: a data.Task; vocabulary: a data.Vocabulary; s: settings,
    as parse() gives them, with method and seed; folder: of the run; it goes on from a checkpoint
    there; started: the folder's identity() when it was opened; T, T_dev: (n, H), the teacher's
    features of the training and dev texts. The teacher is frozen and reads clean text only, so they
    are the same in every epoch.
    Writes log.jsonl, encoder/, model.safetensors and metrics.json. Raises InputError where a loss
    or a gradient is not finite, a batch is too small for the processes, a file cannot be written,
    or another train.py has started in the folder.
    """
    rank, world = processes()
    with_x_hat = rift.has_adversary(s.method)
    # the epoch with the highest first of these on dev is kept, of equals the highest second
    rule = ["dev_hull", "dev_clean"] if with_x_hat else ["dev_clean"]
    victim = eval.Victim(model, vocabulary, s.eval_batch_size)
    texts = [vocabulary.visible(x.words) for x in task.train]
    lengths = [sum(map(len, text)) for text in texts]
    y = torch.tensor([x.y for x in task.train])                                     # (n,)
    new = [p for name, p in model.named_parameters()
           if not name.startswith(("encoder.", "teacher."))]
    adamw = torch.optim.AdamW([{"params": list(model.encoder.parameters()), "weight_decay": 0.0},
                               {"params": new, "weight_decay": s.weight_decay}],
                              lr=s.lr, eps=s.adam_eps, fused=True)
    log, best = load_checkpoint(folder, model, adamw)
    if rank == 0 and log and best["epoch"] == len(log):
        # it may have been killed after it wrote the checkpoint and before it wrote this file
        data.save_tensors(folder / "best.safetensors", trained(model))

    for epoch in range(len(log) + 1, s.epochs + 1):
        for group in adamw.param_groups:
            group["lr"] = s.lr * s.schedule[min(epoch, len(s.schedule)) - 1]
        rng = np.random.default_rng([s.seed, epoch])
        batches = data.balanced_batches(y, lengths, s.batch_size, rng)
        # a batch that is too small to share is left out; if all are, share() raises
        batches = [rows for rows in batches if len(rows) >= len(task.labels) * world] or batches
        start, sums = time.monotonic(), Counter()               # Counter.update adds
        model.train()
        bar = tqdm(batches, f"{s.method} epoch {epoch}/{s.epochs}", leave=False,
                   disable=None if rank == 0 else True)
        for step, rows in enumerate(bar):
            torch.manual_seed(data.seed_of(s.seed, epoch, step, rank))      # dropout, noise, mixout
            rows = share(rows, y[rows], rank, world)
            adamw.zero_grad()
            totals = Counter()
            for part in slices(y[rows], s.micro_batch_size):
                chosen = rows[part]
                fraction = len(part) / len(rows)                        # 1 for the whole batch
                batch = vocabulary.encode([texts[i] for i in chosen], hull=with_x_hat,
                                          device=model.encoder.device)
                terms = algorithm_1(model, batch, y[chosen].to(T.device), T[chosen], s)
                (fraction * terms["loss"]).backward()
                totals.update({name: fraction * value.item() for name, value in terms.items()})
            totals = average(model, totals, world)
            check_finite(totals, model, epoch, step, adamw)
            adamw.step()
            sums.update(totals)
            bar.set_postfix({name: f"{value:.3f}" for name, value in totals.items()})

        line = {"epoch": epoch} | {name: value / len(batches) for name, value in sums.items()}
        line["lr"] = adamw.param_groups[0]["lr"]
        line["seconds"] = round(time.monotonic() - start, 3)
        line |= measure(model, victim, task, s, T, T_dev)
        log.append(line)
        score = [line[key] for key in rule]
        if best is None or score >= best["score"]:          # on a tie of all, the later epoch
            best = {"epoch": epoch, "score": score}
        if rank == 0:
            check_alone(folder, started)
            data.write_atomically(folder / "log.jsonl", "".join(json.dumps(x) + "\n" for x in log))
            save_checkpoint(folder, model, adamw, log, best)
            if best["epoch"] == epoch:
                data.save_tensors(folder / "best.safetensors", trained(model))
            shown = " ".join(f"{key} {value:.4g}" for key, value in line.items())
            tqdm.write(f"{s.method} seed {s.seed}: {shown}", file=sys.stderr)

    if rank == 0:
        model.load_state_dict(data.load_tensors(folder / "best.safetensors")[0], strict=False)
        finish(model, victim, task, s, folder, best | {"rule": rule}, started)


# ---- Its parts -----------------------------------------------------------------------------------


def slices(y, size):
    """The rows of a batch in slices of about `size` texts, each for a backward pass of its own.

    y: (B,) int64, every class equally often; size: None for the whole batch at once. The gradients
    of the slices, weighted by their sizes, add up to the batch's; but L_info compares only the
    texts of one slice of every process. The slices are equal to within a text of each class,
    and no larger than `size` unless they would have fewer than 2 of each class: the L_info of a
    single text is 0. Returns a list of int arrays.
    """
    rows = torch.stack([(y == c).nonzero().squeeze(1) for c in y.unique()])         # (C, N)
    C, N = rows.shape
    n = max((size or len(y)) // C, 2)                                       # of a class in a slice
    number = max(min(math.ceil(N / n), N // 2), 1)          # enough, with 2 of a class in each
    return [part.flatten().numpy() for part in rows.tensor_split(number, dim=1)]


def measure(model, victim, task, s, T, T_dev):
    """The rest of a log line, a dict: accuracy on dev, and how much was forgotten.

    (Before it come epoch, the loss and its terms, means over the epoch, lr and seconds.)
    dev_clean, dev_hull: the share of texts that is right, and right also after eval.hull_attack,
                         which knows the labels and rounds to words
    params_l2:           ||theta_s - theta_t||, how far the encoder's weights have moved
    dev_cka:             debiased CKA of S and T: 1 if they arrange the texts alike, 0 if unrelated
    dev_retained:        the share of T's variance within classes that a linear regression on S
                         predicts: 1 if all of T can be read off S, 0 or below if nothing
    dev_info, info_n:    see held_out_info(), for methods with L_info
    """
    y = torch.tensor([x.y for x in task.train], device=T.device)                    # (n,)
    y_dev = torch.tensor([x.y for x in task.dev], device=T.device)
    clean, hull, S_dev, S_attacked = eval.accuracies(victim, task.dev, s)           # S: (n, H)
    C = len(task.labels)
    probe = torch.cat([(y == c).nonzero().squeeze(1)[:PROBE // C] for c in range(C)])
    S = victim.features([task.train[i].words for i in probe])
    line = {"dev_clean": clean, "dev_hull": hull,
            "params_l2": rift.pretrained_distance(model.encoder, model.teacher).item(),
            "dev_cka": rift.debiased_cka(S_dev, T_dev),
            "dev_retained": rift.retained(S, T[probe], y[probe], S_dev, T_dev, y_dev)}
    if rift.info in rift.METHODS[s.method]:
        # about as many as in training, where L_info compares one slice of every process
        slices_of_all = (s.micro_batch_size or s.batch_size) * processes()[1]
        N = max(min(slices_of_all, s.batch_size) // C, 2)
        line |= held_out_info(model, S_attacked, T_dev, y_dev, N)
    return line


@torch.no_grad()
def held_out_info(model, S_attacked, T, y, N):
    """{"dev_info": L_info of held-out texts, "info_n": how many it compares}.

    S_attacked, T: (n, H), features of the texts that eval.hull_attack found, and of the clean ones;
    y: (n,); N: how many texts of a class are compared at once, about as many as in training, fewer
    if a class has fewer. log(info_n) - dev_info is the bound on I(S;T|Y), with a marginal model on
    I(S;T). (On training pairs it would say nothing: g and h have learned those by heart.)
    """
    by_class = [(y == c).nonzero().squeeze(1) for c in y.unique()]
    fewest = min(map(len, by_class))
    N = min(N, fewest)
    groups = [torch.cat([rows[start:start + N] for rows in by_class])
              for start in range(0, fewest - N + 1, N)]
    with rift.dropout_off(model.g, model.h):
        values = [model.L_info(S_attacked[rows], T[rows], y[rows]) for rows in groups]
    return {"dev_info": torch.stack(values).mean().item(),
            "info_n": N * len(by_class) if model.marginal else N}


def check_finite(totals, model, epoch, step, adamw):
    """Raises InputError if a loss or the gradient is not finite, before a weight is changed."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if not all(map(math.isfinite, [*totals.values(), norm.item()])):
        values = ", ".join(f"{name} {value:g}" for name, value in totals.items())
        raise InputError(f"epoch {epoch}, step {step + 1}: the loss or its gradient is not finite "
                         f"({values}, gradient norm {norm:g}, learning rate "
                         f"{adamw.param_groups[0]['lr']:g}): start again with a smaller --lr "
                         "and --overwrite")


def finish(model, victim, task, s, folder, best, started):
    """Measures the kept epoch on test, once, and writes the run's model and metrics.json.

    best: {"epoch", "rule", "score"}: the kept epoch, and what chose it; started: see identity().
    """
    clean, hull, _, _ = eval.accuracies(victim, task.test, s, bar="test")
    metrics = {"method": s.method, "task": task.name, "seed": s.seed, "best_epoch": best["epoch"],
               "best_rule": "the highest " + ", of equals the highest ".join(best["rule"])
                            + ", of equals the later",
               "best_score": best["score"],
               "clean": clean, "hull": hull, "test_examples": len(task.test),
               "dev_examples": len(task.dev)}
    parts = {name: p for name, p in trained(model).items() if not name.startswith("encoder.")}
    check_alone(folder, started)
    data.save_tensors(folder / "model.safetensors", parts)
    data.remove(folder / "encoder")     # that of a run whose metrics.json is lost would stay
    with data.replacing(folder / "encoder") as new:
        model.encoder.save_pretrained(new)
        victim.vocabulary.tokenizer.save_pretrained(new)
    data.write_json(folder / "metrics.json", metrics)
    for name in CHECKPOINTS:
        data.remove(folder / name)
    print(f"{folder}: test clean {clean:.3f}, hull {hull:.3f} "
          f"(N {len(task.test)}, epoch {best['epoch']} kept)")


# ---- Checkpoints and folders ---------------------------------------------------------------------

CHECKPOINTS = ("checkpoint.safetensors", "best.safetensors")        # only while it trains
FILES = ("config.json", "neighbors.json", "log.jsonl", "metrics.json", "eval.json", "attacks.jsonl",
         "eval-dev.json", "attacks-dev.jsonl", "model.safetensors", "encoder", *CHECKPOINTS)


def trained(model):
    """{name: tensor} of all that is trained: everything but the teacher. A parameter that two parts
    of the model share is here under both names."""
    return {name: p for name, p in model.state_dict().items() if not name.startswith("teacher.")}


def save_checkpoint(folder, model, adamw, log, best):
    """Writes the state after an epoch: weights, AdamW's moments, log lines, the best epoch."""
    tensors = {f"model.{name}": p for name, p in trained(model).items()}
    for i, state in adamw.state_dict()["state"].items():
        tensors |= {f"adamw.{i}.{key}": value for key, value in state.items()}
    data.save_tensors(folder / "checkpoint.safetensors", tensors, {"log": log, "best": best})


def load_checkpoint(folder, model, adamw):
    """(log, best) of the checkpoint in a folder, ([], None) without one; loads model and adamw."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return [], None
    tensors, about = data.load_tensors(path)
    weights, state = {}, {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "model":
            weights[rest] = tensor
        else:
            i, _, key = rest.partition(".")
            state.setdefault(int(i), {})[key] = tensor
    try:
        if weights.keys() != trained(model).keys():
            raise KeyError
        model.load_state_dict(weights, strict=False)
        adamw.load_state_dict({"state": state, "param_groups": adamw.state_dict()["param_groups"]})
        return about["log"], about["best"]
    except (RuntimeError, KeyError, TypeError, ValueError):
        raise InputError(f"{path}: of another run, or damaged") from None


def open_folder(folder, config):
    """Prepares a run's folder, in which the run may be finished already.

    A run that is there is resumed: without --resume, main() has refused it or removed its
    config.json. Raises InputError where it has other settings, texts, encoder, table or number of
    processes.
    """
    if (folder / "config.json").exists():
        s, before = eval.settings_of(folder, finished=False)
        then = vars(s) | {"processes": before.get("processes")}
        now = config["settings"] | {"processes": config["processes"]}
        other = [key for key in now if key not in eval.INCIDENTAL and then.get(key) != now[key]]
        other += [setting for part, setting in eval.SOURCES.items()
                  if s.fingerprints[part] != config["fingerprints"][part]]
        if other:
            was = then.get(other[0])
            if other[0] in eval.INCIDENTAL:             # a path, perhaps the same as now
                was = f"{was}, whose content was another one"
            # without --resume too, if another train.py has started a run after check_first()
            raise InputError(f"{folder}: the run in it was started with {other[0]} {was}, and goes "
                             f"on with the same only, not {now[other[0]]}")
        config = before
    else:
        for name in FILES:
            data.remove(folder / name)
    data.write_json(folder / "config.json", config)     # also on resuming, see identity()
    for path in folder.glob(".*.tmp"):                  # of a run that was killed as it wrote
        data.remove(path)
    if (folder / "metrics.json").exists():
        print(f"{folder}: finished already", file=sys.stderr)
        for name in CHECKPOINTS:                        # if it was killed as it removed them
            data.remove(folder / name)


def identity(folder):
    """(inode, time) of a folder's config.json, which change when another train.py starts there."""
    path = folder / "config.json"
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


def check_alone(folder, started):
    """Raises InputError if the folder's identity() is not `started`: another train.py is in it."""
    if identity(folder) != started:
        raise InputError(f"{folder}: another train.py has started in it meanwhile; this one stops")


# ---- Several processes ---------------------------------------------------------------------------
# Every process draws the same batches and takes its share of each, has its own dropout and noise,
# and computes its own x^. rift.info compares the texts of all; the gradients are averaged, so that
# all take the same step. Each measures all of dev itself, so nothing is exchanged for that. The
# first one reads the data and fills the caches before the others read them; it alone writes files
# and measures test. All have the same first weights by the seed, and each computes the teacher's
# features of all texts. The folder --out has to be one that all see. eval.py is one process.


def processes():
    """(rank, number) of the processes that torchrun started; (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def first_process_first():
    """A `with` block that the first process enters at once, the others when it has left it.

    If the first one fails in it, the others wait until torchrun ends them.
    """
    rank, world = processes()
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and world > 1:
        dist.barrier()


def share(rows, y, rank, world):
    """This process's part of a balanced batch: of each class every world-th text.

    rows: (B,) ints; y: (B,), their classes. Every process gets the same number of texts; what is
    left of a class after that is left out. Raises InputError where a class has fewer texts than
    there are processes.
    """
    parts = [rows[y.numpy() == c] for c in y.unique().tolist()]                     # C arrays of N
    N = len(parts[0]) // world
    if N == 0:
        raise InputError(f"--batch-size: each of {world} processes needs a text of every class, "
                         f"but a batch has only {len(parts[0])} of each")
    return np.concatenate([part[rank:N * world:world] for part in parts])


def average(model, totals, world):
    """Replaces every gradient by its mean over the processes; returns the means of `totals`."""
    if world == 1:
        return totals
    values = torch.tensor(list(totals.values()), device=model.encoder.device)
    for x in [values, *(p.grad for p in model.parameters() if p.grad is not None)]:
        dist.all_reduce(x)
        x /= world
    return Counter(dict(zip(totals, values.tolist())))


# ---- One run: a method and a seed ----------------------------------------------------------------


def digest_of(encoder):
    """The fingerprint of an encoder's weights."""
    return data.fingerprint(b"".join(p.detach().numpy().tobytes() for p in encoder.parameters()))


def run(task, table, fingerprints, s, folder, teacher_features):
    """Trains one method with one seed in its folder.

    fingerprints: of data, table and encoder; teacher_features: {digest of the encoder: [T, T_dev]},
    filled here and used again by the next runs of a command. Raises InputError for settings that do
    not fit the model, the data, or a run that is there.
    """
    rank, world = processes()
    config = {"settings": vars(s), "labels": task.labels, "parts": len(task.train[0].words),
              "fingerprints": fingerprints, "processes": world,
              "versions": {"python": platform.python_version(), "torch": torch.__version__,
                           "transformers": transformers.__version__, "numpy": np.__version__,
                           "nltk": nltk.__version__}}           # which splits texts into words
    with first_process_first():                         # the others wait until the folder is ready
        if rank == 0:
            open_folder(folder, config)
        started = identity(folder)
    if (folder / "metrics.json").exists():              # finished already: every process sees that
        return
    torch.manual_seed(s.seed)   # for the head, the projections, and a pooler that was not trained
    encoder, tokenizer = data.load_encoder(s.model)
    digest = digest_of(encoder)
    model = rift.RIFT(encoder, len(task.labels), s.pooling, s.method == "rift-marginal",
                      data.DTYPES[s.precision], s.mixout if s.method == "adv-mixout" else None,
                      s.tau)
    model.to(data.pick_device(s.device))
    vocabulary = data.Vocabulary(tokenizer, s.max_len, table, s.unknown_words, s.candidates)
    if digest not in teacher_features:
        victim = eval.Victim(model, vocabulary, s.eval_batch_size)
        bar = "teacher's features" if rank == 0 else None
        teacher_features[digest] = [
            victim.features([x.words for x in split], model.teacher, bar)
            for split in (task.train, task.dev)]
    if rank == 0:
        data.write_json(folder / "neighbors.json", table)
        warn(vocabulary, task)
        counts = Counter(task.labels[x.y] for x in task.train)
        classes = ", ".join(f"{counts[label]:,} {label}" for label in task.labels)
        print(f"{folder}: trains on {classes}; dev {len(task.dev):,}, test {len(task.test):,}")
    train(model, task, vocabulary, s, folder, started, *teacher_features[digest])


def warn(vocabulary, task):
    """Prints a line for each thing that is allowed but hardly meant."""
    unknown = data.unknown_share(vocabulary, task.train)
    if unknown > 0.2:
        print(f"{unknown:.0%} of the training words are unknown to the model's tokenizer, or cut "
              "to one character: is it a model for this language?", file=sys.stderr)
    no_room = [x for x in task.train if x.words[-1] and not vocabulary.visible(x.words)[-1]]
    if no_room:
        print(f"{len(no_room) / len(task.train):.1%} of the training pairs have a first text that "
              f"fills --max-len {vocabulary.max_len}: no word of the second is seen",
              file=sys.stderr)
    rarest, fewest = Counter(x.y for x in task.train).most_common()[-1]
    if (reads := fewest * len(task.labels)) < 0.2 * len(task.train):
        print(f"batches have every class equally often: an epoch reads only {reads:,} of "
              f"{len(task.train):,} training texts, because {task.labels[rarest]} has {fewest:,}",
              file=sys.stderr)
    for split in ("dev", "test"):
        for c in {*range(len(task.labels))} - {x.y for x in getattr(task, split)}:
            print(f"{split} has no text of class {task.labels[c]}", file=sys.stderr)


# ---- The toy task's pre-trained encoder ----------------------------------------------------------


def bert_tokenizer(tokens):
    """A BERT tokenizer whose vocabulary is the list `tokens`."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.txt").write_text("\n".join(tokens))
        return BertTokenizer.from_pretrained(folder)


def pretrain_toy(folder, steps=1000, batch_size=32, lr=3e-3, masked=0.4):
    """Pre-trains a BERT of 2 layers, 64 wide, on the toy grammar by masked-language modelling.

    Of the tokens, `masked` are predicted: 80% of these become [MASK], 10% another word, 10% stay
    (Devlin et al. 2019). Saves encoder and tokenizer in `folder`.
    """
    torch.manual_seed(0)
    texts = data.toy_pretraining_texts()
    words = sorted({word for text in texts for word in text.split()})
    tokenizer = bert_tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=64, initializer_range=0.1)
    model = BertForMaskedLM(config).train()
    adamw = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adamw, lr, total_steps=steps)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=masked)
    encoded = [tokenizer(text) for text in texts]
    for _ in tqdm(range(steps), "pre-training the toy encoder", leave=False, disable=None):
        rows = torch.randint(len(texts), (batch_size,)).tolist()
        loss = model(**collate([encoded[i] for i in rows])).loss
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        schedule.step()
    encoder = BertModel(config)                         # its pooler stays random, nothing trains it
    encoder.load_state_dict(model.bert.state_dict(), strict=False)
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def toy_encoder():
    """The folder of the toy task's pre-trained encoder, from the cache or made now.

    Its name has a hash of the code, the texts and the versions that make it. Another processor can
    still round differently.
    """
    made_of = [inspect.getsource(bert_tokenizer), inspect.getsource(pretrain_toy),
               data.toy_pretraining_texts(), torch.__version__, transformers.__version__]
    folder = data.cache_dir() / f"toy-encoder-{data.fingerprint(made_of)[:16]}"
    if (folder / "config.json").exists():
        print(f"The toy task's pre-trained encoder is taken from {folder}", file=sys.stderr)
    else:
        with data.replacing(folder) as new:
            pretrain_toy(new)
    return folder


# ---- The command line ----------------------------------------------------------------------------


def parse(argv):
    """The command line of train.py -> (arguments, settings of a run without method and seed)."""
    number, positive = data.number, data.number(int, 1)
    p = argparse.ArgumentParser(
        prog="train.py", usage=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Fine-tune BERT or RoBERTa with RIFT. Defaults are those of the paper and its "
        "code for the task. Downloads and what is computed once go to ~/.cache/rift or "
        "$RIFT_CACHE, encoders to Hugging Face's cache.")
    flag = p.add_argument
    run_options = {"method", "seeds", "out", "resume", "overwrite"}
    flag("--task", default="toy", metavar="TASK",
         help="toy, imdb, snli, or a folder with train.tsv, test.tsv and perhaps dev.tsv")
    flag("--method", nargs="+", choices=rift.METHODS, metavar="NAME",
         help=f"one or more of {', '.join(rift.METHODS)}; they train one after another")
    flag("--seeds", nargs="+", type=number(int, 0, 2**32 - 1), default=[0], metavar="S",
         help="one run for each; it seeds heads, batches, dropout, mixout, the adversary's noise, "
         "and a pooler that was never trained")
    flag("--model", metavar="NAME_OR_DIR",
         help="a BERT or RoBERTa encoder, on the hub or in a folder")
    flag("--pooling", choices=("pooler", "mean"), help="S and T: the encoder's pooler, or the mean "
         "over tokens")
    flag("--unknown-words", choices=("piece", "unk"), default="piece",
         help="a word outside the vocabulary becomes its first piece, or [UNK] (authors' code, for "
         "BERT)")
    flag("--device", metavar="NAME", help="cpu, cuda:0, ..; None: a GPU if there is one")
    flag("--precision", choices=("auto", "fp32", "bf16"), default="auto",
         help="format of the encoder's numbers (losses: fp32); auto: bf16 on GPUs that have it")
    flag("--data-dir", metavar="DIR", help="where archives, tables and NLTK data are looked for "
         "first; None: the cache")
    flag("--neighbors", metavar="TABLE", help="substitution table: published (Jia et al.'s, which "
         "the paper uses), vectors (computed from the counter-fitted ones), wordnet, or a file: "
         "vectors .txt or .zip, or a .json {word: [synonym, ..]} of single lower-case words, in "
         "--data-dir or here (./FILE: only here); the toy has its own")
    flag("--train-size", type=positive, metavar="N",
         help="training texts to use, equally many of each class; None: all (toy: 128)")
    flag("--dev-size", type=positive, metavar="N", help="dev texts, which choose the epoch; None: "
         "all (toy: 80), or where there is no dev set a tenth of train, at most 1000")
    flag("--test-size", type=positive, metavar="N",
         help="test texts to use, equally many of each class; None: all (toy: 200)")
    flag("--split-seed", type=number(int, 0), default=0, metavar="S",
         help="chooses the subsets, the same for every method and seed")
    flag("--max-len", type=number(int, 4), metavar="L",
         help="longest input, special tokens included")
    flag("--epochs", type=positive, metavar="N", help="passes over the smallest class")
    flag("--batch-size", type=number(int, 4), metavar="B",
         help="texts in a step; rounded down to a multiple of the number of classes")
    flag("--micro-batch-size", type=number(int, 4), metavar="B",
         help="texts in a forward pass; their gradients add up to the batch's, but L_info "
         "compares only these (of all processes); None: the batch")
    flag("--eval-batch-size", type=positive, default=64, metavar="B",
         help="texts in a forward pass of evaluation")
    flag("--lr", type=number(float, 0, above=True), metavar="X",
         help="learning rate of AdamW after the warm-up")
    flag("--schedule", type=number(float, 0), nargs="+", metavar="F",
         help="factors of lr in the first epochs; the last one holds from then on. None: 0.1 0.55 "
         "1, shortened where the warm-up would take more than a third of the epochs")
    flag("--weight-decay", type=number(float, 0), default=2e-4, metavar="X",
         help="weight decay of AdamW on head and projections; the encoder has none")
    flag("--adam-eps", type=number(float, 0, above=True), default=1e-6, metavar="X",
         help="epsilon of AdamW")
    flag("--alpha", type=number(float, 0), metavar="X", help="weight of L_info")
    flag("--beta", type=number(float, 0), metavar="X", help="weight of KL")
    flag("--tau", type=number(float, 0, above=True), default=0.2, metavar="X",
         help="temperature of the score f_c")
    flag("--adv-steps", type=number(int, 0), default=10, metavar="N",
         help="steps of the search in the hull; 0: noise only")
    flag("--adv-lr", type=number(float, 0), default=1.0, metavar="X",
         help="learning rate of the search's Adam")
    flag("--adv-weight-decay", type=number(float, 0), default=2e-5, metavar="X",
         help="weight decay of the search's Adam")
    flag("--sparsity", type=number(float, 0), default=15.0, metavar="X",
         help="weight of the entropy, which pushes the search towards single words")
    flag("--candidates", type=number(int, 1, 1000), default=10, metavar="K",
         help="words at a position of the hull, the word itself included")
    flag("--ptwd", type=number(float, 0), default=0.01, metavar="X",
         help="lambda of adv-ptwd, weight of ||theta_s - theta_t||")
    flag("--mixout", type=number(float, 0, 0.999), default=0.7, metavar="P", help="p of adv-mixout")
    flag("--out", type=Path, metavar="DIR", help="each run has its folder OUT/METHOD, with several "
         "seeds OUT/METHOD-SEED; None: runs/TASK")
    flag("--resume", action="store_true", help="go on with runs that were stopped")
    flag("--overwrite", action="store_true", help="replace runs that are there (the toy "
         "task does so unless --out or --resume is given)")
    # the task first: the defaults depend on it, also those that --help shows
    task = p.parse_known_args([word for word in argv if word not in ("-h", "--help")])[0].task
    p.set_defaults(**TASKS.get(task, TASKS["imdb"]))
    args = p.parse_args(argv)
    if task not in TASKS and not Path(task).is_dir():
        raise InputError(f"--task {task}: no such folder, and not toy, imdb or snli")
    if task not in TASKS:                               # ./imdb is a folder, whatever its name
        args.task = os.path.abspath(task)               # a link keeps its own name
    elif Path(task).is_dir():
        print(f"--task {task} is the public task; the folder here is --task ./{task}",
              file=sys.stderr)
    if task == "toy" and args.model != "toy":
        raise InputError(f"--model {args.model}: the toy task has an encoder of its own")
    if args.resume and args.overwrite:
        raise InputError("--resume and --overwrite: only one of them")
    args.method, args.seeds = list(dict.fromkeys(args.method)), list(dict.fromkeys(args.seeds))
    args.overwrite |= task == "toy" and args.out is None and not args.resume
    if Path(args.task).name == "toy" != task and args.out is None:
        raise InputError(f"--task {task}: wanted --out DIR as well, because `python train.py` "
                         "replaces what is in runs/toy")
    args.out = Path(os.path.expanduser(args.out or Path("runs") / Path(args.task).name))
    if args.data_dir:                                   # eval.py may be started in another folder
        args.data_dir = os.path.abspath(os.path.expanduser(args.data_dir))
    if args.schedule is None:
        n = min(args.epochs // 3, 2)                    # warm-up: at most a third of the epochs
        args.schedule = [0.1, 0.55][2 - n:] + [1.0]
    args.precision = data.pick_precision(args.precision, data.pick_device(args.device))
    settings = {key: value for key, value in vars(args).items() if key not in run_options}
    return args, SimpleNamespace(**settings)


def check_first(folders, s, resume, overwrite):
    """Raises InputError for what is cheap to check, before minutes are spent on reading texts.
    Prints a line if there is nothing to resume."""
    for folder in folders:
        if (folder / "config.json").exists() and not (resume or overwrite):
            there, _ = eval.settings_of(folder, finished=False)
            raise InputError(f"{folder}: holds a run already; --resume goes on with it, "
                             "--overwrite replaces it, or choose another --out (it is a run on "
                             f"{there.task})")
        data.check_writable(folder)
    if resume and not any((folder / "config.json").exists() for folder in folders):
        print(f"--resume: none of these runs is there, such as {min(folders)}; they start anew",
              file=sys.stderr)
    if s.neighbors:
        data.find_neighbors(s.neighbors, s.data_dir)


def check(s, task, table, methods):
    """Raises InputError where the texts, the table or the batches do not suffice."""
    C = len(task.labels)
    if len(task.dev) < max(4, 2 * C):
        raise InputError(f"--dev-size: dev has {len(task.dev)} texts, wanted at least "
                         f"{max(4, 2 * C)}")
    changeable = any(any(data.substitutes(x.words[-1], table)) for x in task.train)
    if not changeable and any(map(rift.has_adversary, methods)):
        raise InputError(f"--neighbors {s.neighbors}: has no synonym for any word of the training "
                         "texts (a table's keys are single lower-case words, neighbours of vectors "
                         "lie within a squared distance of 0.5)")
    if s.batch_size < 2 * C:                            # before the teacher reads all texts
        raise InputError(f"--batch-size {s.batch_size}: wanted at least {2 * C}, two texts of each "
                         f"of {C} classes")


def start_processes(s):
    """Joins the processes that torchrun has started, if it has. Raises InputError where its
    environment variables are there only in part."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return
    missing = [x for x in ("RANK", "MASTER_ADDR", "MASTER_PORT") if x not in os.environ]
    if missing:
        raise InputError(f"the environment has WORLD_SIZE but not {missing[0]}: start with "
                         "torchrun, or remove it")
    # the others wait while the first one reads texts or, before a next run, measures test: hours
    backend = "nccl" if data.pick_device(s.device).type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))


@data.command
def main(argv):
    """train.py's command line."""
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        # from here on the device "cuda" is a GPU of this process's own
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    args, s = parse(argv)
    start_processes(s)
    rank, _ = processes()
    folders = {(method, seed): args.out / (method if len(args.seeds) == 1 else f"{method}-{seed}")
               for method in args.method for seed in args.seeds}
    if rank == 0:
        check_first(folders.values(), s, args.resume, args.overwrite)
        data.warn_of_slow_bf16([s.precision], data.pick_device(s.device))
    with first_process_first():                         # it fills the caches
        if s.task == "toy":
            s.model = str(toy_encoder())
        # its fingerprint must not depend on the seed: a pooler that was never trained is drawn
        torch.manual_seed(0)
        digest = digest_of(data.load_encoder(s.model, s.max_len)[0])
        task = data.open_task(s)
        table = data.open_table(s, task)
    check(s, task, table, args.method)
    fingerprints = {"data": task.fingerprint, "neighbors": data.fingerprint(table),
                    "encoder": digest}
    if args.overwrite and rank == 0:    # all now: after a stop --resume must find no old run
        for folder in folders.values():
            data.remove(folder / "config.json")         # a folder without it holds no run
    teacher_features = {}                               # see run()
    for number, ((method, seed), folder) in enumerate(folders.items(), 1):
        settings = SimpleNamespace(**vars(s) | {"method": method, "seed": seed})
        try:
            run(task, table, fingerprints, settings, folder, teacher_features)
        except KeyboardInterrupt:
            goes_on = number > 1 or (folder / "checkpoint.safetensors").exists()
            flag = "--resume in place of --overwrite" if "--overwrite" in argv else "--resume"
            raise KeyboardInterrupt(f"the same command with {flag} goes on" if goes_on else
                                    "no epoch was finished yet") from None
    if args.task == "toy" and rank == 0:
        device = ["--device", args.device] if args.device else []
        eval.main([*map(str, folders.values()), *device, "--attacks", "pwws", "genetic",
                   "--population", "20", "--generations", "10",
                   "--num-examples", str(min(len(task.test), 200)), "--show", "1"])


if __name__ == "__main__":
    main()
