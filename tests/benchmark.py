"""How much faster is this project than the plain formulation of the same mathematics?

    python -m tests.benchmark --model MINILM_DIR --data-dir DIR             everything
    python -m tests.benchmark train clean --json FILE --model ..            chosen parts
    python -m tests.benchmark limit --model ..      how near the hardware's limit we are

A ratio is the baseline's time / our time, measured in one process, with the same weights, texts,
torch and threads. The baseline is fp32 throughout, beside our bf16 too, and has the attention that
is faster for it: "eager" (plain) or "sdpa" (fused). It is written here:

- plain_step, training: every text padded to the longest input; all K = 10 candidates of every
  position embedded; a forward pass for each part of the loss; the teacher run at every step.
- plain_probabilities, evaluation: batches of 32 texts in the order given, padded likewise.
- plain_attack: this project's attacks, one query at a time, padded likewise, nothing remembered.

"agrees", in fp32: a training step (dropout off) has the same losses, to 1e-4, and gradients, to
1e-3, at the same adversary w (each side takes the other's), and after its own search in float64: in
fp32 a search magnifies rounding, because Adam's first steps are nearly the sign of a gradient, and
where that is almost 0 they go either way. Clean: probabilities to 1e-4. Attacks: the same texts.
In bf16, against the fp32 baseline: the loss to 2% at the same w, verdicts on 90% of the texts.

Two parts compare with no baseline. "queries": microseconds that an attack spends on a text besides
the victim, without and with a `key`. "limit": the share that a training step and a forward pass
reach of the operations a second of a large matrix product in the same precision, and the hours that
training on all of IMDB with BERT-base would take at that rate.

Without --data-dir the texts are random words, without --model the encoder is small and random: that
runs anywhere, but its ratios are of a toy size.
"""
import argparse
import copy
import ctypes
import functools
import itertools
import re
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
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm import tqdm

import attacks
import data
import eval
import rift
import train

EPOCHS = 20     # of the paper: our teacher reads a text once, not in each of 20 epochs
TEXTS = {"imdb": dict(train_size=1600, dev_size=2, test_size=1200),
         "snli": dict(train_size=1200, dev_size=3, test_size=3)}

# ---- The baseline, and our training step ---------------------------------------------------------


def padded(tensor, shape, value=0):
    """The tensor, filled up with a value, or cut, to this shape."""
    out = tensor.new_full(shape, value)
    part = tuple(slice(min(a, b)) for a, b in zip(tensor.shape, shape))
    out[part] = tensor[part]
    return out


def plain_batch(vocabulary, texts, hull=True):
    """Vocabulary.encode, padded to the longest input and the most candidates."""
    shape = len(texts), vocabulary.max_len, vocabulary.max_candidates
    filler = {"input_ids": vocabulary.pad, "subs": vocabulary.pad}
    return {name: padded(tensor, shape[:tensor.ndim], filler.get(name, 0))
            for name, tensor in vocabulary.encode(texts, hull=hull).items()}


def plain_features(encoder, e, attention_mask):
    """F(x) (B, H) of embeddings e (B, L, H): every layer for every token, then the pooler."""
    mask = (1 - attention_mask.to(e.dtype)) * torch.finfo(e.dtype).min          # (B, L)
    return encoder.pooler(encoder.encoder(e, attention_mask=mask[:, None, None])[0])


