"""Fine-tune BERT or RoBERTa with RIFT, or with a method that the paper compares it with.

    python train.py                                   the embedded toy task: train, attack, compare
    python train.py --task imdb                       the paper's setting
    torchrun --nproc-per-node 8 train.py --task imdb  the same on eight GPUs

A step: a class-balanced batch -> the adversary's mixture w (rift.adversary) -> the terms of the loss (RIFT.forward)
-> AdamW. All that is random in a step follows from (seed, step): a run that was killed goes on from its last
checkpoint to the same weights, bit for bit, as one that never stopped.
"""
import argparse
import hashlib
import json
import math
import shlex
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import BertConfig, BertForMaskedLM, BertModel, BertTokenizer

import data
import eval
import rift
from data import InputError
from eval import Processes, number, positive

# The terms that each method adds to the cross-entropy. What is not listed is not computed.
METHODS = {
    "standard": (),
    "adv": ("kl",),
    "adv-ptwd": ("kl", "ptwd"),
    "adv-mixout": ("kl", "mixout"),
    "rift-marginal": ("kl", "info"),
    "rift": ("kl", "info"),
}

# The paper's numbers where tasks differ, and the toy task's own. A folder of own data starts from imdb's.
PAPER = dict(method=["rift"], model="bert-base-uncased", pooling="pooler", epochs=20, lr=2e-5)
TASKS = {
    "imdb": PAPER | dict(max_len=300, batch_size=32, beta=10.0, alpha=0.1),
    "snli": PAPER | dict(max_len=80, batch_size=120, beta=5.0, alpha=0.7),
    "toy": dict(method=["standard", "adv", "rift"], model="toy", pooling="mean", epochs=10, lr=2e-3, max_len=64,
                batch_size=16, beta=5.0, alpha=0.2),
}


# ---- The state of a run --------------------------------------------------------------------------


class Training:
    """A fine-tuning run: all that changes while it trains, and how that is saved and loaded."""

    def __init__(self, model, s, processes):
        self.model, self.processes = model, processes
        self.parallel = processes.wrap(model)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        own = [p for name, p in self.parameters.items() if not name.startswith("encoder.")]
        groups = [{"params": list(model.encoder.parameters()), "weight_decay": 0.0},
                  {"params": own, "weight_decay": s["weight_decay"]}]
        self.adamw = torch.optim.AdamW(groups, lr=s["lr"], eps=s["adam_eps"])
        for p in self.parameters.values():                              # as AdamW would at its first step
            self.adamw.state[p] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p),
                                   "exp_avg_sq": torch.zeros_like(p)}
        self.progress = {"epoch": 0, "batch": 0, "step": 0,                 # where the next step stands
                         "sums": {}, "seconds": 0.0,                        # of this epoch so far
                         "best": {"epoch": None, "dev_hull": -1.0}, "log": []}

    def tensors(self):
        """All tensors of the state, by name: weights and AdamW's moments."""
        moments = {f"adamw.{name}.{key}": value for name, p in self.parameters.items()
                   for key, value in self.adamw.state[p].items()}
        return {f"model.{name}": p for name, p in self.parameters.items()} | moments

    def save(self, path):
        """Writes the whole state to one file (the first process does). Raises InputError if it can't."""
        if self.processes.rank == 0:
            eval.save_tensors(path, self.tensors(), self.progress)

    def load(self, path):
        """Takes the state of save() up again. Raises InputError for a damaged file, or one of another model."""
        tensors, progress = eval.load_tensors(path)
        eval.take_tensors(self.tensors(), tensors, path)
        if not isinstance(progress, dict) or progress.keys() != self.progress.keys():
            raise InputError(f"{path}: does not say where the run stands, as train.py writes it")
        self.progress = progress


@contextmanager
def stoppable(processes):
    """Inside, SIGINT (Ctrl-C) and SIGTERM wait: yields a function that raises KeyboardInterrupt, in all processes at
    the same step, if one came."""
    came = []
    handlers = {n: signal.signal(n, lambda *_: came.append(1)) for n in (signal.SIGINT, signal.SIGTERM)}

    def check():
        if processes.mean({"came": len(came)})["came"] > 0:
            raise KeyboardInterrupt

    try:
        yield check
    finally:
        for n, handler in handlers.items():
            signal.signal(n, handler)


