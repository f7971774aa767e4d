"""How much faster is this project than the plain formulation of the same mathematics?

    python -m tests.benchmark --model MINILM_DIR --data-dir DIR               everything
    python -m tests.benchmark train attacks --json ratios.json --scaling      chosen parts, and how the cost grows

Every ratio is baseline time / our time, measured in one process by turns, with the same weights, texts, torch,
threads and attention kernels. The baseline is fp32 throughout, also beside our bf16, with torch's fused attention;
ours has that too, but in bf16 on CPUs (eval.attention_for). What the baseline does is written here:

- `plain_step`, training: every text padded to the longest input, embeddings (B, L, K, H) of all K = 10 candidates of
  every position mixed by einsum, the last layer's output computed for every token, parameter gradients accumulated
  while the adversary searches, a forward pass each for cross-entropy, the clean side of KL, its adversarial side, and
  L_info, the teacher run at every step.
- `plain_probabilities`, evaluation: batches of 32 texts in the order given, each padded to the longest input.
- `plain_attack`: one query at a time, padded likewise, nothing remembered: PWWS scores the original again for each
  candidate, genetic its base member for each perturbation. The attacks themselves are this project's generators.

"agrees" means, in fp32, with dropout off and one start v on the very batches that are timed: every loss term to 1e-4
and every parameter's gradient to 1e-3, relative, in norm (floor: 1e-6 of the whole gradient's norm, because some are
true zeros, such as a key's bias, that rounding fills); probabilities to 1e-4; the same adversarial texts. In bf16,
against the same fp32 results: the loss to 2%, verdicts on 90% of the examples. Three more columns say where a NO in fp32
comes from. "by step": the same check when every step of our search starts from the v where the baseline's stands, and its
gradient to 1e-3 there. "float64": the check of "agrees" with both sides in float64, to a millionth of its tolerances.
"itself": the check of "agrees" between the baseline and the baseline with plain attention. In fp32 a search magnifies
rounding without bound: Adam's first steps are nearly the sign of a gradient, and where that is almost 0 they go either way.

Without --data-dir the texts are random words, without --model the encoder is small and random: the command runs
anywhere, but its ratios are then of a toy size.
"""
import argparse
import copy
import functools
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tqdm import tqdm

import attacks
import data
import eval
import rift
import train

BATCH = {"imdb": 8, "snli": 24}  # texts a step: the paper's 32 and 120 give like ratios and take minutes a step
REGULARISER = 1e-2  # of the fitted head: its KL is then of the size that training sees, 0.05 to 1 nat
EPOCHS = 20  # of the paper: a step bears 1/20 of the teacher's one pass over its texts
POPULATION, GENERATIONS = 20, 10  # of the genetic attack

# ----------------------------------------------------------------------------------------------------------
# The baseline


def padded(tensor, shape, value=0):
    """The tensor with its last dimensions filled up to `shape` with a value, or cut down to it."""
    out = tensor.new_full(shape, value)
    part = tuple(slice(min(a, b)) for a, b in zip(tensor.shape, shape))
    out[part] = tensor[part]
    return out


def plain_batch(vocabulary, texts):
    """Vocabulary.encode, padded to the longest input and the most candidates that there may be."""
    batch = vocabulary.encode(texts, hull=True)
    B, L, K = len(texts), vocabulary.max_len, vocabulary.max_candidates
    return {"input_ids": padded(batch["input_ids"], (B, L), vocabulary.pad),
            "attention_mask": padded(batch["attention_mask"], (B, L)),
            "subs": padded(batch["subs"], (B, L, K), vocabulary.pad),
            "subs_mask": padded(batch["subs_mask"], (B, L, K), False)}


def plain_features(encoder, input_ids, attention_mask, e=None):
    """S = F_s(x) (B, H): every layer's output for every token, then the pooler. e (B, L, H): embeddings to use."""
    with rift.embeddings_are(encoder, e):
        return encoder(input_ids=input_ids, attention_mask=attention_mask,
                       position_ids=rift.positions_of(encoder, input_ids.shape[1])).pooler_output