def plain_step(model, adamw, input_ids, attention_mask, subs, subs_mask, y, v, s, w=None):
    """A training step of RIFT as the paper has it, line by line.

    input_ids, attention_mask: (B, L); subs, subs_mask, v: (B, L, K); y: (B,); w: (B, L, K), what an
    adversary has found, by default the search from v. Returns {loss term: float} and w.
    """
    encoder, head, (B, L, K) = model.encoder, model.head, subs.shape
    positions = rift.position_ids(encoder, L).repeat_interleave(K, dim=1)       # (1, L * K)
    m = subs_mask.float()

    def F_s(e):
        return plain_features(encoder, e, attention_mask)                       # (B, H)

    def clean():
        return rift.embed(encoder, input_ids)                                   # (B, L, H)

    def candidates():
        return rift.embed(encoder, subs.view(B, L * K), positions).view(B, L, K, -1)

    def mixture(w, E):
        return torch.einsum("blk,blkh->blh", w, E)                              # (B, L, H)

    if w is None:       # x^: the search of the adversary, with dropout off
        training = model.training
        model.eval()
        with torch.no_grad():
            E = candidates()                                                    # (B, L, K, H)
            q = head(F_s(clean()))                                              # (B, C)
        v = v.clone().requires_grad_()
        adam = torch.optim.Adam([v], lr=s.adv_lr, weight_decay=s.adv_weight_decay)
        for _ in range(s.adv_steps):
            w = torch.softmax(v * m + 500 * (m - 1), -1)
            kl = rift.kl_divergence(q, head(F_s(mixture(w, E)))) * B
            entropy = -(w * w.clamp_min(1e-30).log()).sum()
            loss = s.sparsity * entropy / (300 * 128) - kl
            adam.zero_grad()
            loss.backward()                             # gradients of the parameters too
            adam.step()
        w = torch.softmax(v.detach() * m + 500 * (m - 1), -1)
        model.train(training)

    adamw.zero_grad()   # the loss, with a forward pass for each of its parts
    ce = F.cross_entropy(head(F_s(clean())), y)
    kl = rift.kl_divergence(head(F_s(clean())), head(F_s(mixture(w, candidates()))))
    with torch.no_grad():
        T = plain_features(model.teacher, rift.embed(model.teacher, input_ids), attention_mask)
    info = rift.L_info(F_s(mixture(w, candidates())), T, y, model.g, model.h, s.tau)
    loss = ce + s.beta * kl + s.alpha * info
    loss.backward()
    adamw.step()
    return {"loss": loss.item(), "ce": ce.item(), "kl": kl.item(), "info": info.item()}, w


@torch.no_grad()
def plain_probabilities(model, vocabulary, texts, batch_size=32):
    """Class probabilities of N texts as words: an (N, C) array."""
    P = []
    for start in range(0, len(texts), batch_size):
        batch = plain_batch(vocabulary, texts[start:start + batch_size], hull=False)
        ids, mask = (tensor.to(model.encoder.device) for tensor in batch.values())
        S = plain_features(model.encoder, rift.embed(model.encoder, ids), mask)
        P.append(torch.softmax(model.head(S), -1).cpu())
    return torch.cat(P).numpy()


def plain_attack(model, vocabulary, words, y, synonyms, method, rng):
    """The words of the adversarial text that an attack finds with one query at a time."""
    def score(words):
        return plain_probabilities(model, vocabulary, [(words,)])[0]            # (C,)

    steps = method(words, y, synonyms, rng)
    wanted = next(steps)
    while True:
        try:
            wanted = steps.send(np.array([score(text) for text in wanted], dtype=np.float64))
        except StopIteration as stop:
            return stop.value


def our_step(model, adamw, batch, y, T, v, s, precision, w=None):
    """What train.train does with a batch, in the same order. Returns what plain_step returns."""
    model.dtype = data.DTYPES[precision]
    adamw.zero_grad()
    if w is None:
        w = model.adversary(**batch, v=v, **eval.search_settings(s))
    terms = rift.objective(model(**batch, y=y, w=w, T=T), "rift", vars(s))
    terms["loss"].backward()
    losses = {name: value.item() for name, value in terms.items()}
    train.check_finite(losses, model, 1, 0, adamw)
    adamw.step()
    return losses, w


# ---- Texts and models ----------------------------------------------------------------------------


def random_encoder():
    """A small random BERT, and a tokenizer of 950 made-up words."""
    torch.manual_seed(0)
    words = map("".join, itertools.product("bcdfghklmn", "aeiou", "bcdfghklmnprstvwxyz"))
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    tokenizer = train.bert_tokenizer(tokens)
    config = transformers.BertConfig(
        vocab_size=len(tokens), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, initializer_range=0.1)
    return transformers.BertModel(config), tokenizer