# ---- One step, one epoch, one run ----------------------------------------------------------------


def slices(y, size):
    """The rows of a batch in class-balanced slices of about `size` texts, for gradient accumulation.

    y: (B,) int64, every class equally often. Returns a list of index tensors. L_info compares the texts of a
    slice: its N is the slice's, not the batch's (a last slice of one text a class adds 0).
    """
    rows = torch.stack([(y == c).nonzero().squeeze(1) for c in y.unique()])             # (C, N)
    return [part.flatten() for part in rows.split(max(size // len(rows), 2), dim=1)]


def train_step(training, batch, y, T, s):
    """One step of Algorithm 1.

    batch: the tensors of Vocabulary.encode, on the model's device; y: (B,) int64; T: (B, H) teacher features, None
    for methods without L_info. Returns {"loss": .., and each term: ..} as floats. Raises InputError when one is
    not finite, before any weight is changed.
    """
    model, adds = training.model, METHODS[s["method"]]
    weight = {"ce": 1.0, "kl": s["beta"], "info": s["alpha"], "ptwd": s["ptwd"]}
    totals = Counter()
    training.adamw.zero_grad()
    for rows in slices(y, s["micro_batch_size"] or len(y)):
        part = {name: tensor[rows] for name, tensor in batch.items()}
        w = None
        if "kl" in adds:
            with eval.autocast(y.device, s["precision"]):
                w = rift.adversary(model.encoder, model.head, **part, v=rift.noise(part["subs"], s["max_len"]),
                                   pooling=s["pooling"], **eval.search_settings(s))
        with eval.autocast(y.device, s["precision"]):
            terms = training.parallel(
                **part, y=y[rows], w=w, T=None if T is None else T[rows], tau=s["tau"], ptwd="ptwd" in adds,
                mixout_p=s["mixout"] if "mixout" in adds else 0.0, gather=training.processes.gather)
        terms["loss"] = sum(weight[name] * value for name, value in terms.items())
        share = len(rows) / len(y)
        (terms["loss"] * share).backward()
        for name, value in terms.items():
            totals[name] += value.item() * share
    totals = training.processes.mean(dict(totals))
    if not all(map(math.isfinite, totals.values())):
        raise InputError(f"the loss is not finite at step {training.progress['step']} "
                         f"({', '.join(f'{name} {value:g}' for name, value in totals.items())}, learning rate "
                         f"{training.adamw.param_groups[0]['lr']:g}): start anew with a smaller --lr (--overwrite, or another "
                         "--out)")
    training.adamw.step()
    return totals


def epoch_batches(y, lengths, s, epoch, processes):
    """The class-balanced batches of an epoch, of each this process's share: the same whenever they are drawn.

    y, lengths: (n,) class and length of each training text. Returns a list of int arrays. Raises InputError where no
    batch has a text of each class for each process.
    """
    drawn = data.balanced_batches(y, lengths, s["batch_size"], np.random.default_rng([s["seed"], epoch]))
    C = len(np.unique(y))
    batches = [processes.share(rows, y[rows]) for rows in drawn if len(rows) >= C * processes.world]
    if not batches:
        raise InputError(f"--batch-size {s['batch_size']}: too small for {C} classes on {processes.world} processes: each "
                         "needs one text of every class")
    return batches


def train_epoch(training, vocabulary, texts, y, T, s, folder, check):
    """Algorithm 1, one epoch, from the batch where `training` stands; a checkpoint every --save-minutes.

    texts, y: n training texts as words and their classes (n,); T: (n, H) teacher features or None; check: called
    before every step, raises KeyboardInterrupt when the run is to stop.
    """
    at, device, processes = training.progress, training.model.encoder.device, training.processes
    for group in training.adamw.param_groups:
        group["lr"] = s["lr"] * s["schedule"][min(at["epoch"], len(s["schedule"]) - 1)]
    batches = epoch_batches(y, [sum(map(len, words)) for words in texts], s, at["epoch"], processes)
    bar = tqdm(batches[at["batch"]:], f"{s['method']} epoch {at['epoch'] + 1}/{s['epochs']}", total=len(batches),
               initial=at["batch"], leave=False, disable=processes.rank > 0)
    training.model.train()
    saved = time.monotonic()
    for rows in bar:
        check()
        start = time.monotonic()
        seed = np.random.SeedSequence([s["seed"], at["step"], processes.rank]).generate_state(1)[0]
        torch.manual_seed(int(seed))                                            # dropout and the adversary's noise
        batch = vocabulary.encode([texts[i] for i in rows], hull="kl" in METHODS[s["method"]])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        totals = train_step(training, batch, torch.as_tensor(y[rows], device=device), None if T is None else T[rows], s)
        at["sums"] = {name: at["sums"].get(name, 0.0) + value for name, value in totals.items()}
        at["batch"], at["step"] = at["batch"] + 1, at["step"] + 1
        at["seconds"] += time.monotonic() - start
        bar.set_postfix({name: f"{value:.3f}" for name, value in totals.items()})
        if at["step"] == 3 and processes.rank == 0:
            announce(at["seconds"] / at["batch"] * len(batches) * s["epochs"], device)
        if time.monotonic() - saved > 60 * s["save_minutes"]:
            training.save(folder / "checkpoint.safetensors")
            saved = time.monotonic()


def accuracies(victim, examples, s, progress=False):
    """The model's accuracy on examples, clean and on the hull, and its features of them: (clean, hull, S (N, H))."""
    S = victim.features([x.words for x in examples])
    hull, _ = eval.hull_attack(victim, examples, **eval.search_settings(s), progress=progress)
    return eval.accuracy(victim.probabilities(S).argmax(-1), examples), eval.accuracy(hull, examples), S


def end_epoch(training, victim, dev, T_dev, s, folder):
    """Measures on dev how accurate the model is and how much it forgot, logs that, and keeps its weights if it was at
    no earlier epoch as robust there. T_dev: (N, H), the teacher's features of dev. Raises InputError."""
    at, first = training.progress, training.processes.rank == 0
    clean, hull, S = accuracies(victim, dev, s)
    line = {"epoch": at["epoch"], **{name: total / at["batch"] for name, total in at["sums"].items()},
            "dev_clean": clean, "dev_hull": hull,
            "params_l2": rift.pretrained_distance(training.model.encoder, training.model.teacher).item(),
            "cka": rift.linear_cka(S, T_dev), "lr": training.adamw.param_groups[0]["lr"],
            "seconds": round(at["seconds"], 3)}
    if hull > at["best"]["dev_hull"]:
        at["best"] = {"epoch": at["epoch"], "dev_hull": hull}
        if first:
            eval.save_tensors(folder / "best.safetensors", training.parameters)
    at |= {"epoch": at["epoch"] + 1, "batch": 0, "sums": {}, "seconds": 0.0, "log": at["log"] + [line]}
    if first:                                       # before the checkpoint: a run killed in between writes it again
        data.write_atomically(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in at["log"]))
        tqdm.write(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()), sys.stderr)
    training.save(folder / "checkpoint.safetensors")


def fit(training, task, vocabulary, s, folder):
    """Trains until the last epoch, from where `training` stands, and keeps the best epoch's weights.

    After each epoch, every --save-minutes, and when stopped, the state goes to folder/checkpoint.safetensors;
    the best epoch by robust accuracy on dev (hull) to folder/best.safetensors. Raises KeyboardInterrupt when stopped,
    InputError where a loss is not finite, a file cannot be written, or a batch has no text for each process.
    """
    at, model = training.progress, training.model
    victim = eval.Victim(model, vocabulary, s["eval_batch_size"], s["precision"])
    texts = [vocabulary.visible(x.words) for x in task.train]
    y = np.array([x.y for x in task.train])
    # The teacher is frozen and sees clean text only: one pass over the data serves every epoch.
    T = victim.features(texts, model.teacher) if "info" in METHODS[s["method"]] else None           # (n, H)
    T_dev = victim.features([x.words for x in task.dev], model.teacher)
    with stoppable(training.processes) as check:
        try:
            while at["epoch"] < s["epochs"]:
                train_epoch(training, vocabulary, texts, y, T, s, folder, check)
                end_epoch(training, victim, task.dev, T_dev, s, folder)
                check()                             # also for what came after the last step
        except KeyboardInterrupt:
            training.save(folder / "checkpoint.safetensors")
            raise


def announce(seconds, device):
    """Says what a long run on a CPU will cost, and what makes it small. seconds: estimated from the first steps."""
    if device.type == "cpu" and seconds > 3600:
        tqdm.write(f"At this pace the run takes about {seconds / 3600:.1f} h on this CPU. Smaller: --train-size, --max-len, "
                   "--epochs, --adv-steps, --precision bf16, a smaller --model.", sys.stderr)


CHECKPOINTS = ("checkpoint.safetensors", "best.safetensors")                     # while it trains
FILES = ("config.json", "neighbors.json", "log.jsonl", "metrics.json", "eval.json", "attacks.jsonl", "eval-dev.json",
         "attacks-dev.jsonl", "model.safetensors", *CHECKPOINTS)


def finish(training, task, vocabulary, s, folder):
    """The best epoch's weights, measured once on test, become the run's model. Returns the metrics. Raises InputError
    where they cannot be read, or the model cannot be written."""
    eval.take_tensors(training.parameters, eval.load_tensors(folder / "best.safetensors")[0], folder / "best.safetensors")
    model = training.model.eval()
    victim = eval.Victim(model, vocabulary, s["eval_batch_size"], s["precision"])
    clean, hull, _ = accuracies(victim, task.test, s, progress=True)
    eval.save_tensors(folder / "model.safetensors",
                      {name: p for name, p in training.parameters.items() if not name.startswith("encoder.")})
    with data.replacing(folder / "encoder") as new:
        data.remove(folder / "encoder")                 # of a run that was killed while it finished
        model.encoder.save_pretrained(new)
        vocabulary.tokenizer.save_pretrained(new)
    metrics = {"method": s["method"], "task": task.name, "seed": s["seed"],
               "best_epoch": training.progress["best"]["epoch"], "clean": clean, "hull": hull}
    eval.write_json(folder / "metrics.json", metrics)
    with data.writing(folder):
        for name in CHECKPOINTS:
            data.remove(folder / name)
    return metrics


def open_folder(folder, config, resume, overwrite):
    """Makes sure that a run may write into its folder. Returns whether there is nothing left to do.

    Raises InputError for a folder that holds a run, unless it is to be overwritten, or resumed with the same settings,
    and for one that cannot be written.
    """
    there = (folder / "config.json").exists() and not overwrite
    done = there and (folder / "metrics.json").exists()
    if there:
        if not resume:
            raise InputError(f"{folder}: holds a run already; --resume goes on with it, --overwrite replaces it, or "
                             "choose another --out")
        before = eval.read_json(folder / "config.json")
        for part in ("settings", "fingerprints"):
            if not isinstance(before.get(part), dict):
                raise InputError(f"{folder / 'config.json'}: has no {part}, as train.py writes them")
            for key, value in config[part].items():
                then = before[part].get(key)
                if then != value and key not in eval.INCIDENTAL:
                    raise InputError(f"{folder}: --resume with {key} {value}, but the run has {then}")
    left = CHECKPOINTS if done else [] if there else [*FILES, "encoder"]
    with data.writing(folder):
        for path in (*(folder / name for name in left), *folder.glob(".*.tmp")):    # .tmp: it was killed as it wrote
            data.remove(path)
    if not there:
        eval.write_json(folder / "config.json", config)
    return done


def run(task, table, s, folder, processes, resume=False, overwrite=False):
    """One method, one seed: trains in `folder` and returns nothing; the results are its files. Raises InputError for
    settings that do not fit the model, the data or the run that is there, and KeyboardInterrupt when
    stopped."""
    device = processes.device(s["device"])
    if s["model"] == "toy":
        s = s | {"model": str(toy_encoder())}
    torch.manual_seed(s["seed"])                                # poolers, heads and projections that start at random
    encoder, tokenizer = eval.load_encoder(s["model"], attention=eval.attention_for(device, s["precision"]))
    if s["max_len"] > eval.longest_input(encoder):
        raise InputError(f"--max-len {s['max_len']}: {s['model']} has positions for {eval.longest_input(encoder)} tokens "
                         "at most")
    y = [x.y for x in task.train]
    data.balanced_batches(y, y, s["batch_size"], np.random.default_rng(0))      # refuses what cannot be balanced
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in encoder.parameters()))
    config = {"settings": s, "labels": task.labels, "parts": len(task.train[0].words),
              "fingerprints": {"data": task.fingerprint, "neighbors": data.table_fingerprint(table),
                               "encoder": digest.hexdigest()},
              "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}}
    if processes.rank == 0:
        done = open_folder(folder, config, resume, overwrite)
        if isinstance(table, dict) and not done:
            data.write_atomically(folder / "neighbors.json", json.dumps(table))
    processes.wait()
    if (folder / "metrics.json").exists():
        print(f"{folder}: finished already", file=sys.stderr)
        return
    model = rift.RIFT(encoder, len(task.labels), s["pooling"], s["method"] == "rift-marginal").to(device)
    vocabulary = data.Vocabulary(tokenizer, s["max_len"], table, s["unknown_words"], s["candidates"])
    training = Training(model, s, processes)
    if (folder / "checkpoint.safetensors").exists():
        training.load(folder / "checkpoint.safetensors")
    fit(training, task, vocabulary, s, folder)
    if processes.rank == 0:
        metrics = finish(training, task, vocabulary, s, folder)
        print(f"{folder}: test clean {metrics['clean']:.3f}, hull {metrics['hull']:.3f} "
              f"(N = {len(task.test)}, best epoch {metrics['best_epoch'] + 1} on dev)")
    processes.wait()


# ---- The toy task's pre-trained encoder ----------------------------------------------------------


def pretrain_toy(folder, steps=1000, batch_size=32, lr=3e-3, masked=0.4):
    """Pre-trains a BERT of 2 layers, 64 wide, on the toy grammar by masked-language modelling; saves it in `folder`.

    Of the tokens, `masked` are predicted: 80% of these are [MASK], 10% another word, 10% left (Devlin et al. 2019).
    """
    torch.manual_seed(0)
    texts = data.toy_pretraining_texts()
    words = sorted({word for text in texts for word in text.split()})
    tokenizer = BertTokenizer(vocab={w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])})
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=128, max_position_embeddings=64, initializer_range=0.1)
    model = BertForMaskedLM(config).train()
    adamw = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adamw, lr, total_steps=steps)
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    for _ in tqdm(range(steps), "pre-training the toy encoder", leave=False):
        rows = torch.randint(len(texts), (batch_size,))
        mask = encoded["attention_mask"][rows]
        ids, mask = (x[:, :mask.sum(1).max()] for x in (encoded["input_ids"][rows], mask))          # (B, L)
        chosen = (torch.rand(ids.shape) < masked) & (ids >= 5)
        r = torch.rand(ids.shape)
        x = torch.where(chosen & (r < 0.8), tokenizer.mask_token_id, ids)
        x = torch.where(chosen & (r > 0.9), torch.randint(5, len(tokenizer), ids.shape), x)
        loss = model(input_ids=x, attention_mask=mask, labels=ids.masked_fill(~chosen, -100)).loss
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        schedule.step()
    encoder = BertModel(config)                                     # its pooler stays random: nothing trains one
    encoder.load_state_dict(model.bert.state_dict(), strict=False)
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def toy_encoder():
    """The folder of the toy task's pre-trained encoder, made when it is not in the cache; InputError if that can't be
    written."""
    folder = data.cache_dir() / "toy-encoder-1"
    if not (folder / "config.json").exists():
        with data.replacing(folder) as new:
            pretrain_toy(new)
    return folder