def plain_step(model, adamw, input_ids, attention_mask, subs, subs_mask, y, v, s):
    """A training step of RIFT, line by line as the paper has it (method sections 1 and 2).

    input_ids, attention_mask: (B, L); subs, subs_mask, v: (B, L, K); y: (B,). Returns the loss terms as floats.
    """
    encoder, head, (B, L, K) = model.encoder, model.head, subs.shape
    position_ids = rift.positions_of(encoder, L)                                             # (1, L)
    m = subs_mask.float()

    def F_s(e=None):
        return plain_features(encoder, input_ids, attention_mask, e)                         # (B, H)

    def candidates():
        positions = position_ids[..., None].expand(B, L, K).reshape(B, L * K)
        return encoder.embeddings(input_ids=subs.reshape(B, L * K), position_ids=positions).view(B, L, K, -1)

    def mixture(w, E):
        return torch.einsum("blk,blkh->blh", w, E)                                           # (B, L, H)

    # x^: the adversary's search, dropout off
    training = model.training
    model.eval()
    with torch.no_grad():
        E, clean = candidates(), head(F_s())                                                 # (B, L, K, H), (B, C)
    v = v.clone().requires_grad_()
    adam = torch.optim.Adam([v], lr=s["adv_lr"], weight_decay=s["adv_weight_decay"])
    for _ in range(s["adv_steps"]):
        w = torch.softmax(v * m + 500 * (m - 1), -1)
        entropy = -(w * w.clamp_min(1e-30).log()).sum()
        gain = rift.kl_divergence(clean, head(F_s(mixture(w, E)))) * B - s["sparsity"] * entropy / (300 * 128)
        adam.zero_grad()
        (-gain).backward()                                                                   # v's, and all parameters'
        adam.step()
    w = torch.softmax(v.detach() * m + 500 * (m - 1), -1)
    model.train(training)

    # the loss, a forward pass for each of its parts
    adamw.zero_grad()
    ce = F.cross_entropy(head(F_s()), y)
    kl = rift.kl_divergence(head(F_s()), head(F_s(mixture(w, candidates()))))
    with torch.no_grad():
        T = plain_features(model.teacher, input_ids, attention_mask)                         # (B, H)
    info = rift.L_info(F_s(mixture(w, candidates())), T, y, model.g, model.h, s["tau"])
    loss = ce + s["beta"] * kl + s["alpha"] * info
    loss.backward()
    adamw.step()
    return {"ce": ce.item(), "kl": kl.item(), "info": info.item(), "loss": loss.item()}


@torch.no_grad()
def plain_probabilities(model, vocabulary, texts, batch_size=32):
    """Class probabilities of texts (lists of words) -> (N, C) array."""
    P, device = [], model.encoder.device
    for start in range(0, len(texts), batch_size):
        batch = vocabulary.encode(texts[start:start + batch_size])
        shape = len(batch["input_ids"]), vocabulary.max_len
        ids = padded(batch["input_ids"], shape, vocabulary.pad).to(device)
        mask = padded(batch["attention_mask"], shape).to(device)
        P.append(torch.softmax(model.head(plain_features(model.encoder, ids, mask)), -1).cpu())
    return torch.cat(P).numpy()


def plain_attack(model, vocabulary, example, method, name, rescored):
    """One example attacked with one query at a time -> attacks.Result.

    rescored: how often the text that a round of queries started from is scored again, from (queries, words).
    """
    index, text, y = example
    words = tuple(text.split(" "))
    steps = attacks.attack_one(index, [], words, y, method, vocabulary.neighbors, 0, name, {})
    wanted = next(steps)
    while True:
        for _ in range(rescored(len(wanted), len(words)) if len(wanted) > 1 else 0):
            plain_probabilities(model, vocabulary, [(words,)])
        P = [plain_probabilities(model, vocabulary, [(text,)])[0] for text in wanted]
        try:
            wanted = steps.send(np.array(P, dtype=np.float64))
        except StopIteration as stop:
            return stop.value


# ----------------------------------------------------------------------------------------------------------
# Texts and models


def attend(model, attention):
    """Gives both encoders this attention of transformers, "sdpa" (fused, the baseline's) or "eager"."""
    for encoder in (model.encoder, model.teacher):
        encoder.set_attn_implementation(attention)