def random_examples(words, C, n, length, parts=1):
    """n data.Example of about `length` random words; half of the words hint at the class."""
    rng = np.random.default_rng(0)

    def text(y):
        size = rng.integers(length // 4, 2 * length)
        hints = np.where(rng.random(size) < 0.5, y, rng.integers(C, size=size))
        at = rng.integers(len(words) // C, size=size) * C + hints
        return tuple(words[i] for i in at)

    return [data.Example(tuple(text(i % C) for _ in range(parts)), i % C) for i in range(n)]


class Case:
    """A task as both sides see it: texts, vocabulary, settings, a model and its optimizer.

    The learning rate is 0: AdamW does all its work, yet every step, of either side, starts from the
    same weights.
    """

    def __init__(self, args, name):
        self.args, self.name, self.device = args, name, data.pick_device(args.device)
        _, self.s = train.parse(["--task", name, "--adv-steps", str(args.adv_steps)])
        encoder, tokenizer = data.load_encoder(args.model) if args.model else random_encoder()
        C, parts, length = {"imdb": (2, 1, 200), "snli": (3, 2, 12)}[name]
        if args.data_dir:
            table = data.load_neighbors("counterfitted_neighbors.json", args.data_dir)
            task = data.load_task(name, args.data_dir, **TEXTS[name])
            self.train, self.test = task.train, task.test
        else:
            words = {token.removeprefix("Ġ") for token in tokenizer.get_vocab()}
            words = sorted(x for x in words if x.isascii() and x.isalpha() and x.islower())[:900]
            # from none to eight substitutes
            table = {x: words[i + 1:i + 1 + i % 9] for i, x in enumerate(words)}
            self.train, _, self.test = (random_examples(words, C, n, length, parts)
                                        for n in TEXTS[name].values())
        self.vocabulary = data.Vocabulary(tokenizer, self.s.max_len, table)
        self.texts = [self.vocabulary.visible(x.words) for x in self.train]
        self.y = torch.tensor([x.y for x in self.train], device=self.device)
        torch.manual_seed(0)
        self.model = rift.RIFT(encoder, C).to(self.device).eval()
        self.fit_head()
        self.adamw = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad],
                                       lr=0.0, eps=self.s.adam_eps)
        self.T = {}     # {precision: {text's number: the teacher's features}}

    def fit_head(self, n=200):
        """Fits the head to n short texts, so that KL is as large as in training, 0.05 to 1 nat, and
        attacks have something to break."""
        rows = sorted(range(3 * n), key=lambda i: sum(map(len, self.texts[i])))[:n]
        S = eval.Victim(self.model, self.vocabulary).features([self.texts[i] for i in rows])
        adam = torch.optim.Adam(self.model.head.parameters(), weight_decay=0.02)
        for _ in range(300):
            adam.zero_grad()
            F.cross_entropy(self.model.head(S), self.y[rows]).backward()
            adam.step()

    def victim(self, precision):
        """The model as eval.load_run gives it: its encoder is held in the precision."""
        model = copy.deepcopy(self.model)
        model.dtype = data.DTYPES[precision]
        model.encoder.to(model.dtype)
        return eval.Victim(model, self.vocabulary)

    def seconds(self, function, *args):
        """The seconds that function(*args) takes, and what it returns."""
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        out = function(*args)
        wait()
        return time.perf_counter() - start, out

    def attend(self, kernel):
        """Sets the baseline's attention: before each step, because our passes set their own."""
        self.kernel = kernel
        self.model.encoder.set_attn_implementation(kernel)
        self.model.teacher.set_attn_implementation(kernel)

    def attend_faster(self, function, *args):
        """Sets the attention with which the baseline's function(*args) is faster."""
        times = {}
        for kernel in ("eager", "sdpa", "eager"):       # the first time is the warm-up's
            self.attend(kernel)
            times[kernel], _ = self.seconds(function, *args)
        self.attend(min(times, key=times.get))

    def row(self, baseline, ours, agrees):
        """A row of the table and of the JSON file."""
        return {"ratio": baseline / ours, "baseline_s": baseline, "ours_s": ours,
                "agrees": bool(agrees), "attention": self.kernel}

    def start(self, rows):
        """Where both searches start for texts: v (B, L, K), in the baseline's padded shape."""
        L, K = self.s.max_len, self.s.candidates
        generator = torch.Generator().manual_seed(int(rows[0]))
        return rift.noise((len(rows), L, K), L, generator).to(self.device)

    def plain(self, rows, w=None):
        """The baseline's step -> losses, w."""
        self.attend(self.kernel)
        batch = plain_batch(self.vocabulary, [self.texts[i] for i in rows])
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        v = self.start(rows)
        w = w if w is None else padded(w, v.shape)
        return plain_step(self.model, self.adamw, **batch, y=self.y[rows], v=v, s=self.s, w=w)

    def teach(self, rows, precision):
        """Runs the teacher once, for all of our steps on these texts."""
        self.model.dtype = data.DTYPES[precision]
        victim = eval.Victim(self.model, self.vocabulary)
        T = victim.features([self.texts[i] for i in rows], self.model.teacher)
        self.T[precision] = dict(zip(rows, T))

    def ours(self, rows, precision, w=None):
        """Our step -> losses, w."""
        batch = self.vocabulary.encode([self.texts[i] for i in rows], hull=True)
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        T = torch.stack([self.T[precision][i] for i in rows])
        v = padded(self.start(rows), batch["subs"].shape)
        w = w if w is None else padded(w, v.shape)
        return our_step(self.model, self.adamw, batch, self.y[rows], T, v, self.s, precision, w)

    def outcome(self, step, *args):
        """(losses, gradients) of a step, and its w."""
        losses, w = step(*args)
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                     for name, p in self.model.named_parameters() if p.requires_grad}
        return (losses, gradients), w


