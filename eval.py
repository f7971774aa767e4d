"""Attack finished runs, compare them, and draw the paper's figures.

    python eval.py runs/imdb/rift --attacks pwws genetic --num-examples 1000
    python eval.py runs/imdb/* --plot figures.png

In Python, a finished run is a function from texts to class probabilities:

    from eval import load_run
    victim = load_run("runs/imdb/rift")
    victim(["a great film"])                          # (1, C)

The first half of this file is what train.py needs too, and so is longer than evaluation alone would be: command lines,
one process or many, encoders, trained models as functions, a run's files, accuracy.
"""
import argparse
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import shlex
import sys
import textwrap
import zipfile
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import transformers
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

import attacks
import data
import rift
from data import InputError

BLACK_BOX = ("pwws", "genetic", "pwws-wordnet")
ATTACKS = (*BLACK_BOX, "hull")
# What a line of attacks.jsonl says of an example: its attacks.Result (only those that were right are attacked).
RESULT_KEYS = [field.name for field in dataclasses.fields(attacks.Result) if field.name != "correct"]

# ---- Command lines: one clear line for bad input (exit code 2) and for Ctrl-C (130) --------------


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        raise InputError(message)


def number(kind, low, high=math.inf, low_open=False):
    """A type for argparse: an int or float of at least (or, low_open, above) low and at most high. What it returns
    raises ArgumentTypeError for any other text."""
    def parse(text):
        with suppress(ValueError):
            value = kind(text)
            if (low < value if low_open else low <= value) and value <= high and math.isfinite(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} has to be {'an integer' if kind is int else 'a number'} "
                                         f"{'above' if low_open else 'of at least'} {low:g}"
                                         f"{'' if math.isinf(high) else f' and at most {high:g}'}")
    return parse


positive = number(int, 1)