# ---- The command line ----------------------------------------------------------------------------


def parse(argv):
    """The command line of train.py: (arguments, settings of a run but for method and seed). Raises InputError."""
    p = eval.Parser(prog="train.py", description="Fine-tune BERT or RoBERTa with RIFT. Without arguments: the toy task.")
    run_options = {"method", "seeds", "out", "resume", "overwrite"}

    def flag(name, help, paper=False, **kinds):
        key = name[2:].replace("-", "_")
        papers = {task: values[key] for task, values in TASKS.items() if key in values}
        papers = papers or {"": kinds.get("default")}
        shown = "; ".join(f"{task} {' '.join(map(str, v)) if isinstance(v, list) else v}".strip()
                          for task, v in papers.items())
        said = "default and paper" if paper else "default, the paper's but for toy" if len(papers) > 1 else "default"
        p.add_argument(name, help=help + f" ({said}: {shown})" * (shown != "None"), **kinds)

    flag("--task", "toy, imdb, snli, or a folder with train.tsv, test.tsv and perhaps dev.tsv", default="toy", metavar="TASK")
    flag("--method", f"one or more of {', '.join(METHODS)}; they train one after another", nargs="+", choices=METHODS,
         metavar="NAME")
    flag("--seeds", "of heads, batches, dropout and the adversary's noise", nargs="+", type=number(int, 0, 2**63 - 1),
         default=[0], metavar="S")
    flag("--model", "a BERT or RoBERTa encoder: a name on the hub or a folder", metavar="NAME_OR_DIR")
    flag("--pooling", "S and T: the encoder's pooler, or the mean over tokens", choices=("pooler", "mean"))
    flag("--unknown-words", "a word outside the vocabulary becomes its first piece, or [UNK] (the authors' rule)",
         choices=("piece", "unk"), default="piece")
    flag("--device", "such as cpu or cuda:0 (default: a GPU if there is one)", metavar="NAME")
    flag("--precision", "of the encoder; losses are always fp32. auto: bf16 on GPUs that have it",
         choices=("auto", "fp32", "bf16"), default="auto")
    flag("--data-dir", "where archives, tables and NLTK data are looked for first (default: the cache, ~/.cache/rift)",
         metavar="DIR")
    flag("--neighbors", "substitution table: vectors (.txt, .zip), a table (.json) or wordnet (default and paper: the "
         "counter-fitted vectors; toy: its own)", metavar="FILE")
    flag("--train-size", "texts, a class-balanced subset (default and paper: all)", type=positive, metavar="N")
    flag("--dev-size", "texts to choose the epoch on (default: all; without any a tenth of train, 1,000 at most; the "
         "paper has none)", type=positive, metavar="N")
    flag("--test-size", "texts (default and paper: all)", type=positive, metavar="N")
    flag("--split-seed", "of the subsets: the same for every method and seed", type=number(int, 0), default=0,
         metavar="S")
    flag("--max-len", "longest input in tokens, special tokens included", type=number(int, 4), metavar="L")
    flag("--epochs", "passes over the smallest class", type=positive, metavar="N")
    flag("--batch-size", "texts a step; what the classes do not divide is left out", type=positive, metavar="B")
    flag("--micro-batch-size", "texts a forward pass, gradients add up to the batch; L_info compares within these "
         "(default: the batch)", type=positive, metavar="B")
    flag("--eval-batch-size", "texts a forward pass in evaluation", type=positive, default=64, metavar="B")
    flag("--lr", "AdamW's learning rate after the warm-up", type=number(float, 0, low_open=True), metavar="X")
    flag("--schedule", "factors of lr in the first epochs, the last one stays", type=number(float, 0), nargs="+",
         default=[0.1, 0.55, 1.0], paper=True, metavar="F")
    flag("--weight-decay", "AdamW's, on head and projections; the encoder has none", type=number(float, 0),
         default=2e-4, paper=True, metavar="X")
    flag("--adam-eps", "AdamW's epsilon", type=number(float, 0, low_open=True), default=1e-6,
         paper=True, metavar="X")
    flag("--alpha", "weight of L_info, which is in nats", type=number(float, 0), metavar="X")
    flag("--beta", "weight of the KL term, in nats", type=number(float, 0), metavar="X")
    flag("--tau", "temperature of L_info's score", type=number(float, 0, low_open=True), default=0.2, paper=True,
         metavar="X")
    flag("--adv-steps", "steps of the adversary's search in the hull; 0: noise only", type=number(int, 0), default=10,
         paper=True, metavar="N")
    flag("--adv-lr", "learning rate of the adversary's Adam", type=number(float, 0), default=1.0, paper=True,
         metavar="X")
    flag("--adv-weight-decay", "of the adversary's Adam", type=number(float, 0), default=2e-5, paper=True, metavar="X")
    flag("--sparsity", "weight of the entropy that the adversary avoids", type=number(float, 0), default=15.0,
         paper=True, metavar="X")
    flag("--candidates", "words of a position in the hull at most, the word itself included", type=number(int, 1, 1000),
         default=10, paper=True, metavar="K")
    flag("--ptwd", "lambda, weight of ||theta_s - theta_t||_2 in adv-ptwd", type=number(float, 0), default=0.01,
         metavar="X")
    flag("--mixout", "p of adv-mixout, a probability", type=number(float, 0, 0.999), default=0.7, metavar="P")
    flag("--out", "each run has its folder OUT/METHOD, or OUT/METHOD-SEED with several seeds (default: runs/TASK)",
         type=Path, metavar="DIR")
    flag("--resume", "go on with runs that were stopped; finished ones are left alone", action="store_true")
    flag("--overwrite", "replace runs that are there", action="store_true")
    flag("--save-minutes", "minutes between checkpoints within an epoch", type=number(float, 0), default=10.0,
         metavar="M")
    args = p.parse_args(argv)
    if args.task not in TASKS and not Path(args.task).is_dir():
        raise InputError(f"--task {args.task}: has to be toy, imdb, snli, or a folder with train.tsv and test.tsv")
    if args.task == "toy" and args.model not in (None, "toy"):
        raise InputError(f"--model {args.model}: the toy task has its own, pre-trained on its own words")
    for key, value in TASKS.get(args.task, TASKS["imdb"]).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.method, args.seeds = list(dict.fromkeys(args.method)), list(dict.fromkeys(args.seeds))
    args.overwrite |= args.task == "toy" and args.out is None and not args.resume
    if args.resume and args.overwrite:
        raise InputError("--resume and --overwrite: only one of them")
    args.out = args.out or Path("runs") / Path(args.task).resolve().name
    settings = {key: value for key, value in vars(args).items() if key not in run_options}
    settings["precision"] = eval.pick_precision(args.precision, eval.pick_device(args.device))
    return args, settings


@eval.run_main
def main(argv=None):
    """train.py's command line. Exits with 130 when stopped by Ctrl-C; --resume goes on."""
    args, settings = parse(argv)
    processes = Processes()
    task = eval.open_task(settings)
    table = eval.open_table(settings, task)
    folders = []
    for method in args.method:
        for seed in args.seeds:
            folders.append(args.out / (method if len(args.seeds) == 1 else f"{method}-{seed}"))
            try:
                run(task, table, settings | {"method": method, "seed": seed}, folders[-1], processes, args.resume,
                    args.overwrite)
            except KeyboardInterrupt:
                again = shlex.join([*(word for word in argv if word not in ("--overwrite", "--resume")), "--resume"])
                raise KeyboardInterrupt(f"{folders[-1]} goes on with: python train.py {again}") from None
    if args.task == "toy":
        device = ["--device", args.device] if args.device else []
        eval.main([*map(str, folders), *device, "--attacks", "pwws", "genetic", "--population", "20", "--generations", "10",
                   "--num-examples", str(min(len(task.test), 200)), "--show", "1"])


if __name__ == "__main__":
    main()