# ---- Training ------------------------------------------------------------------------------------


@contextmanager
def float64(model):
    """Inside, the model, and all that this project makes float32, are float64."""
    def cast(dtype):
        torch.set_default_dtype(dtype)
        model.to(dtype)

    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double), \
         mock.patch.dict(data.DTYPES, fp32=torch.float64):
        cast(torch.float64)
        try:
            yield
        finally:
            cast(torch.float32)


def differences(found, expected):
    """How far losses and gradients are from the expected ones: {name: share of what is allowed}.

    Allowed are 1e-4 of a loss and, in norm, 1e-3 of a parameter's gradient, at least 1e-6 of the
    whole gradient: some are zeros that rounding fills, such as that of a key's bias.
    """
    shares = {name: abs(found[0][name] / loss - 1) / 1e-4 for name, loss in expected[0].items()}
    whole = torch.stack([g.norm() for g in expected[1].values()]).norm()
    for name, g in expected[1].items():
        allowed = torch.maximum(1e-3 * g.norm(), 1e-6 * whole)
        shares[name] = ((found[1][name] - g).norm() / allowed).item()
    return shares


def compare(case, rows):
    """Our step against the baseline's: {(precision, where): {name: share of what is allowed}}."""
    plain, w_plain = case.outcome(case.plain, rows)
    ours, w_ours = case.outcome(case.ours, rows, "fp32")
    at_w_plain, _ = case.outcome(case.ours, rows, "fp32", w_plain)
    at_w_ours, _ = case.outcome(case.plain, rows, w_ours)
    bf16, _ = case.ours(rows, "bf16", w_plain)
    found = {("fp32", "at the baseline's w"): differences(at_w_plain, plain),
             ("fp32", "at our w"): differences(ours, at_w_ours),
             ("bf16", "at the baseline's w"): {
                 "loss": abs(bf16["loss"] / plain[0]["loss"] - 1) / 0.02}}
    # without AdamW, whose moments are float32
    with float64(case.model), mock.patch.dict(case.T), mock.patch.object(case.adamw, "step"):
        case.teach(rows, "fp32")
        plain, _ = case.outcome(case.plain, rows)
        ours, _ = case.outcome(case.ours, rows, "fp32")
        found["fp32", "own search in float64"] = differences(ours, plain)
    return found


def choose_batches(case, n):
    """n batches of an epoch, spread evenly over the lengths: a list of arrays of texts' numbers."""
    # the paper's batches of 32 and 120 take minutes a step
    batch_size = case.args.batch_size or {"imdb": 8, "snli": 24}[case.name]
    lengths = np.array([sum(map(len, text)) for text in case.texts])
    epoch = data.balanced_batches(case.y.cpu(), lengths, batch_size, np.random.default_rng(0))
    epoch.sort(key=lambda rows: lengths[rows].max())
    return [epoch[int((i + 0.5) * len(epoch) / n)] for i in range(n)]