def run_main(main):
    """Decorates main(argv): an InputError becomes one line on standard error and exit code 2, Ctrl-C a line and 130."""
    script = Path(main.__code__.co_filename).name

    @functools.wraps(main)
    def wrapped(argv=None):
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        try:
            return main(sys.argv[1:] if argv is None else argv)
        except InputError as error:
            print(f"{script}: error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt as stop:
            print(f"\n{script}: stopped; {str(stop) or 'the same command starts again'}", file=sys.stderr)
            raise SystemExit(130) from None
    return wrapped


def first_line(error):
    """What an exception of a library says, as part of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def pick_device(name):
    """--device: the one named, else a GPU when there is one. InputError for a device that is not there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
        return device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {first_line(error)}") from None


def pick_precision(name, device):
    """--precision: "auto" is bf16 on GPUs that have it and fp32 elsewhere."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def autocast(device, precision):
    """The region in which encoders compute in bfloat16, if that is the precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


# ---- One process or many -------------------------------------------------------------------------


class Processes:
    """The processes that torchrun started, or this one alone: what has to be done differently stands here only.

    In training every process draws the same batches and takes its share of each; L_info compares the texts of all. In
    evaluation each attacks its share of the examples. The first process alone writes and prints.
    """

    def __init__(self):
        if "WORLD_SIZE" in os.environ and not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def device(self, name):
        """The device of this process: the one named, else its own GPU, else the CPU."""
        if self.world > 1 and not name and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        return pick_device(name)

    def share(self, rows, y):
        """This process's part of a balanced batch: of each class every world-th text, the same number everywhere.

        rows: (B,) ints, y: their classes. Where the processes do not divide a class, the rest is left out.
        """
        parts = [rows[y == c] for c in np.unique(y)]                                    # C arrays of N rows
        return np.concatenate([part[:len(part) // self.world * self.world][self.rank::self.world] for part in parts])

    def wrap(self, model):
        """The model as it is called in training: gradients are averaged over the processes."""
        if self.world == 1:
            return model
        device = model.encoder.device
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None,
                                       find_unused_parameters=True)

    def gather(self, x):
        """(b, ..) of this process -> (B, ..) of all, with gradients for this process's part.

        Every process computes L_info on the whole batch, but only its own part reaches its encoder, and averaging
        then divides by the number of processes: the gradient of that part is multiplied by it (the value is not).
        """
        if self.world == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(parts, x.detach().contiguous())
        parts[self.rank] = x + (self.world - 1) * (x - x.detach()) if x.requires_grad else x
        return torch.cat(parts)

    def mean(self, values):
        """{name: float} averaged over the processes."""
        if self.world == 1:
            return values
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        x = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
        dist.all_reduce(x)
        return dict(zip(values, (x / self.world).tolist()))

    def collect(self, mine):
        """This process's dict -> the dicts of all processes in one."""
        parts = [mine] * self.world
        if self.world > 1:
            dist.all_gather_object(parts, mine)
        return {key: value for part in parts for key, value in part.items()}

    def wait(self):
        """Returns when all processes have come here."""
        if self.world > 1:
            dist.barrier()


# ---- Data and models -----------------------------------------------------------------------------


def attention_for(device, precision):
    """The attention of transformers that is fastest: fused, but plain in bf16 on CPUs, where the gradient of torch's
    fused one takes up to 1.3 (200 tokens) and about 10 times as long (25 tokens)."""
    return "eager" if device.type == "cpu" and precision == "bf16" else "sdpa"


def load_encoder(name_or_dir, complete=False, attention="sdpa"):
    """A BERT or RoBERTa encoder and its tokenizer, from the hub or a folder: float32, safetensors, no remote code.

    attention: see attention_for(). Returns (encoder, tokenizer). Raises InputError where there is none, where it is of
    another kind, where a tensor is missing or of the wrong shape, or where the tokenizer has more tokens than the
    encoder; unless `complete`, a pooler may be missing (RoBERTa's), it starts at random.
    """
    local = Path(name_or_dir).is_dir()
    try:
        encoder, info = AutoModel.from_pretrained(
            name_or_dir, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
            local_files_only=local, ignore_mismatched_sizes=True, attn_implementation=attention)
        tokenizer = AutoTokenizer.from_pretrained(name_or_dir, trust_remote_code=False, local_files_only=local)
    except Exception as error:                  # a damaged or hostile folder makes the library raise all kinds
        raise InputError(f"model {name_or_dir}: cannot be loaded as a safetensors BERT or RoBERTa encoder: "
                         f"{first_line(error)}") from None
    if encoder.config.model_type not in ("bert", "roberta"):
        raise InputError(f"model {name_or_dir}: is a {encoder.config.model_type}, it has to be a bert or a roberta")
    lost = [key for key in info["missing_keys"] if complete or not key.startswith("pooler.")]
    lost += [key for key, *_ in info["mismatched_keys"]]
    if lost:
        raise InputError(f"model {name_or_dir}: {len(lost)} tensors are missing or of the wrong shape, "
                         f"{sorted(lost)[0]} for one")
    if len(tokenizer) > encoder.config.vocab_size:
        raise InputError(f"model {name_or_dir}: its tokenizer has {len(tokenizer)} tokens, its encoder embeddings for "
                         f"{encoder.config.vocab_size}")
    return encoder, tokenizer


def open_task(s, data_dir=None):
    """The data of a run's settings s, from data_dir or where the run found them: a data.Task. InputError as load_task."""
    sizes = {key: s[key] for key in ("train_size", "dev_size", "test_size", "split_seed")}
    return data.load_task(s["task"], data_dir or s["data_dir"], **sizes)


def open_table(s, task, data_dir=None):
    """The substitution table of a run's settings s, for a task's words; InputError as data.load_neighbors."""
    if s["task"] == "toy" and not s["neighbors"]:
        return data.toy_neighbors()
    words = Counter(word for x in task.train for text in x.words for word in text)
    return data.load_neighbors(s["neighbors"], data_dir or s["data_dir"], words)


def longest_input(encoder):
    """The most tokens that the encoder has positions for."""
    return encoder.config.max_position_embeddings - rift.positions_of(encoder, 1).item()


class Victim:
    """A trained classifier as a function from texts to class probabilities.

    victim(texts) -> (N, C) float32 array; a text is its words joined by single spaces, a pair is a tuple of two
    such strings. Raises ValueError for anything else. model: a RIFT; vocabulary: a data.Vocabulary; config: what
    the run's config.json holds; parts: 1 where the model reads single texts, 2 for pairs, None for unchecked.
    """

    def __init__(self, model, vocabulary, batch_size=64, precision="fp32", config=None, parts=None):
        self.model, self.vocabulary = model, vocabulary
        self.batch_size, self.precision, self.config, self.parts = batch_size, precision, config, parts
        self.device = model.encoder.device

    def words(self, text):
        """A text, or a pair, as its words; ValueError if it is not what this model reads."""
        strings = [text] if isinstance(text, str) else text
        right = isinstance(strings, (list, tuple)) and all(isinstance(part, str) for part in strings)
        if not right or len(strings) not in ([self.parts] if self.parts else [1, 2]):
            reads = {1: "single texts, a string each", 2: "pairs, two strings each"}
            raise ValueError(f"{text!r:.80} is not what the model reads: "
                             f"{reads.get(self.parts, 'strings or pairs of strings')}")
        return data.from_text(text)

    def batches(self, texts, hull=False):
        """Yields (rows, encoded batch on the device), texts of similar length together. texts: lists of words."""
        order = sorted(range(len(texts)), key=lambda i: sum(map(len, texts[i])))
        for start in range(0, len(order), self.batch_size):
            rows = order[start:start + self.batch_size]
            batch = self.vocabulary.encode([texts[i] for i in rows], hull=hull)
            yield rows, {name: tensor.to(self.device) for name, tensor in batch.items()}

    @torch.no_grad()
    def features(self, texts, encoder=None):
        """S = F_s(x), or another encoder's features, dropout off. texts: N texts as words. (N, H) float32."""
        encoder = encoder or self.model.encoder
        S = torch.empty(len(texts), encoder.config.hidden_size, device=self.device)
        with rift.dropout_off(encoder):
            for rows, batch in self.batches(texts):
                with autocast(self.device, self.precision):
                    S[rows] = rift.features(encoder, **batch, pooling=self.model.pooling)
        return S

    @torch.no_grad()
    def probabilities(self, S):
        """q(.|s) for features S (N, H). Returns (N, C) float32 array."""
        return torch.softmax(self.model.head(S), -1).cpu().numpy()

    def __call__(self, texts):
        if isinstance(texts, str):
            raise ValueError(f"{texts!r:.80} is one text, not a list of texts: victim([text])")
        return self.probabilities(self.features([self.words(text) for text in texts]))

    def key(self, text):
        """What the model sees of a text: its token ids, as bytes. Texts of one key have the same probabilities."""
        return np.array(self.vocabulary.input_ids(self.words(text)), np.int32).tobytes()


def load_run(folder, device=None, precision=None, batch_size=64, table=None):
    """The finished run in a folder, as a Victim. device, precision: by default a GPU if there is one, the run's own;
    table: a substitution table in place of the run's.

    Raises InputError for a folder that holds no finished run, or one whose files do not fit together.
    """
    folder, s = Path(folder), settings_of(folder)
    config, unfit = read_json(folder / "config.json"), "a file of another run"
    if not (folder / "metrics.json").exists():
        raise InputError(f"{folder}: the run is not finished (no metrics.json): go on with train.py --resume")
    metrics = read_json(folder / "metrics.json")
    for key in ("method", "seed"):
        if metrics.get(key) != s[key]:
            raise InputError(f"{folder}: config.json has {key} {s[key]}, metrics.json {metrics.get(key)}: {unfit}")
    if table is None and s["neighbors"] == "wordnet":
        there = s["data_dir"] and Path(s["data_dir"]).is_dir()                   # perhaps on another machine only
        table = data.load_neighbors("wordnet", s["data_dir"] if there else None)
    elif table is None:
        table = data.load_neighbors(folder / "neighbors.json")
    if not (folder / "encoder").is_dir():                                        # or its name would be sought on the hub
        raise InputError(f"{folder / 'encoder'}: no such folder")
    device = pick_device(device)
    precision = pick_precision(precision or s["precision"], device)
    encoder, tokenizer = load_encoder(folder / "encoder", complete=True, attention=attention_for(device, precision))
    if s["max_len"] > longest_input(encoder):
        raise InputError(f"{folder}: config.json has max_len {s['max_len']}, the encoder positions for "
                         f"{longest_input(encoder)} tokens: {unfit}")
    model = rift.RIFT(encoder, len(config["labels"]), s["pooling"], s["method"] == "rift-marginal")
    own = {name: p for name, p in model.named_parameters() if not name.startswith(("encoder.", "teacher."))}
    take_tensors(own, load_tensors(folder / "model.safetensors")[0], folder / "model.safetensors")
    model = model.to(device).eval()
    vocabulary = data.Vocabulary(tokenizer, s["max_len"], table, s["unknown_words"], s["candidates"])
    return Victim(model, vocabulary, batch_size, precision, config, config.get("parts"))


def read_json(path):
    """The JSON object in a file that train.py or eval.py has written; InputError where it is missing or is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: not the folder of a finished run, as train.py makes it") from None
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, it has to be a JSON object")
    return content


# What is used of a run's config.json, and of which type it has to be.
SETTINGS = ({"labels": list, "fingerprints": dict}
            | dict.fromkeys(("task", "method", "pooling", "unknown_words", "precision"), str)
            | dict.fromkeys(("seed", "split_seed", "max_len", "candidates", "adv_steps"), int)
            | dict.fromkeys(("alpha", "beta", "adv_lr", "adv_weight_decay", "sparsity"), (int, float))
            | dict.fromkeys(("data_dir", "neighbors"), (str, type(None)))
            | dict.fromkeys(("train_size", "dev_size", "test_size"), (int, type(None))))


# What may differ between two runs that are the same but for the seed.
INCIDENTAL = ("data_dir", "device", "save_minutes", "eval_batch_size")


def settings_of(folder):
    """A run's settings, from its config.json; InputError where they, or the rest of it, are not all there."""
    path = Path(folder) / "config.json"
    config = read_json(path)
    s = config.get("settings")
    there = config | s if isinstance(s, dict) else {}
    for key, kind in SETTINGS.items():
        if key not in there or not isinstance(there[key], kind):
            raise InputError(f"{path}: has {key} {there.get(key)!r}: it has to be as train.py wrote it")
    return s


def write_json(path, content):
    """Writes a JSON-able object, atomically; InputError if it can't."""
    data.write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_lines(path, keys):
    """The objects of a .jsonl file, [] if there is none. A last line that was cut off when its writer was killed is
    left out; InputError for any other line that is not JSON, or lacks one of the keys."""
    with data.reading(path):
        lines, objects = Path(path).read_bytes().split(b"\n") if Path(path).exists() else [], []
    for n, line in enumerate(lines, 1):
        try:
            objects.append(json.loads(line))
            if not all(key in objects[-1] for key in keys):
                raise ValueError
        except (ValueError, TypeError):
            if n < len(lines):
                raise InputError(f"{path}, line {n}: {line[:60]!r} is not a JSON object with {', '.join(keys)}") from None
    return objects


def save_tensors(path, tensors, rest=None):
    """Writes {name: tensor} and a JSON-able dict to one safetensors file, atomically. InputError if it can't."""
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    data.write_atomically(path, safetensors.torch.save(contiguous, {"rift": json.dumps(rest or {})}))


def load_tensors(path):
    """-> {name: tensor}, dict: what save_tensors wrote. InputError for a file that is damaged or not one of ours."""
    try:
        with safetensors.safe_open(path, "pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}, json.loads((f.metadata() or {})["rift"])
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: not a readable checkpoint of this project ({error})") from None


def take_tensors(parameters, tensors, path):
    """Copies {name: tensor} into {name: parameter}; InputError unless names and shapes are the same."""
    for name in sorted(parameters.keys() | tensors.keys()):
        have, want = (tuple(d[name].shape) if name in d else "nothing" for d in (tensors, parameters))
        if have != want:
            raise InputError(f"{path}: {name} is {have} there, the model needs {want}: a checkpoint of another model")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


# ---- Accuracy: clean, on the hull, and how certain it is -----------------------------------------


def search_settings(s):
    """The settings of the search in the hull, as rift.adversary takes them."""
    return dict(steps=s["adv_steps"], lr=s["adv_lr"], weight_decay=s["adv_weight_decay"], sparsity=s["sparsity"])


def hull_attack(victim, examples, *, seed=0, progress=False, **search):
    """The quick robust accuracy: the training adversary, maximising cross-entropy, at its discrete texts.

    examples: N data.Example; each starts from its own noise, seeded with (seed, its place among them), so that
    nothing depends on the batch size. search: search_settings(). Returns (predictions (N,) int64 on the adversarial
    texts, those texts as words).
    """
    vocabulary, model = victim.vocabulary, victim.model
    texts = [vocabulary.visible(x.words) for x in examples]
    y = torch.tensor([x.y for x in examples], dtype=torch.int64, device=victim.device)
    largest = torch.empty(vocabulary.max_len, vocabulary.max_candidates)

    def start(i):
        state = int(np.random.SeedSequence([seed, i]).generate_state(1)[0])
        return rift.noise(largest, vocabulary.max_len, torch.Generator().manual_seed(state))

    adversarial, S = [None] * len(texts), torch.empty(len(texts), model.encoder.config.hidden_size, device=victim.device)
    for rows, batch in tqdm(victim.batches(texts, hull=True), "hull", math.ceil(len(texts) / victim.batch_size),
                            disable=not progress, leave=False):
        B, L, K = batch["subs"].shape
        v = torch.stack([start(i) for i in rows])[:, :L, :K].to(victim.device)
        with autocast(victim.device, victim.precision):
            w = rift.adversary(model.encoder, model.head, **batch, v=v, y=y[rows], pooling=model.pooling, **search)
            with torch.no_grad(), rift.dropout_off(model.encoder):
                ids = rift.discrete(batch["subs"], w)                            # (B, L)
                S[rows] = rift.features(model.encoder, ids, batch["attention_mask"], model.pooling)
        for i, k in zip(rows, w.argmax(-1).tolist()):                            # k: (L,) the candidate chosen
            adversarial[i] = vocabulary.substitute(texts[i], k)
    return victim.probabilities(S).argmax(-1), adversarial


def accuracy(predictions, examples):
    """The share of examples whose label is predicted."""
    return float(np.mean([p == x.y for p, x in zip(predictions, examples)]))


def wilson(successes, n, z=1.96):
    """Wilson's 95% interval of a proportion, (low, high) (Wilson 1927)."""
    p, z2n = successes / n, z * z / n
    centre, spread = p + z2n / 2, z * math.sqrt(p * (1 - p) / n + z2n / (4 * n))
    return (centre - spread) / (1 + z2n), (centre + spread) / (1 + z2n)


def paired_bootstrap(a, b, draws=10_000, seed=0):
    """The difference mean(a) - mean(b) on the same N texts, and its 95% bootstrap interval over texts and runs.

    a, b: (R, N) bool or float, R runs each, or (N,) of a single one. Returns (difference, low, high).
    """
    a, b = np.atleast_2d(a).astype(float), np.atleast_2d(b).astype(float)
    rng = np.random.default_rng(seed)
    texts = rng.integers(a.shape[1], size=(draws, a.shape[1]))

    def resampled(x):
        runs = rng.multinomial(len(x), np.full(len(x), 1 / len(x)), size=draws) / len(x)        # (draws, R)
        return np.take_along_axis(runs @ x, texts, axis=1).mean(1)                              # (draws,)

    return a.mean() - b.mean(), *np.quantile(resampled(a) - resampled(b), [0.025, 0.975])


# ---- Attacking a run -----------------------------------------------------------------------------


@dataclasses.dataclass
class Plan:
    """What the runs on one data set share: the texts to attack, and what the attacks may put there."""
    task: data.Task
    chosen: dict        # {index in the split: data.Example}, the same for every run and attack: of a seeded shuffle
    settings: dict      # what the choice depends on
    wordnet: object     # the table of pwws-wordnet
    lm: str             # the genetic attack's language-model constraint: none, scores or the name of a model
    allowed: object     # that constraint: (index, words, synonyms) -> synonyms


def make_plan(s, args):
    """The Plan for all runs whose settings name the same data as s. Raises InputError where something is missing."""
    data_dir, genetic = args.data_dir or s["data_dir"], "genetic" in args.attacks
    task = open_task(s, args.data_dir)
    examples = getattr(task, args.split)
    wordnet = data.load_neighbors("wordnet", data_dir) if "pwws-wordnet" in args.attacks else None
    source = args.lm_constraint or ("scores" if s["task"] in ("imdb", "snli") and genetic else "none")
    known, drawn_from, allowed = range(len(examples)), "all texts", lambda index, words, synonyms: synonyms
    if source == "scores":
        known, drawn_from, allowed = scores_of(examples, task.name, data_dir)
        print(f"The score file knows {len(known):,} of the {len(examples):,} {args.split} texts; N are drawn from these.")
    elif source != "none" and genetic:
        try:
            model = attacks.CausalLM(source, pick_device(args.device))
        except Exception as error:              # as for encoders
            raise InputError(f"--lm-constraint {source}: is neither none, scores nor a causal language model with "
                             f"safetensors weights: {first_line(error)}") from None
        allowed = lambda index, words, synonyms: attacks.lm_constraint(words, synonyms, model)
    order = np.random.default_rng(args.seed).permutation(len(examples)).tolist()
    chosen = {i: examples[i] for i in [i for i in order if i in known][:args.num_examples]}
    if not chosen:
        raise InputError(f"the score file knows no {args.split} text; --lm-constraint none attacks without it")
    if len(chosen) < args.num_examples:
        print(f"There are only {len(chosen):,} such {args.split} texts: N is {len(chosen)}, not {args.num_examples}.")
    settings = {"split": args.split, "num_examples": len(chosen), "seed": args.seed, "data": task.fingerprint,
                "drawn_from": drawn_from}
    return Plan(task, chosen, settings, wordnet, source, allowed)


def scores_of(examples, task_name, data_dir):
    """The published language-model scores of examples -> (the indices of those it knows, what the choice of texts
    depends on, the constraint (index, words, synonyms) -> synonyms). Raises InputError."""
    sentences = [" ".join(x.words[-1]) for x in examples]
    try:
        scores = attacks.read_lm_scores(data.locate("scores", data_dir), set(sentences), task_name)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"language-model scores: {first_line(error)}; --lm-constraint none attacks without them") from None
    digest = hashlib.sha256(json.dumps([scores.get(sentence) for sentence in sentences]).encode()).hexdigest()

    def allowed(index, words, synonyms):
        return attacks.scores_constraint(words, synonyms, scores[sentences[index]])

    return {i for i, sentence in enumerate(sentences) if sentence in scores}, f"score file {digest}", allowed


def run_attack(name, method, table, victim, plan, texts, pending, args, progress):
    """Yields the attacks.Result of each pending example as it is finished. texts: {index: text} of all chosen ones."""
    if name == "hull":              # quick, and all at once: where one is pending all are attacked, in the same batches
        predictions, adversarial = method(victim, list(plan.chosen.values()), seed=args.seed, progress=progress)
        for (i, x), prediction, words in zip(plan.chosen.items(), predictions.tolist(), adversarial):
            if i in pending:
                changed = sum(a != b for a, b in zip(data.from_text(texts[i])[-1], words[-1]))
                yield attacks.Result(i, name, x.y, texts[i], data.to_text(words), prediction != x.y, prediction, changed,
                                     queries=method.keywords["steps"] + 1, correct=True)     # forward passes of the search
        return

    def synonyms(index, words):
        lists = [table.get(word, []) for word in words]
        return plan.allowed(index, words, lists) if name == "genetic" else lists

    yield from attacks.attack(victim, [(i, texts[i], plan.chosen[i].y) for i in pending], method, synonyms, seed=args.seed,
                              batch_size=args.batch_size, progress=progress, name=name)


def methods_of(s, args):
    """The attacks with their settings bound: a run's own in the hull, those of the command line elsewhere."""
    pwws = functools.partial(attacks.pwws, unknown="NULL")
    return {"pwws": pwws, "pwws-wordnet": pwws, "hull": functools.partial(hull_attack, **search_settings(s)),
            "genetic": functools.partial(attacks.genetic, population=args.population, generations=args.generations)}


def evaluate(folder, victim, plan, args, processes):
    """Clean accuracy and every attack asked for on the chosen examples of one run; writes eval.json, attacks.jsonl
    and, for test, the attacks' figures into metrics.json.

    What attacks.jsonl already holds of the same settings is not attacked again; what is left is shared out among the
    processes, and the first of them writes the files. Raises InputError if its settings differ, and ValueError if the
    victim's probabilities are none.
    Returns {"name", "run": its settings, "labels", "robust": {"clean" or attack: (N,) bool}, "lines": {attack: [dict]}, "settings":
    {attack: dict}}.
    """
    suffix = "" if args.split == "test" else f"-{args.split}"
    eval_path, lines_path = folder / f"eval{suffix}.json", folder / f"attacks{suffix}.jsonl"
    tables = {name: plan.wordnet if name == "pwws-wordnet" else victim.vocabulary.neighbors for name in args.attacks}
    s = victim.config["settings"]
    methods = methods_of(s, args)
    settings = {"clean": plan.settings | {"precision": victim.precision}}
    for name in args.attacks:
        settings[name] = settings["clean"] | methods[name].keywords | {"neighbors": data.table_fingerprint(tables[name])}
        if name == "genetic":
            settings[name]["lm_constraint"] = plan.lm
    before, done = ({}, {}) if args.overwrite else earlier(eval_path, lines_path, settings)
    processes.wait()                # all have read what was there: the first one may write
    record = before | {"num_examples": len(plan.chosen), "settings": before.get("settings", {}) | settings}

    def save():                     # lines in one order, however often interrupted; then what vouches for them
        if processes.rank:
            return
        kept = [done[name][i] for name in ATTACKS if name in done for i in plan.chosen if i in done[name]]
        data.write_atomically(lines_path, "".join(json.dumps(line) + "\n" for line in kept))
        write_json(eval_path, record)

    texts = {i: data.to_text(victim.vocabulary.visible(x.words)) for i, x in plan.chosen.items()}
    P = attacks.check_probabilities(victim(texts.values()), len(texts))          # (N, C)
    clean = P.argmax(1) == [x.y for x in plan.chosen.values()]
    attacked = [i for i, correct in zip(texts, clean) if correct]
    record["clean"] = float(clean.mean())
    found = {"name": str(folder), "run": s, "labels": plan.task.labels, "robust": {"clean": clean},
             "lines": {}, "settings": settings}
    save()
    for name in args.attacks:
        lines = done.setdefault(name, {})
        if pending := [i for i in attacked if i not in lines]:
            processes.wait()                                                     # for the file that save() has replaced
            mine, new = pending[processes.rank::processes.world], {}
            with open(lines_path, "ab", buffering=0) as file:                    # a line a write, whoever writes
                for result in run_attack(name, methods[name], tables[name], victim, plan, texts, mine, args,
                                         progress=processes.rank == 0):
                    new[result.index] = {key: getattr(result, key) for key in RESULT_KEYS}
                    file.write(json.dumps(new[result.index]).encode() + b"\n")
            lines |= processes.collect(new)
        survived = {i for i in attacked if lines[i]["prediction"] == lines[i]["label"]}
        found["robust"][name] = np.array([i in survived for i in texts])
        found["lines"][name] = [lines[i] for i in attacked]
        record[name] = float(found["robust"][name].mean())
        save()
    if args.split == "test" and processes.rank == 0:         # its "hull" stays what training measured on all of test
        metrics = {key: value for key, value in read_json(folder / "metrics.json").items() if key not in BLACK_BOX}
        write_json(folder / "metrics.json", metrics | {name: record[name] for name in BLACK_BOX if name in record})
    return found


def earlier(eval_path, lines_path, settings):
    """What an earlier evaluation left: (eval.json's content, {attack: {index: line}}). InputError if its settings
    differ from those given as {"clean": .., attack: ..}: accuracies on different terms must not stand side by side."""
    if not eval_path.exists():
        if lines_path.exists():
            raise InputError(f"{lines_path}: there is no {eval_path.name} to say what it holds; --overwrite starts anew")
        return {}, {}
    before, done = read_json(eval_path), {}
    kept = before.get("settings")
    if not isinstance(kept, dict) or not all(isinstance(then, dict) for then in kept.values()):
        raise InputError(f"{eval_path}: has no settings, as eval.py writes them; --overwrite starts anew")
    for name, then in kept.items():
        now = settings.get(name, settings["clean"])                              # of another attack, what all share
        for key in now | then if name in settings else now:
            if then.get(key) != now.get(key):
                raise InputError(f"{eval_path}: holds {name} with {key} {str(then.get(key))[:40]}, not "
                                 f"{str(now.get(key))[:40]}; the same settings go on from there, --overwrite starts anew")
    for line in read_lines(lines_path, RESULT_KEYS):
        done.setdefault(line["attack"], {})[line["index"]] = line
    return before, done


# ---- What is printed -----------------------------------------------------------------------------

HEADS = {"pwws": "pwws (unknown word {unknown})", "pwws-wordnet": "pwws-wordnet (unknown word {unknown})",
         "genetic": "genetic ({population} x {generations}, lm {lm_constraint})", "hull": "hull ({steps} steps)"}


def comparison_table(found, names):
    """The table: a row a run; N, accuracy clean and under each attack, words changed, queries. found: what evaluate
    returned of each run; names: of the attacks. Returns rows of cells."""
    def share(correct):
        low, high = wilson(correct.sum(), len(correct))
        return f"{correct.mean():.3f} [{low:.3f}, {high:.3f}]"

    rows = [["run", "N", "clean"]]
    for name in names:
        heads = dict.fromkeys(HEADS[name].format(**run["settings"][name]) for run in found)
        rows[0] += [" / ".join(heads), "words", "queries"]
    for run in found:
        rows.append([run["name"], str(len(run["robust"]["clean"])), share(run["robust"]["clean"])])
        for name in names:
            lines = run["lines"][name]
            changed = [x["words_changed"] / len(data.from_text(x["original"])[-1]) for x in lines if x["success"]]
            rows[-1] += [share(run["robust"][name]), f"{np.mean(changed):.1%}" if changed else "-",
                         f"{np.mean([x['queries'] for x in lines]):.0f}" if lines else "-"]
    return rows


def scores(runs, name):
    """Which texts each run has right, clean or under an attack: (R, N) bool."""
    return np.stack([run["robust"][name] for run in runs])


def by_settings(runs):
    """{name: the runs that differ in nothing but the seed}: the method's name, with what sets it apart from other runs
    of that method. runs: what evaluate returned, "run" being a run's settings."""
    kinds = []
    for run in runs:
        s = {key: value for key, value in run["run"].items() if key not in ("seed", *INCIDENTAL)}
        same = next((others for settings, others in kinds if settings == s), None)
        if same is None:
            kinds.append((s, same := []))
        same.append(run)
    named = {}
    for s, same in kinds:
        others = [other for other, _ in kinds if other["method"] == s["method"]]
        apart = [f"{key} {value}" for key, value in s.items() if any(other.get(key) != value for other in others)]
        named[" ".join([s["method"], *apart])] = same
    return named


def seeds_table(methods, names):
    """The same over seeds: a row a method, mean and standard deviation over its runs (of a single one its figure).
    methods: {method: its runs}. Returns rows of cells."""
    rows = [["method", "runs", "clean", *names]]
    for method, runs in methods.items():
        means = [scores(runs, name).mean(1) for name in ("clean", *names)]
        rows.append([method, str(len(runs)), *(f"{x.mean():.3f}" + (f" (sd {x.std(ddof=1):.3f})" if len(x) > 1 else "")
                                               for x in means)])
    return rows


def differences_table(pairs, names):
    """Paired differences: a row for each (name, runs, other runs) in pairs. Returns rows of cells."""
    rows = [["difference", "clean", *names]]
    for label, runs, others in pairs:
        differences = [paired_bootstrap(scores(runs, name), scores(others, name)) for name in ("clean", *names)]
        rows.append([label, *("{:+.3f} [{:+.3f}, {:+.3f}]".format(*d) for d in differences)])
    return rows


def show(title, rows):
    """Prints a title and rows of cells, columns aligned; nothing where there is only the head."""
    if len(rows) > 1:
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        print("\n".join([f"\n{title}", *lines]))


def marked(original, adversarial, colour):
    """The adversarial text with its changed words shown: [old -> new], or in colour."""
    def words(text):
        return " | ".join(map(" ".join, data.from_text(text))).split(" ")        # premise | hypothesis
    form = "\033[9;31m{0}\033[0m \033[1;32m{1}\033[0m" if colour else "[{0} -> {1}]"
    return " ".join(b if a == b else form.format(a, b) for a, b in zip(words(original), words(adversarial)))


def report(groups, args):
    """Prints the table, the paired differences to the first run on the same data, and some adversarial examples.

    groups: a list for each data set, of what evaluate returned of its runs.
    """
    found = [run for group in groups for run in group]
    show(f"Accuracy on N {args.split} texts (seed {args.seed}) with its 95% Wilson interval; words: mean share of the words "
         "changed where\nthe attack succeeded; queries: mean number of texts asked, an attacked example\n",
         comparison_table(found, args.attacks))
    for first, *others in groups:
        methods = by_settings([first, *others])
        if len(methods) <= len(others):                  # some method has several runs
            show("Mean and standard deviation over runs:", seeds_table(methods, args.attacks))
            pairs = [(f"{b} - {a}", methods[b], methods[a]) for a, b in itertools.combinations(methods, 2)]
            show("Differences of methods, on the same texts, with the 95% bootstrap interval over texts and runs:",
                 differences_table(pairs, args.attacks))
        pairs = [(run["name"], [run], [first]) for run in others]
        show(f"Each run minus {first['name']}, on the same texts, with the 95% bootstrap interval:",
             differences_table(pairs, args.attacks))
    for run in found:
        for name in args.attacks:
            for line in [line for line in run["lines"][name] if line["success"]][:args.show]:
                print(f"\n{run['name']}, {name}: {run['labels'][line['label']]} -> {run['labels'][line['prediction']]}")
                print(textwrap.fill(marked(line["original"], line["adversarial"], sys.stdout.isatty()), 110,
                                    initial_indent="  ", subsequent_indent="  "))


# ---- Figures -------------------------------------------------------------------------------------
# Colours of Okabe and Ito, and a marker each: they differ in print and to every eye.

LOGGED = ("epoch", "params_l2", "cka", "dev_clean", "dev_hull")                # of a line of log.jsonl, what is drawn
STYLES = {"clean": ("black", "o"), "robust": ("#D55E00", "s"), "standard": ("black", "o"), "adv": ("#0072B2", "s"),
          "adv-ptwd": ("#009E73", "D"), "adv-mixout": ("#CC79A7", "P"), "rift-marginal": ("#E69F00", "v"),
          "rift": ("#D55E00", "^")}


def mean_and_range(rows, by, name):
    """The mean of rows[..][name] for each value of rows[..][by], with the range over seeds; a single run's accuracy on
    num_examples texts has its Wilson interval. Returns values (V,), means (V,), errors (2, V) for matplotlib's errorbar."""
    values, points = sorted({row[by] for row in rows}), []
    for value in values:
        same = [row for row in rows if row[by] == value]
        figures, n = [row[name] for row in same], same[0].get("num_examples")
        wilsons = len(same) == 1 and n and name in ("clean", *ATTACKS)
        points.append((np.mean(figures), *(wilson(figures[0] * n, n) if wilsons else (min(figures), max(figures)))))
    mean, low, high = np.array(points).T
    return values, mean, np.maximum([mean - low, high - mean], 0)                # not -1e-17


def plotted(folders, attack, split):
    """What plot() draws: a row a run with its settings and its accuracies, a row an epoch with its settings and what the log
    says of it, and the attack whose robust accuracy every run has. Raises InputError where one lacks it."""
    found, runs, epochs = {}, [], []
    for folder in folders:                  # accuracies of training first, then of eval.py: clean and robust of the same texts
        s, log = settings_of(folder), read_lines(folder / "log.jsonl", LOGGED)
        found[folder] = [read_json(folder / "metrics.json")]
        if split == "dev" and log:
            best = max(log, key=lambda line: line["dev_hull"])
            found[folder] = [{"clean": best["dev_clean"], "hull": best["dev_hull"], "num_examples": s["dev_size"]}]
        evaluated = folder / ("eval.json" if split == "test" else "eval-dev.json")
        found[folder] += [read_json(evaluated)] if evaluated.exists() else []
        epochs += [s | line | {"epoch": line["epoch"] + 1} for line in log]
    attack = attack or next((a for a in ("genetic", *ATTACKS) if all(a in f[0] | f[-1] for f in found.values())), "hull")
    for folder, scores in found.items():
        scores = next((x for x in reversed(scores) if {"clean", attack} <= x.keys()), None)
        if scores is None:
            raise InputError(f"--plot: {folder} has not been attacked: run eval.py {folder} --attacks {attack} first")
        s = settings_of(folder)
        runs.append(s | scores | {"alpha": s["alpha"] if s["method"] == "rift" else 0.0, "task": Path(s["task"]).name})
    return runs, epochs, attack


def plot(folders, path, attack=None, split="test"):
    """Draws what the runs vary: accuracy over alpha (adv: 0), clean against robust accuracy over beta, or else
    forgetting per epoch. attack: whose robust accuracy (None: the first of genetic, pwws, .. that every run has);
    split: on which texts; on dev, "hull" and clean of the best epoch are in every run's log.

    Raises InputError where matplotlib is not installed, cannot write such a file, or a run lacks what is drawn.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from None
    runs, epochs, attack = plotted(folders, attack, split)
    if len({run["task"] for run in runs}) > 1 or not epochs:
        raise InputError("--plot: the runs are of several tasks, or their log.jsonl are empty")

    def of(rows, *methods):
        return [row for row in rows if row["method"] in methods]

    def curve(ax, look, label, x, y, y_error, x_error=None):
        colour, marker = STYLES.get(look, STYLES["clean"])
        ax.errorbar(x, y, y_error, x_error, color=colour, marker=marker, capsize=3, lw=1.2, ms=5, label=label)

    def over_alpha(ax):
        curve(ax, "clean", "clean", *mean_and_range(of(runs, "adv", "rift"), "alpha", "clean"))
        curve(ax, "robust", attack, *mean_and_range(of(runs, "adv", "rift"), "alpha", attack))
        ax.set(xlabel="alpha, weight of L_info (0: adv)", ylabel="accuracy (share of texts)")

    def trade_off(ax):
        for method in sorted({run["method"] for run in of(runs, "adv", "rift")}):
            betas, x, x_error = mean_and_range(of(runs, method), "beta", attack)
            _, y, y_error = mean_and_range(of(runs, method), "beta", "clean")
            curve(ax, method, method, x, y, y_error, x_error)
            for beta, *at in zip(betas, x, y):
                below = method == "adv"                                          # the two curves lie close together
                ax.annotate(f"beta {beta:g}", at, textcoords="offset points", xytext=(3, -3 if below else 3), fontsize=7,
                            color=STYLES[method][0], rotation=-50 if below else 50, va="top" if below else "bottom")
        ax.margins(y=0.15)
        ax.set(xlabel=f"accuracy under {attack} (share of texts)", ylabel="clean accuracy (share of texts)")

    def forgetting(ax, name, label):
        for method in sorted({run["method"] for run in runs}):
            curve(ax, method, method, *mean_and_range(of(epochs, method), "epoch", name))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set(xlabel="epoch", ylabel=label)

    panels = [over_alpha] * (len({run["alpha"] for run in of(runs, "rift")}) > 1)
    panels += [trade_off] * (len({run["beta"] for run in of(runs, "adv", "rift")}) > 1)
    panels = panels or [functools.partial(forgetting, name="params_l2", label="||theta_s - theta_t||_2 (weights)"),
                        functools.partial(forgetting, name="cka", label="linear CKA of S and T on dev (1: the same)")]
    figure = Figure(figsize=(4.8 * len(panels), 3.8), layout="constrained")
    for ax, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        draw(ax)
        ax.grid(alpha=0.3)
        ax.legend()
    figure.suptitle(f"{runs[0]['task']}, {split} texts. Bars: the range over runs,\nof a single run's accuracy its 95% interval",
                    size=9)
    image = io.BytesIO()
    try:
        figure.savefig(image, format=path.suffix[1:].lower() or "png", dpi=150)
    except ValueError as error:
        raise InputError(f"--plot {path}: {first_line(error)}") from None
    data.write_atomically(path, image.getvalue())
    print(f"{path}: drawn from {', '.join(map(str, folders))}")


# ---- The command line ----------------------------------------------------------------------------


def parse(argv):
    """The command line of eval.py."""
    p = Parser(prog="eval.py", description="Attack finished runs and compare them.", allow_abbrev=False)
    flag = functools.partial(p.add_argument, metavar="N")
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that train.py has written")
    p.add_argument("--attacks", nargs="+", choices=ATTACKS, default=[], metavar="ATTACK",
                   help=f"any of {', '.join(ATTACKS)} (default: none, clean accuracy only)")
    flag("--num-examples", type=positive, default=300, help="texts to attack (default: %(default)s, as the authors' code; "
         "paper: 1,000)")
    p.add_argument("--split", choices=("test", "dev"), default="test", help="dev for choosing anything, test for reporting "
                   "(default: %(default)s)")
    flag("--population", type=number(int, 2), default=60, help="texts at once in the genetic attack (default and paper: "
         "%(default)s)")
    flag("--generations", type=positive, default=40, help="steps of the genetic attack (default and paper: "
         "%(default)s)")
    flag("--lm-constraint", metavar="SOURCE", help="what the genetic attack's synonyms must be likely under: none, scores "
         "(the published score file; N are drawn from its texts) or a causal language model's name or folder (default: the "
         "paper's, scores, for imdb and snli; none for other tasks)")
    flag("--seed", type=number(int, 0), default=0, help="of the choice of texts and of the attacks (default: %(default)s)")
    flag("--batch-size", type=positive, default=64, help="texts a forward pass, for speed only (default: %(default)s)")
    flag("--data-dir", metavar="DIR", help="where archives and tables are (default: where the run found them)")
    flag("--neighbors", metavar="FILE", help="substitution table: vectors (.txt, .zip), a table (.json) or wordnet (default: "
         "the run's own)")
    flag("--device", metavar="NAME", help="such as cpu or cuda:0 (default: a GPU if there is one)")
    p.add_argument("--precision", choices=("auto", "fp32", "bf16"), help="of the encoder (default: the run's own)")
    p.add_argument("--overwrite", action="store_true", help="forget earlier attacks on these runs and this split")
    flag("--show", type=number(int, 0), default=2, help="adversarial texts printed a run and attack (default: %(default)s)")
    flag("--plot", type=Path, metavar="FILE", help="draw the figures of finished runs: accuracy over alpha, clean against robust "
         "over beta, or forgetting per epoch, whatever the runs vary; without --attacks nothing is attacked")
    p.add_argument("--plot-attack", choices=ATTACKS, metavar="ATTACK", help="whose robust accuracy --plot draws (default: "
                   "genetic, pwws, pwws-wordnet or hull, the first that every run has)")
    args = p.parse_args(argv)
    args.attacks, args.runs = list(dict.fromkeys(args.attacks)), list(dict.fromkeys(args.runs))
    return args


def compare(args, processes):
    """Evaluates every run and prints the comparison. Raises InputError."""
    same_data = {}                                       # the runs of one data set are compared with each other
    for folder in args.runs:
        s = settings_of(folder)
        key = [s[k] for k in ("task", "train_size", "dev_size", "test_size", "split_seed")]
        same_data.setdefault(tuple(key), []).append(folder)
    groups = []
    for folders in same_data.values():
        plan = make_plan(settings_of(folders[0]), args)
        groups.append([])
        for folder in folders:
            s = settings_of(folder)
            table = open_table(s | {"neighbors": args.neighbors}, plan.task, args.data_dir) if args.neighbors else None
            victim = load_run(folder, processes.device(args.device), args.precision, args.batch_size, table)
            if plan.task.fingerprint != victim.config["fingerprints"].get("data"):
                raise InputError(f"{folder}: was trained on other data than is found now: the fingerprints differ")
            try:
                with data.writing(folder):
                    groups[-1].append(evaluate(folder, victim, plan, args, processes))
            except InputError:
                raise
            except ValueError as error:                  # of the victim's probabilities
                raise InputError(f"{folder}: {error}") from None
    report(groups, args)


@run_main
def main(argv=None):
    """eval.py's command line. Exits with 2 for bad input and with 130 when stopped by Ctrl-C."""
    args = parse(argv)
    processes = Processes()
    if processes.rank:
        sys.stdout = open(os.devnull, "w")
    if args.attacks or not args.plot:
        try:
            compare(args, processes)
        except KeyboardInterrupt:
            again = shlex.join(str(arg) for arg in argv if arg != "--overwrite")
            raise KeyboardInterrupt(f"the finished examples are kept, go on with: python eval.py {again}") from None
    if args.plot and processes.rank == 0:
        plot(args.runs, args.plot, args.plot_attack, args.split)


if __name__ == "__main__":
    main()