def random_encoder():
    """A small random BERT and a tokenizer of 1,000 made-up words, for a run without --model."""
    torch.manual_seed(0)
    words = [a + b + c for a in "bcdfghklmn" for b in "aeiou" for c in "bcdfghklmnprstvwxyz"][:1000]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]",
                                                     cls_token="[CLS]", sep_token="[SEP]")
    config = transformers.BertConfig(vocab_size=len(tokens), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                     intermediate_size=128, initializer_range=0.1)
    return transformers.BertModel(config), tokenizer


def whole_words(tokenizer, n=1000):
    """n words that are one token each, in alphabetic order."""
    words = {token.removeprefix("Ġ") for token in tokenizer.get_vocab()}
    words = sorted(word for word in words if word.isascii() and word.isalpha() and word.islower() and len(word) > 2)
    return words[:: max(len(words) // n, 1)][:n]


def made_up_task(name, words, sizes, lengths=None):
    """A data.Task of random words, with lengths like the real one's and words that hint at the class."""
    rng, C = np.random.default_rng(0), {"imdb": 2, "snli": 3}[name]
    mean, spread = {"imdb": (5.3, 0.7), "snli": (2.5, 0.3)}[name]                            # of log(number of words)

    def text(y, n):
        k = rng.integers(len(words) // C, size=n) * C + np.where(rng.random(n) < 0.5, y, rng.integers(C, size=n))
        return tuple(words[i] for i in k)

    def example(i):
        n = np.exp(rng.normal(mean, spread, size=1 if name == "imdb" else 2)).astype(int).clip(4, 1000)
        return data.Example(tuple(text(i % C, n_words) for n_words in (lengths or n)), i % C)

    train_, dev, test = ([example(i) for i in range(size)] for size in sizes)
    return data.Task(name, [str(c) for c in range(C)], train_, dev, test, "")


class Bench:
    """What the parts of the benchmark share: encoder, words, tasks and the command line's choices."""

    def __init__(self, args):
        self.args, self.device = args, eval.pick_device(args.device)
        self.encoder, self.tokenizer = eval.load_encoder(args.model) if args.model else random_encoder()
        if args.data_dir:
            self.table = data.load_neighbors(args.data_dir / "counterfitted_neighbors.json")
        else:
            self.table = self.circle(8)

    def circle(self, n):
        """A table that gives each whole word of the vocabulary the n next ones."""
        words = whole_words(self.tokenizer)
        return {word: [words[(i + k) % len(words)] for k in range(1, n + 1)] for i, word in enumerate(words)}

    @functools.cache
    def task(self, name):
        """The task's texts: a balanced random sample of the real ones, or random words."""
        sizes = dict(imdb=(1600, 2, 1200), snli=(1200, 3, 3))[name]
        if self.args.data_dir:
            sizes = dict(zip(("train_size", "dev_size", "test_size"), sizes))
            return data.load_task(name, self.args.data_dir, **sizes)
        return made_up_task(name, list(self.table), sizes)

    def settings(self, name, **changes):
        """train.py's own settings of a run, with a learning rate of 0: AdamW does all its work, yet the weights stay,
        so that every step, the baseline's too, starts from the same ones."""
        _, s = train.parse(["--task", name, "--adv-steps", str(self.args.adv_steps)])
        return s | {"method": "rift", "lr": 0.0} | changes

    def vocabulary(self, s, table=None):
        return data.Vocabulary(self.tokenizer, s["max_len"], table or self.table, s["unknown_words"], s["candidates"])

    @functools.cache
    def model(self, name):
        """A RIFT whose head has been fitted, so that KL and attacks mean something -> (model, vocabulary)."""
        torch.manual_seed(0)
        s, task = self.settings(name), self.task(name)
        model = rift.RIFT(copy.deepcopy(self.encoder), len(task.labels), s["pooling"]).to(self.device).eval()
        vocabulary = self.vocabulary(s)
        some = sorted(task.train[:600], key=lambda x: sum(map(len, x.words)))[:200]
        X = eval.Victim(model, vocabulary).features([vocabulary.visible(x.words) for x in some])
        y = torch.tensor([x.y for x in some], device=self.device)
        lbfgs = torch.optim.LBFGS(model.head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

        def closure():
            lbfgs.zero_grad()
            penalty = sum(p.square().sum() for p in model.head.parameters())
            loss = F.cross_entropy(model.head(X), y) + REGULARISER * penalty
            loss.backward()
            return loss

        lbfgs.step(closure)
        return model, vocabulary

    def seconds(self, function, *args):
        """function(*args) -> (seconds that it took, what it returned)."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        out = function(*args)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, out


# ----------------------------------------------------------------------------------------------------------
# Training


def row(baseline, ours, agrees, **more):
    return {"ratio": baseline / ours, "baseline_s": baseline, "ours_s": ours, "agrees": bool(agrees)} | more


def worst(found, expected, relative, floor):
    """The largest difference of tensors or numbers by name, as a share of what is allowed -> (share, name).

    Allowed is `relative` times the norm of the expected one, at least `floor`. A missing or extra name is infinite.
    """
    if found.keys() != expected.keys():
        return float("inf"), str(sorted(found.keys() ^ expected.keys()))
    pairs = {k: [torch.as_tensor(x[k]).double() for x in (found, expected)] for k in expected}
    return max(((((a - b).norm() / max(relative * b.norm(), floor)).item(), k) for k, (a, b) in pairs.items()), default=(0.0, ""))


@contextmanager
def float64(model, *optimizers):
    """Inside, the model, the moments of its optimizers, and all that this project makes float32, are float64."""
    def cast(dtype):
        torch.set_default_dtype(dtype)
        model.to(dtype)
        for optimizer in optimizers:
            optimizer.load_state_dict(optimizer.state_dict())                                # casts to its parameters' type

    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        try:
            yield cast(torch.float64)
        finally:
            cast(torch.float32)


@contextmanager
def search_steps(follow=()):
    """Inside, the steps of the adversary's search are kept: yields a list of (gradient of v, v after the step).

    follow: such a list; its v are then taken in place of Adam's, so that every step starts where that search stood.
    """
    kept, step = [], torch.optim.Adam.step

    def keep(adam):
        if type(adam) is not torch.optim.Adam:                                               # the weights' AdamW
            return step(adam)
        v, = adam.param_groups[0]["params"]
        gradient = v.grad.clone()
        step(adam)
        if follow:
            v.data.copy_(follow[len(kept)][1])
        kept.append((gradient, v.detach().clone()))

    with mock.patch.object(torch.optim.Adam, "step", keep):
        yield kept


class Steps:
    """The baseline's training step and ours, on batches of one task, with the same weights."""

    def __init__(self, bench, name):
        self.device, self.s, examples = bench.device, bench.settings(name), bench.task(name).train
        self.model, self.vocabulary = bench.model(name)
        self.texts = [self.vocabulary.visible(x.words) for x in examples]
        self.y = np.array([x.y for x in examples])
        self.lengths = [sum(map(len, words)) for words in self.texts]
        self.adamw = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=0.0,
                                       eps=self.s["adam_eps"])
        self.state = {p: train.Training(self.model, self.s, train.Processes()) for p in ("fp32", "bf16")}
        self.T = {}                                                     # {precision: {text: the teacher's features}}

    def run_teacher(self, p, rows):
        """The teacher's features of texts, once for all epochs -> the seconds that it took."""
        attend(self.model, eval.attention_for(self.device, p))
        start = time.perf_counter()
        victim = eval.Victim(self.model, self.vocabulary, precision=p)
        T = victim.features([self.texts[i] for i in rows], self.model.teacher)
        self.T[p] = dict(zip(rows, T.cpu()))                            # .cpu() also waits for a GPU
        return time.perf_counter() - start

    def start(self, rows):
        """Where both searches of a batch start: v (B, L, K), padded as the baseline pads."""
        L, K = self.vocabulary.max_len, self.vocabulary.max_candidates
        return rift.noise(torch.empty(len(rows), L, K, device=self.device), L, torch.Generator().manual_seed(int(rows[0])))

    def labels(self, rows):
        """y (B,) of a batch, on the device."""
        return torch.tensor(self.y[rows], device=self.device)

    def plain(self, rows, v, attention="sdpa"):
        """The baseline's step -> {loss term: float}."""
        attend(self.model, attention)
        batch = plain_batch(self.vocabulary, [self.texts[i] for i in rows])
        batch = {k: tensor.to(self.device) for k, tensor in batch.items()}
        return plain_step(self.model, self.adamw, **batch, y=self.labels(rows), v=v, s=self.s)

    def ours(self, rows, v, p):
        """Our step in fp32 or bf16 -> {loss term: float}."""
        batch = self.vocabulary.encode([self.texts[i] for i in rows], hull=True)
        batch = {k: tensor.to(self.device) for k, tensor in batch.items()}
        T = torch.stack([self.T[p][i] for i in rows]).to(self.device)
        attend(self.model, eval.attention_for(self.device, p))
        with mock.patch.object(rift, "noise", lambda subs, max_len: padded(v, subs.shape)):
            return train.train_step(self.state[p], batch, self.labels(rows), T, self.s | {"precision": p})

    def result(self, terms):
        """A step's loss terms, with the gradients that it has left."""
        return terms, {k: p.grad.clone() for k, p in self.model.named_parameters() if p.grad is not None}


def share(found, expected):
    """The worst difference of two Steps.result as a share of the tolerance -> (share, of what)."""
    whole = torch.stack([tensor.norm() for tensor in expected[1].values()]).norm().item()
    return max(worst(found[0], expected[0], 1e-4, 1e-6), worst(found[1], expected[1], 1e-3, 1e-6 * whole))


def checks(steps, rows):
    """Our step against the baseline's on one batch -> {check: (share of the tolerance, of what)}; float64's tolerance is a
    millionth of the others'."""
    v = steps.start(rows)
    with search_steps() as searched:
        expected = steps.result(steps.plain(rows, v))
    free = steps.vocabulary.encode([steps.texts[i] for i in rows], hull=True)["subs_mask"].to(steps.device)   # (B, L, K)
    _, L, K = free.shape
    free = free.sum(-1) > 1                                                                  # (B, L)
    guide = [(dv[:, :L, :K][free], at[:, :L, :K][free]) for dv, at in searched]              # (P, K) each
    bf16 = steps.ours(rows, v, "bf16")
    out = {"bf16": worst({"loss": bf16["loss"]}, {"loss": expected[0]["loss"]}, 0.02, 0.0),
           "fp32": share(steps.result(steps.ours(rows, v, "fp32")), expected)}
    with search_steps(guide) as followed:
        found = steps.result(steps.ours(rows, v, "fp32"))
    dv, dv_expected = ({str(i): dv for i, (dv, _) in enumerate(x)} for x in (followed, guide))
    out["by step"] = max(share(found, expected), worst(dv, dv_expected, 1e-3, 0.0))
    out["baseline against itself"] = share(steps.result(steps.plain(rows, v, "eager")), expected)
    with float64(steps.model, steps.adamw, steps.state["fp32"].adamw), mock.patch.dict(steps.T):
        steps.run_teacher("fp32", rows)
        expected = steps.result(steps.plain(rows, v.double()))
        part, what = share(steps.result(steps.ours(rows, v.double(), "fp32")), expected)
    return out | {"float64": (1e6 * part, what)}


def training(bench, name):
    """A training step in the shape of a task, ours in fp32 and in bf16 -> {name: row}."""
    steps = Steps(bench, name)
    size = bench.args.batch_size or BATCH[name]
    epoch = data.balanced_batches(steps.y, steps.lengths, size, np.random.default_rng(0))
    epoch.sort(key=lambda rows: max(steps.lengths[i] for i in rows))
    n = bench.args.batches                                              # steps timed, spread evenly over the lengths
    chosen = [epoch[int((i + 0.5) * len(epoch) / n)] for i in range(n)]
    spent, used = Counter(), [i for rows in chosen for i in rows]
    for p in steps.state:
        steps.run_teacher(p, used)                                                           # warm-up
        spent[p] += steps.run_teacher(p, used) / EPOCHS
    steps.model.train()
    for k, rows in enumerate(tqdm([chosen[0], *chosen], f"train/{name}: timed", leave=False)):
        for p, step in (("plain", steps.plain), ("fp32", steps.ours), ("bf16", steps.ours)):
            t, _ = bench.seconds(step, rows, steps.start(rows), *[p][p == "plain":])
            spent[p] += t if k else 0.0                                                      # the first is the warm-up
    steps.model.eval()
    passed = {}
    for rows in tqdm(chosen, f"train/{name}: compared", leave=False):
        for check, (part, what) in checks(steps, rows).items():
            passed[check] = passed.get(check, True) and part <= 1
            if bench.args.verbose:
                tqdm.write(f"train/{name}, up to {max(steps.lengths[i] for i in rows)} words, {check}: {part:.2g} of the "
                           f"tolerance in {what}", sys.stderr)
    steps.model.zero_grad()
    more = {check.replace(" ", "_"): passed[check] for check in ("by step", "float64", "baseline against itself")}
    return {f"train/{name}/fp32": row(spent["plain"], spent["fp32"], passed["fp32"], **more),
            f"train/{name}/bf16": row(spent["plain"], spent["bf16"], passed["bf16"])}


# ----------------------------------------------------------------------------------------------------------
# Memory


def process_memory(field):
    """VmRSS, now, or VmHWM, the peak since reset_peak, of this process in MiB. Not getrusage's ru_maxrss: on Linux a
    process inherits that from the one that started it, and it cannot be reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise data.InputError("train/memory needs Linux (/proc/self/status) or a GPU")


def peak_memory(bench, function, *args):
    """MiB that function(*args) needs at most, over what is held before it."""
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(*args)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")                            # VmHWM starts anew from VmRSS
    before = process_memory("VmRSS")
    function(*args)
    return process_memory("VmHWM") - before


def step_memory(bench, which, batch_size):
    """Peak memory in MiB of a step ("plain" or "ours") on the longest reviews, 300 tokens each -> (texts, MiB).

    A step of 4 texts goes first, so that AdamW's moments and the library's buffers are there; from the baseline's it
    is known whether batch_size texts will fit into the machine's memory: if not, the batch is halved until they do.
    """
    model, vocabulary = bench.model("imdb")
    model.train()
    s = bench.settings("imdb", adv_steps=2)                                  # each step of the search needs the same
    texts = [vocabulary.visible(x.words) for x in sorted(bench.task("imdb").train, key=lambda x: -len(x.words[0]))]
    y = torch.arange(batch_size, device=bench.device) % 2
    T = torch.rand(batch_size, model.encoder.config.hidden_size, device=bench.device)
    state = train.Training(model, s, train.Processes())

    def step(n):
        batch = plain_batch(vocabulary, texts[:n]) if which == "plain" else vocabulary.encode(texts[:n], hull=True)
        batch = {k: tensor.to(bench.device) for k, tensor in batch.items()}
        if which == "plain":
            plain_step(model, state.adamw, **batch, y=y[:n], v=rift.noise(batch["subs"], s["max_len"]), s=s)
        else:
            train.train_step(state, batch, y[:n], T[:n], s)

    step(4)
    four = peak_memory(bench, step, 4)
    if bench.device.type == "cuda":
        free = torch.cuda.mem_get_info()[0] / 2**20
    else:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) / 1024
    while batch_size > 4 and four / 4 * batch_size > 0.9 * free:             # the rest is for others on the machine
        batch_size //= 2
    return batch_size, peak_memory(bench, step, batch_size)


def memory(bench):
    """Baseline / ours, each in a process of its own -> {name: row}, nothing if one of them fails."""
    found, size = {}, 32
    # Large blocks go back to the system when they are freed: what malloc keeps would count as held before the step.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    for which in tqdm(("plain", "ours"), "train/memory", leave=False):
        command = [sys.executable, "-m", "tests.benchmark", *bench.args.argv, "--memory", which, str(size)]
        out = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        if out.returncode:
            print(f"train/memory is left out: {which} ended with {out.returncode}: {out.stderr.strip()[-200:]}")
            return {}
        size, found[which] = int(out.stdout.split()[-2]), float(out.stdout.split()[-1])
    if size < 32:
        print(f"train/memory at {size} texts: this machine has no room for the baseline's 32")
    return {"train/memory": {"ratio": found["plain"] / found["ours"], "baseline_mib": found["plain"],
                             "ours_mib": found["ours"], "batch": size}}


# ----------------------------------------------------------------------------------------------------------
# Evaluation and attacks


def clean(bench):
    """Class probabilities of real reviews -> {name: row}."""
    model, vocabulary = bench.model("imdb")
    texts = [vocabulary.visible(x.words) for x in bench.task("imdb").test[:bench.args.num_clean]]
    attend(model, "sdpa")
    victim = eval.Victim(model, vocabulary)
    spent, found = {}, {}
    for name, function in (("plain", functools.partial(plain_probabilities, model, vocabulary)),
                           ("ours", lambda texts: victim.probabilities(victim.features(texts)))):
        function(texts[:32])                                                                 # warm-up
        spent[name], found[name] = bench.seconds(function, texts)
    return {"clean/imdb/fp32": row(spent["plain"], spent["ours"], abs(found["plain"] - found["ours"]).max() < 1e-4)}


def attacked(bench):
    """PWWS and genetic on real reviews of up to 100 words that the victim gets right -> {name: row}."""
    model, vocabulary = bench.model("imdb")
    short = [(i, data.to_text(x.words), x.y) for i, x in enumerate(bench.task("imdb").test) if len(x.words[0]) <= 100]
    attend(model, "sdpa")
    P = eval.Victim(model, vocabulary)([text for _, text, _ in short])
    right = [example for example, p in zip(short, P) if p.argmax() == example[2]]
    print(f"victim of the attacks: right on {len(right) / len(short):.0%} of {len(short)} reviews", file=sys.stderr)
    genetic = functools.partial(attacks.genetic, population=POPULATION, generations=GENERATIONS)
    rows = {}
    for name, method, precisions, n, rescored in (
            ("pwws", attacks.pwws, ("fp32", "bf16"), bench.args.attack_examples,
             lambda queries, words: queries - 1 - words),                                    # once for each candidate
            ("genetic", genetic, ("fp32",), max(bench.args.attack_examples // 3, 1),
             lambda queries, words: POPULATION)):                                           # once for each perturbation
        examples, spent, found = right[:n], 0.0, []
        attend(model, "sdpa")
        for example in tqdm(examples, f"attacks/{name}: baseline", leave=False):
            t, result = bench.seconds(plain_attack, model, vocabulary, example, method, name, rescored)
            spent, found = spent + t, found + [result]
        for p in precisions:
            victim = eval.Victim(model, vocabulary, precision=p)
            attend(model, eval.attention_for(bench.device, p))
            victim([text for _, text, _ in examples])                                        # warm-up
            run = attacks.attack(victim, examples, method, vocabulary.neighbors, name=name)
            t, ours = bench.seconds(list, run)
            pairs = list(zip(*(sorted(results, key=lambda result: result.index) for results in (ours, found))))
            same = np.mean([a.success == b.success and (p == "bf16" or a.adversarial == b.adversarial)
                            for a, b in pairs])
            rows[f"attacks/{name}/{p}"] = row(spent, t, same >= (0.9 if p == "bf16" else 1.0))
    return rows


# ----------------------------------------------------------------------------------------------------------
# How the cost grows

BASE = dict(length=64, batch=16, steps=5, candidates=4)
GROWTH = dict(length=(32, 64, 128, 256, 512), batch=(8, 16, 32, 64), steps=(0, 5, 10, 20), candidates=(2, 4, 8, 16))


def scaling(bench):
    """Seconds of our step over each of length, batch, adversary steps and candidates, the others as in BASE; every
    word has candidates -> {"scaling/length/32": {"fp32_s": .., "bf16_s": ..}, ..}."""
    out, longest = {}, eval.longest_input(bench.encoder)
    points = [(what, value) for what, values in GROWTH.items() for value in values
              if what != "length" or value <= longest]
    model = rift.RIFT(copy.deepcopy(bench.encoder), 2).to(bench.device).train()
    for what, value in tqdm(points, "scaling", leave=False):
        p = BASE | {what: value}
        s = bench.settings("imdb", max_len=p["length"], adv_steps=p["steps"], candidates=p["candidates"])
        vocabulary = bench.vocabulary(s, bench.circle(p["candidates"] - 1))
        task = made_up_task("imdb", list(vocabulary.neighbors), (p["batch"], 0, 0), [p["length"] - 2])
        state = train.Training(model, s, train.Processes())
        y = torch.tensor([x.y for x in task.train], device=bench.device)
        T = torch.rand(len(y), bench.encoder.config.hidden_size, device=bench.device)

        def step(n, precision):
            batch = vocabulary.encode([x.words for x in task.train[:n]], hull=True)
            batch = {name: tensor.to(bench.device) for name, tensor in batch.items()}
            return train.train_step(state, batch, y[:n], T[:n], s | {"precision": precision})

        out[f"scaling/{what}/{value}"] = {}
        for precision in ("fp32", "bf16"):
            attend(model, eval.attention_for(bench.device, precision))
            step(4, precision)                                                               # warm-up
            out[f"scaling/{what}/{value}"][precision + "_s"] = bench.seconds(step, p["batch"], precision)[0]
    return out


# ----------------------------------------------------------------------------------------------------------


def processor(device):
    """The name of the GPU, or of the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


PARTS = ["memory", "train", "clean", "attacks"]


def parse(argv):
    p = argparse.ArgumentParser(prog="python -m tests.benchmark", description=__doc__.partition("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("parts", nargs="*", metavar="PART", help="memory, train, clean, attacks; default: all of them")
    p.add_argument("--model", metavar="DIR", help="an encoder, such as MiniLM (default: small and random)")
    p.add_argument("--data-dir", type=Path, metavar="DIR", help="IMDB, SNLI, NLTK data and "
                   "counterfitted_neighbors.json (default: random words)")
    p.add_argument("--json", type=Path, metavar="FILE", help="where the ratios are written")
    p.add_argument("--scaling", action="store_true", help="also how a step's cost grows, in fp32 and bf16")
    p.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")
    p.add_argument("--adv-steps", type=int, default=10, help="of the training adversary")
    p.add_argument("--batches", type=int, default=4, help="training steps timed, of different lengths")
    p.add_argument("--batch-size", type=int, help="texts a training step (default: imdb 8, snli 24)")
    p.add_argument("--num-clean", type=int, default=300, help="reviews for clean evaluation")
    p.add_argument("--attack-examples", type=int, default=3, help="reviews for pwws; a third as many for genetic")
    p.add_argument("--verbose", action="store_true", help="print every loss that is compared")
    p.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)                             # the subprocess of memory()
    args = p.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        p.error(f"{', '.join(sorted(unknown))}: has to be one of {', '.join(PARTS)}")
    args.parts, args.argv = args.parts or PARTS, argv
    return args


@eval.run_main
def main(argv):
    args = parse(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    bench = Bench(args)
    if args.memory:
        return print(*step_memory(bench, args.memory[0], int(args.memory[1])))
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {processor(bench.device)}")
    for given, note in ((args.model, "no --model: a small random encoder"),
                        (args.data_dir, "no --data-dir: random words")):
        if not given:
            print(f"{note}; the ratios are of a toy size")
    rows = {}
    if "memory" in args.parts:              # first: what this process holds is missing there
        rows |= memory(bench)
    if "train" in args.parts:
        rows |= training(bench, "imdb") | training(bench, "snli")
    if "clean" in args.parts:
        rows |= clean(bench)
    if "attacks" in args.parts:
        rows |= attacked(bench)
    shown = {True: "yes", False: "NO", None: ""}
    print(f"\n{'':20}{'ratio':>8}{'baseline':>12}{'ours':>12}   agrees  by step  float64  itself")
    for name, r in rows.items():
        before, after = (f"{r[key + '_s']:.2f} s" if key + "_s" in r else f"{r[key + '_mib']:.0f} MiB"
                         for key in ("baseline", "ours"))
        print(f"{name:20}{r['ratio']:7.2f}x{before:>12}{after:>12}   {shown[r.get('agrees')]:8}"
              f"{shown[r.get('by_step')]:9}{shown[r.get('float64')]:9}{shown[r.get('baseline_against_itself')]}".rstrip())
    if args.scaling:
        grown = scaling(bench)
        print(f"\nseconds a step, at {', '.join(f'{what} {value}' for what, value in BASE.items())} but for:\n"
              f"{'':20}{'fp32':>10}{'bf16':>10}")
        for name, r in grown.items():
            print(f"{name.removeprefix('scaling/').replace('/', ' '):20}{r['fp32_s']:10.3f}{r['bf16_s']:10.3f}")
        rows |= grown
    if args.json:
        eval.write_json(args.json, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