def training(case):
    """A training step in the shape of a task, ours in fp32 and in bf16 -> {name: row}."""
    n = case.args.batches
    chosen = choose_batches(case, n)
    spent, agrees = Counter(), {"fp32": True, "bf16": True}
    case.model.train()
    case.attend_faster(case.plain, chosen[0])
    for precision in agrees:
        case.teach(chosen[0], precision)                # warm-up
        case.ours(chosen[0], precision)
        spent[precision] = case.seconds(case.teach, np.concatenate(chosen), precision)[0] / EPOCHS
    for rows in tqdm(chosen, f"train/{case.name}: timed", leave=False, disable=None):
        spent["plain"] += case.seconds(case.plain, rows)[0]
        for precision in agrees:
            spent[precision] += case.seconds(case.ours, rows, precision)[0]
    case.model.eval()
    for (precision, where), shares in compare(case, chosen[n // 2]).items():
        for name, share in shares.items():
            if not share <= 1:
                agrees[precision] = False
                print(f"train/{case.name}/{precision}, {where}: {name} differs by {share:.2g} "
                      "times what is allowed", file=sys.stderr)
    return {f"train/{case.name}/{precision}": case.row(spent["plain"], spent[precision], same)
            for precision, same in agrees.items()}


# ---- Evaluation, attacks, memory -----------------------------------------------------------------


def clean(case):
    """Class probabilities of reviews -> {name: row}."""
    plain = functools.partial(plain_probabilities, case.model, case.vocabulary)
    texts = [case.vocabulary.visible(x.words) for x in case.test[:case.args.num_clean]]
    case.attend_faster(plain, texts[:32])
    spent, P = case.seconds(plain, texts)
    rows = {}
    for precision in ("fp32", "bf16"):
        victim = case.victim(precision)
        victim.features(texts[:32])                                     # warm-up
        t, found = case.seconds(lambda: victim.probabilities(victim.features(texts)))
        same = {"fp32": abs(found - P).max() < 1e-4,
                "bf16": np.mean(found.argmax(-1) == P.argmax(-1)) >= 0.9}
        rows[f"clean/imdb/{precision}"] = case.row(spent, t, same[precision])
    return rows


def attacked(case):
    """PWWS and genetic on reviews of up to 100 words that the model gets right -> {name: row}."""
    def synonyms(_, words):
        return data.substitutes(words, case.vocabulary.neighbors)

    plain = functools.partial(plain_probabilities, case.model, case.vocabulary)
    genetic = functools.partial(attacks.genetic, population=20, generations=10)
    short = [(i, x.words[0], x.y) for i, x in enumerate(case.test) if len(x.words[0]) <= 100]
    P = case.victim("fp32")([" ".join(words) for _, words, _ in short])
    right = [(i, words, y) for (i, words, y), p in zip(short, P)
             if p.argmax() == y and any(synonyms(i, words))]
    case.attend_faster(plain, [(right[0][1],)] * 10, 1)
    rows, n = {}, case.args.attack_examples
    for name, method, n in (("pwws", attacks.pwws, n), ("genetic", genetic, max(n // 3, 1))):
        spent, expected = 0.0, []                                       # adversarial text, success
        for i, words, y in tqdm(right[:n], f"attacks/{name}: baseline", leave=False, disable=None):
            rng = np.random.default_rng([0, i])                         # as in attacks.attack
            t, found = case.seconds(plain_attack, case.model, case.vocabulary, words, y,
                                    synonyms(i, words), method, rng)
            spent += t
            expected.append((" ".join(found), plain([(found,)])[0].argmax() != y))
        examples = [(i, " ".join(words), y) for i, words, y in right[:n]]
        for precision in ("fp32", "bf16"):
            victim = case.victim(precision)
            victim([text for _, text, _ in examples])                   # warm-up
            t, results = case.seconds(
                lambda: list(attacks.attack(victim, examples, method, synonyms, name=name)))
            pairs = list(zip(sorted(results, key=lambda r: r.index), expected))
            same = {"fp32": all(r.adversarial == text for r, (text, _) in pairs),
                    "bf16": np.mean([r.success == success for r, (_, success) in pairs]) >= 0.9}
            rows[f"attacks/{name}/{precision}"] = case.row(spent, t, same[precision])
    return rows


def queries(case):
    """Microseconds a query besides the victim, which answers at once -> {name: row}."""
    P = np.tile([1.0, 0.0], (64, 1))                                            # (batch_size, C)
    victim = lambda texts: P[:len(texts)]
    examples = [(i, " ".join(x.words[0]), 0) for i, x in enumerate(case.test)
                if len(x.words[0]) <= 100][:20]
    rows = {}
    for method in (attacks.pwws, attacks.exhaustive):
        run = lambda: list(attacks.attack(victim, examples, method, case.vocabulary.neighbors,
                                          max_queries=1000, progress=False))
        row = rows[f"queries/{method.__name__}"] = {}
        for name, key in (("microseconds", None), ("with_key", str.encode)):
            victim.key = key
            n = sum(result.queries for result in run())                         # warm-up
            row[name] = min(case.seconds(run)[0] for _ in range(5)) / n * 1e6
    return rows


def peak_memory(device, function, *args):
    """The MiB that function(*args) needs at most, beyond what is held before: on Linux or a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(*args)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 2**16)         # M_MMAP_THRESHOLD: blocks that are freed go back to the system
    libc.malloc_trim(0)             # and so do those that are free already
    Path("/proc/self/clear_refs").write_text("5")       # VmHWM, the peak, starts anew from VmRSS
    status = Path("/proc/self/status")
    before = re.search(r"VmRSS:\s+(\d+) kB", status.read_text())
    function(*args)
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    return (int(peak[1]) - int(before[1])) / 2**10


def memory(case):
    """Peak memory of a training step in fp32 on the 32 longest reviews -> {name: row}."""
    case.s.adv_steps = 2            # further steps need no more
    order = sorted(range(len(case.texts)), key=lambda i: -len(case.texts[i][0]))
    of_class = [[i for i in order if case.y[i] == c] for c in (0, 1)]
    rows = np.array(list(zip(*of_class))).flatten()[:case.args.batch_size or 32]
    case.teach(rows, "fp32")
    case.model.train()
    case.attend_faster(case.plain, rows[:4])
    case.ours(rows[:4], "fp32")                                         # warm-up
    baseline = peak_memory(case.device, case.plain, rows)
    ours = peak_memory(case.device, case.ours, rows, "fp32")
    return {"memory": {"ratio": baseline / ours, "baseline_mib": baseline, "ours_mib": ours,
                       "attention": case.kernel}}


# ---- The limit of the hardware, and what the paper's size costs ----------------------------------

# The counter knows the fused attention of GPUs, but not the CPUs'. There only passes without
# gradients use it, see rift.transformer_layer.
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
                 lambda q, k, v, *args, out_shape, **options: sdpa_flop_count(q, k, v)}


def operations(function, *args):
    """The floating-point operations of the matrix products in function(*args)."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        function(*args)
    return counter.get_total_flops()


def peak(case, precision):
    """Floating-point operations a second of a large matrix product, the best of five."""
    n = 8192 if case.device.type == "cuda" else 2048
    a = torch.randn(n, n, device=case.device, dtype=data.DTYPES[precision])
    return 2 * n**3 / min(case.seconds(torch.mm, a, a)[0] for _ in range(5))


def limit(case):
    """Which share of the peak a training step and a forward pass reach -> {name: row}."""
    rows, = choose_batches(case, 1)                     # of median length
    texts = [case.texts[i] for i in rows]
    found, rates = {}, {}
    case.model.train()
    for precision in ("fp32", "bf16"):
        fastest = peak(case, precision)
        case.teach(rows, precision)
        for name, function, *args in (("train", case.ours, rows, precision),
                                      ("forward", case.victim(precision).features, texts)):
            flop = operations(function, *args)          # the warm-up as well
            rate = flop / min(case.seconds(function, *args)[0] for _ in range(3))
            rates[name, precision] = rate
            found[f"limit/{name}/{case.name}/{precision}"] = {
                "share": rate / fastest, "gflop_per_s": rate / 1e9,
                "peak_gflop_per_s": fastest / 1e9, "gflop_per_text": flop / len(rows) / 1e9}
    case.model.eval()
    if case.name == "imdb":
        flop = paper_step(case)
        total = flop * 25_000 * EPOCHS
        found["limit/paper/imdb"] = {"gflop_per_text": flop / 1e9, "flop": total} | {
            f"hours_{precision}": total / rates["train", precision] / 3600
            for precision in ("fp32", "bf16")}
    return found


def paper_step(case):
    """The operations of a training step for one review of 300 tokens with BERT-base."""
    order = sorted(range(len(case.texts)), key=lambda i: -len(case.texts[i][0]))
    rows = [next(i for i in order if case.y[i] == c) for c in (0, 1)]           # the longest
    batch = case.vocabulary.encode([case.texts[i] for i in rows], hull=True)    # (2, 300, ..)
    batch = {name: tensor.to(case.device) for name, tensor in batch.items()}
    v = padded(case.start(rows), batch["subs"].shape)
    flop = []
    for layers in (1, 2):                               # the next ten are like the second
        config = transformers.BertConfig(num_hidden_layers=layers,
                                         vocab_size=case.model.encoder.config.vocab_size)
        model = rift.RIFT(transformers.BertModel(config), 2).to(case.device).train()
        adamw = torch.optim.AdamW(model.parameters(), lr=0.0)
        T = torch.zeros(2, config.hidden_size, device=case.device)
        flop.append(operations(our_step, model, adamw, batch, case.y[rows], T, v, case.s, "fp32"))
    one, two = flop
    return (one + 11 * (two - one)) / len(rows)


# ---- The command line ----------------------------------------------------------------------------

# memory is the last one: it makes malloc slower
PARTS = {"train": training, "clean": clean, "attacks": attacked, "queries": queries, "limit": limit,
         "memory": memory}


def parse(argv):
    """The command line, as attributes."""
    p = argparse.ArgumentParser(
        prog="python -m tests.benchmark", description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = p.add_argument
    flag("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; none: all of them")
    flag("--model", metavar="DIR", help="an encoder; None: small and random")
    flag("--data-dir", metavar="DIR", help="where IMDB, SNLI, NLTK data and "
         "counterfitted_neighbors.json are; None: random words")
    flag("--json", type=Path, metavar="FILE", help="where the rows are written")
    flag("--device", metavar="NAME", help="cpu, cuda:0, ..; None: a GPU if there is one")
    flag("--batches", type=int, default=4, metavar="N", help="training steps, of different lengths")
    flag("--batch-size", type=int, metavar="N", help="texts in a training step; None: imdb 8, snli "
         "24, for memory 32 (which takes 16 GiB with MiniLM)")
    flag("--adv-steps", type=int, default=10, metavar="N", help="of the search in training")
    flag("--num-clean", type=int, default=300, metavar="N", help="reviews in clean evaluation")
    flag("--attack-examples", type=int, default=3, metavar="N",
         help="reviews for pwws; a third as many for genetic")
    args = p.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        p.error(f"{', '.join(sorted(unknown))}: has to be one of {', '.join(PARTS)}")
    return args


@data.command
def main(argv):
    """The command line of the benchmark."""
    args, rows = parse(argv), {}
    device = data.pick_device(args.device)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, "
          + (torch.cuda.get_device_name(device) if device.type == "cuda" else
             f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"))
    if not (args.model and args.data_dir):
        print("without --model and --data-dir the ratios are of a toy size")
    if not args.parts or set(args.parts) - {"queries", "limit"}:
        print(f"\n{'':21}{'ratio':>9}{'baseline':>16}{'ours':>16}   agrees  baseline's attention")
    imdb = Case(args, "imdb")
    for part, measure in PARTS.items():
        if part in args.parts or not args.parts:
            snli = measure(Case(args, "snli")) if part in ("train", "limit") else {}
            found = measure(imdb) | snli
            for name, r in found.items():
                if "ratio" not in r:
                    numbers = (f"{key.replace('_', ' ')} {value:.5g}" for key, value in r.items())
                    print(f"{name:25}{',  '.join(numbers)}", flush=True)
                    continue
                unit = "mib" if part == "memory" else "s"
                sides = [f"{r[f'{side}_{unit}']:12.2f} {unit:3}" for side in ("baseline", "ours")]
                agrees = {True: "yes", False: "NO", None: ""}[r.get("agrees")]
                print(f"{name:21}{r['ratio']:8.2f}x{''.join(sides)}   {agrees:8}{r['attention']}",
                      flush=True)
            rows |= found
    if args.json:
        data.write_json(args.json, rows)


if __name__ == "__main__":
    main()
