"""Attack finished runs, compare them, and draw the paper's figures.

    python eval.py runs/imdb/rift --attacks pwws genetic --num-examples 1000
    python eval.py runs/toy/* --plot figures.png

In Python, a finished run is a function from texts to class probabilities:

    from eval import load_run
    victim = load_run("runs/imdb/rift")
    victim(["a great film"])                          # (1, C)
"""
import argparse
import dataclasses
import functools
import json
import math
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

import attacks
import data
import rift
from data import InputError

ATTACKS = ("pwws", "genetic", "pwws-wordnet", "hull")

# ------------------------------------------------------------------------------------------------
# Command lines: one clear line for bad input, exit code 2


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        raise InputError(message)


def number(kind, low, high=math.inf, low_open=False):
    """A type for argparse: an int or float of at least (or, low_open, above) low and at most high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if low_open else low <= value) or not value <= high or math.isinf(value):
            upper = "" if math.isinf(high) else f" and at most {high:g}"
            raise argparse.ArgumentTypeError(f"{text!r} has to be {'an integer' if kind is int else 'a number'} "
                                             f"{'above' if low_open else 'of at least'} {low:g}{upper}")
        return value
    return parse


positive = number(int, 1)


def run_main(main):
    """Decorates main(argv): an InputError becomes one line on standard error and exit code 2."""
    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(sys.argv[1:] if argv is None else argv)
        except InputError as error:
            print(f"{Path(main.__code__.co_filename).name}: error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
    return wrapped


def pick_device(name):
    """--device: the one named, else a GPU when there is one. InputError for a device that is not there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None


def pick_precision(name, device):
    """--precision: "auto" is bf16 on GPUs that have it and fp32 elsewhere."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def autocast(device, precision):
    """The region in which encoders compute in bfloat16, if that is the precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


# ------------------------------------------------------------------------------------------------
# Data and models


def load_encoder(name_or_dir):
    """A BERT or RoBERTa encoder and its tokenizer, from the hub or a folder: float32, safetensors, no remote code.

    Returns (encoder, tokenizer). Raises InputError where there is none, where it is of another kind, or where a
    tensor is missing or of the wrong shape; only a pooler may be missing (RoBERTa's), it starts at random.
    """
    try:
        encoder, info = AutoModel.from_pretrained(
            name_or_dir, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
            local_files_only=Path(name_or_dir).is_dir(), ignore_mismatched_sizes=True)
        tokenizer = AutoTokenizer.from_pretrained(name_or_dir, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, safetensors.SafetensorError) as error:
        raise InputError(f"model {name_or_dir}: cannot be loaded as a safetensors BERT or RoBERTa encoder: "
                         f"{str(error).strip().splitlines()[0]}") from None
    if encoder.config.model_type not in ("bert", "roberta"):
        raise InputError(f"model {name_or_dir}: is a {encoder.config.model_type}, it has to be a bert or a roberta")
    lost = [k for k in info["missing_keys"] if not k.startswith("pooler.")] + [k for k, *_ in info["mismatched_keys"]]
    if lost:
        raise InputError(f"model {name_or_dir}: {len(lost)} tensors are missing or of the wrong shape, "
                         f"{sorted(lost)[0]} for one")
    return encoder, tokenizer


def open_task(s, data_dir=None):
    """The data of a run's settings s, from data_dir or where the run found them. Returns a data.Task."""
    return data.load_task(s["task"], data_dir or s["data_dir"], train_size=s["train_size"], dev_size=s["dev_size"],
                          test_size=s["test_size"], split_seed=s["split_seed"])


def open_table(s, task, data_dir=None):
    """The substitution table of a run's settings s, for a task's words."""
    if task.name == "toy":
        return data.toy_neighbors()
    words = Counter(word for x in task.train for text in x.words for word in text)
    return data.load_neighbors(s["neighbors"], data_dir or s["data_dir"], words)


def longest_input(encoder):
    """The most tokens that the encoder has positions for."""
    return encoder.config.max_position_embeddings - getattr(encoder.embeddings, "padding_idx", -1) - 1


class Victim:
    """A trained classifier as a function from texts to class probabilities.

    victim(texts) -> (N, C) float32 array; a text is its words joined by single spaces, a pair is a tuple of two
    such strings. model: a RIFT; vocabulary: a data.Vocabulary; the rest of a run rides along in `config`.
    """

    def __init__(self, model, vocabulary, batch_size=64, precision="fp32", config=None):
        self.model, self.vocabulary = model, vocabulary
        self.batch_size, self.precision, self.config = batch_size, precision, config
        self.device = model.encoder.device

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
        return self.probabilities(self.features([data.from_text(text) for text in texts]))

    def key(self, text):
        """What the model sees of a text: its token ids, as bytes. Texts of one key have the same probabilities."""
        return np.array(self.vocabulary.input_ids(data.from_text(text)), np.int32).tobytes()


def load_run(folder, device=None, precision=None, batch_size=64):
    """The finished run in a folder, as a Victim. device, precision: by default a GPU if there is one, the run's own.

    Raises InputError for a folder that holds no finished run, or one whose files do not fit together.
    """
    folder, s = Path(folder), settings_of(folder)
    if not (folder / "model.safetensors").exists():
        raise InputError(f"{folder}: the run is not finished (no model.safetensors): go on with train.py --resume")
    neighbors = data.load_neighbors("wordnet" if s["neighbors"] == "wordnet" else folder / "neighbors.json")
    encoder, tokenizer = load_encoder(folder / "encoder")
    config = read_json(folder / "config.json")
    model = rift.RIFT(encoder, len(config["labels"]), s["pooling"], s["method"] == "rift-marginal").to(pick_device(device)).eval()
    own = {name: p for name, p in model.named_parameters() if not name.startswith(("encoder.", "teacher."))}
    take_tensors(own, load_tensors(folder / "model.safetensors")[0], folder / "model.safetensors")
    vocabulary = data.Vocabulary(tokenizer, s["max_len"], neighbors, s["unknown_words"], s["candidates"])
    return Victim(model, vocabulary, batch_size,
                  pick_precision(precision or s["precision"], model.encoder.device), config)


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


def settings_of(folder):
    """A run's settings, from its config.json; InputError where they are not all there."""
    config = read_json(Path(folder) / "config.json")
    try:
        s = config["settings"]
        for key in ("task", "method", "seed", "max_len", "pooling", "neighbors", "unknown_words", "candidates", "precision",
                    "data_dir", "train_size", "dev_size", "test_size", "split_seed", "alpha", "beta"):
            s[key]
        if not isinstance(config["labels"], list) or not isinstance(config["fingerprints"], dict):
            raise KeyError("labels or fingerprints")
    except (KeyError, TypeError) as error:
        raise InputError(f"{Path(folder) / 'config.json'}: lacks {error}: it has to be as train.py wrote it") from None
    return s


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


# ------------------------------------------------------------------------------------------------
# Accuracy: clean, on the hull, under attack


def hull_attack(victim, examples, *, steps=10, lr=1.0, weight_decay=2e-5, sparsity=15.0, seed=0, progress=False):
    """The quick robust accuracy: the training adversary, maximising cross-entropy, at its discrete texts (section 2).

    examples: data.Example. Returns (predictions (N,) int64 on the adversarial texts, those texts as words).
    """
    vocabulary, model = victim.vocabulary, victim.model
    texts = [vocabulary.visible(x.words) for x in examples]
    y = torch.tensor([x.y for x in examples], device=victim.device)
    generator = torch.Generator().manual_seed(seed)
    adversarial = [None] * len(texts)
    bar = tqdm(victim.batches(texts, hull=True), "hull", math.ceil(len(texts) / victim.batch_size), disable=not progress,
               leave=False)
    for rows, batch in bar:
        v = rift.noise(batch["subs"], vocabulary.max_len, generator)
        with autocast(victim.device, victim.precision):
            w = rift.adversary(model.encoder, model.head, **batch, v=v, y=y[rows], pooling=model.pooling, steps=steps,
                               lr=lr, weight_decay=weight_decay, sparsity=sparsity)
        for i, k in zip(rows, w.argmax(-1).tolist()):                            # k: (L,) the candidate chosen
            adversarial[i] = vocabulary.substitute(texts[i], k)
    return victim.probabilities(victim.features(adversarial)).argmax(-1), adversarial


def accuracy(predictions, examples):
    """The share of examples whose label is predicted."""
    return float(np.mean([p == x.y for p, x in zip(predictions, examples)]))


def wilson(successes, n, z=1.96):
    """Wilson's 95% interval of a proportion, (low, high) (Wilson 1927)."""
    p, z2n = successes / n, z * z / n
    centre, spread = p + z2n / 2, z * math.sqrt(p * (1 - p) / n + z2n / (4 * n))
    return (centre - spread) / (1 + z2n), (centre + spread) / (1 + z2n)


def paired_bootstrap(a, b, draws=10_000, seed=0):
    """The difference mean(a) - mean(b) on the same examples, and its 95% bootstrap interval.

    a, b: (N,) bool or float. Returns (difference, low, high).
    """
    d = np.asarray(a, float) - np.asarray(b, float)                              # (N,)
    means = d[np.random.default_rng(seed).integers(len(d), size=(draws, len(d)))].mean(1)
    return d.mean(), *np.quantile(means, [0.025, 0.975])


# ------------------------------------------------------------------------------------------------
# Attacking a run


def choose(task, split, num_examples, seed, known=None):
    """The examples that every run and every attack of a comparison shares: the first of a seeded shuffle.

    known: bool for each example, whether it may be chosen (the score file has it). Returns indices into the split.
    """
    order = np.random.default_rng(seed).permutation(len(getattr(task, split)))
    return [int(i) for i in order if known is None or known[i]][:num_examples]


def attack_settings(name, args, victim, fingerprint):
    """Everything that the outcome of an attack depends on beside the run itself, JSON-able."""
    s = victim.config["settings"]
    table = "wordnet" if name == "pwws-wordnet" else data.table_fingerprint(victim.vocabulary.neighbors)
    settings = {"split": args.split, "num_examples": args.num_examples, "seed": args.seed, "data": fingerprint,
                "neighbors": table, "precision": victim.precision}
    if name == "genetic":
        settings |= {"population": args.population, "generations": args.generations, "lm_constraint": args.lm_constraint}
    if name == "hull":
        settings |= {k: s[k] for k in ("adv_steps", "adv_lr", "adv_weight_decay", "sparsity")}
    return settings


def run_attack(name, victim, chosen, examples, args, allowed=None):
    """Yields the attacks.Result of each chosen example. allowed: the language-model constraint, (index, words,
    synonyms) -> synonyms."""
    visible = {i: victim.vocabulary.visible(examples[i].words) for i in chosen}
    if name == "hull":
        s = victim.config["settings"]
        some = [examples[i] for i in chosen]
        clean = victim([data.to_text(visible[i]) for i in chosen]).argmax(-1)
        predictions, adversarial = hull_attack(victim, some, steps=s["adv_steps"], lr=s["adv_lr"], progress=True,
                                               weight_decay=s["adv_weight_decay"], sparsity=s["sparsity"], seed=args.seed)
        for i, before, after, words in zip(chosen, clean, predictions, adversarial):
            changed = sum(a != b for a, b in zip(visible[i][-1], words[-1]))
            y = examples[i].y
            yield attacks.Result(i, name, y, data.to_text(visible[i]), data.to_text(words), bool(before == y != after),
                                 int(after), changed, s["adv_steps"] + 1, bool(before == y))
        return
    table = data.load_neighbors("wordnet", args.data_dir) if name == "pwws-wordnet" else victim.vocabulary.neighbors

    def synonyms(index, words):
        lists = [table.get(word, []) for word in words]
        return allowed(index, words, lists) if allowed and name == "genetic" else lists

    method = (functools.partial(attacks.genetic, population=args.population, generations=args.generations)
              if name == "genetic" else attacks.pwws)
    texts = [(i, data.to_text(visible[i]), examples[i].y) for i in chosen]
    yield from attacks.attack(victim, texts, method, synonyms, seed=args.seed, batch_size=args.batch_size, name=name)


def language_model_constraint(args, task):
    """(known, allowed): which examples of the split the score file has (None: all may be attacked), and the filter
    of the genetic attack's synonyms, (index, words, synonyms) -> synonyms (None: no constraint)."""
    if args.lm_constraint == "none" or "genetic" not in args.attacks:
        return None, None
    if args.lm_constraint != "scores":
        try:
            language_model = attacks.CausalLM(args.lm_constraint, pick_device(args.device))
        except (OSError, ValueError) as error:
            raise InputError(f"--lm-constraint {args.lm_constraint}: {str(error).splitlines()[0]}") from None
        return None, lambda index, words, synonyms: attacks.lm_constraint(words, synonyms, language_model)
    sentences = [" ".join(x.words[-1]) for x in getattr(task, args.split)]
    try:
        scores = attacks.read_lm_scores(data.locate("scores", args.data_dir), set(sentences))
    except ValueError as error:
        raise InputError(f"{error}; --lm-constraint none attacks without a language model") from None
    known = [sentence in scores for sentence in sentences]
    print(f"The score file knows {sum(known):,} of the {len(known):,} {args.split} texts; examples are drawn from these.")
    return known, lambda index, words, synonyms: attacks.scores_constraint(words, synonyms, scores[sentences[index]])


def evaluate(folder, victim, task, chosen, allowed, args):
    """Clean accuracy and every attack asked for on the chosen examples of one run; writes eval.json, attacks.jsonl.

    What attacks.jsonl already holds of the same settings is not attacked again; InputError if its settings differ.
    Returns {"clean": (N,) bool, attack: {"robust": (N,) bool, "lines": [dict]}}.
    """
    suffix = "" if args.split == "test" else f"-{args.split}"
    eval_path, lines_path = folder / f"eval{suffix}.json", folder / f"attacks{suffix}.jsonl"
    before = read_json(eval_path) if eval_path.exists() and not args.overwrite else {}
    settings = dict(before.get("settings", {}))
    lines = read_lines(lines_path) if before else []
    for name in args.attacks:
        now = attack_settings(name, args, victim, task.fingerprint)
        for key, value in settings.get(name, now).items():
            if now.get(key) != value:
                raise InputError(f"{lines_path}: holds {name} with {key} {value}, not {now.get(key)}; the same settings go "
                                 "on from there, --overwrite starts anew")
        settings[name] = now
    results = {k: v for k, v in before.items() if k not in ("settings", "num_examples")}
    write = functools.partial(write_json, eval_path)
    write(results | {"num_examples": len(chosen), "settings": settings})
    data.write_atomically(lines_path, "".join(json.dumps(line) + "\n" for line in lines))

    examples = getattr(task, args.split)
    visible = [data.to_text(victim.vocabulary.visible(examples[i].words)) for i in chosen]
    clean = np.array([p == examples[i].y for p, i in zip(victim(visible).argmax(-1), chosen)])
    found = {"clean": clean}
    results["clean"] = float(clean.mean())
    with open(lines_path, "a", encoding="utf-8") as file:
        for name in args.attacks:
            done = {line["index"]: line for line in lines if line["attack"] == name}
            pending = [i for i, correct in zip(chosen, clean) if correct and i not in done]
            for result in run_attack(name, victim, pending, examples, args, allowed):
                line = done[result.index] = dataclasses.asdict(result)
                file.write(json.dumps(line) + "\n")
                file.flush()
            robust = np.array([c and not done[i]["success"] for c, i in zip(clean, chosen)])
            found[name] = {"robust": robust, "lines": [done[i] for i in chosen if i in done]}
            results[name] = float(robust.mean())
    write(results | {"num_examples": len(chosen), "settings": settings})
    if args.split == "test":
        metrics = read_json(folder / "metrics.json")
        write_json(folder / "metrics.json", metrics | {name: results[name] for name in args.attacks if name != "hull"})
    return found


def write_json(path, content):
    """Writes a JSON-able object, atomically."""
    data.write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_lines(path):
    """The objects of a .jsonl file. A last line that was cut off when its writer was killed is left out."""
    lines = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
    objects = []
    for number, line in enumerate(lines, 1):
        try:
            objects.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise InputError(f"{path}, line {number}: {line[:60]!r} is not JSON; --overwrite starts anew") from None
    return objects


# ------------------------------------------------------------------------------------------------
# What is printed


def comparison_table(names, found, args):
    """The table: a row a run, clean and robust accuracy with 95% Wilson intervals, words changed, queries."""
    heads = {"clean": "clean"} | {a: a for a in args.attacks}
    if "genetic" in heads:
        heads["genetic"] = f"genetic ({args.population}x{args.generations}, lm {args.lm_constraint})"
    rows = [["run", *heads.values()]]
    for name, results in zip(names, found):
        row = [name]
        for column in heads:
            robust = results["clean"] if column == "clean" else results[column]["robust"]
            low, high = wilson(robust.sum(), len(robust))
            row.append(f"{robust.mean():.3f} [{low:.3f}, {high:.3f}]")
            lines = [] if column == "clean" else results[column]["lines"]
            if lines:
                fooled = [line for line in lines if line["success"]]
                share = np.mean([x["words_changed"] / len(data.from_text(x["original"])[-1]) for x in fooled]) if fooled else 0
                row[-1] += f"  {share:.0%} words, {np.mean([x['queries'] for x in lines]):.0f} queries"
        rows.append(row)
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def marked(original, adversarial, colour):
    """The adversarial text with its changed words shown: [old -> new], or in colour."""
    def words(text):
        return " | ".join(map(" ".join, data.from_text(text))).split(" ")        # premise | hypothesis
    form = "\033[9;31m{0}\033[0m \033[1;32m{1}\033[0m" if colour else "[{0} -> {1}]"
    return " ".join(b if a == b else form.format(a, b) for a, b in zip(words(original), words(adversarial)))


def report(names, found, args, labels):
    """Prints the table, the paired differences to the first run, and some adversarial examples."""
    print(f"\n{args.split}, N = {len(found[0]['clean'])}: accuracy with its 95% interval; share of words changed where the "
          "attack succeeded; queries an attacked example")
    print(comparison_table(names, found, args))
    for name, results in list(zip(names, found))[1:]:
        for column in ["clean", *args.attacks]:
            a, b = (r["clean"] if column == "clean" else r[column]["robust"] for r in (results, found[0]))
            difference, low, high = paired_bootstrap(a, b)
            print(f"{name} - {names[0]}, {column}: {difference:+.3f} [{low:+.3f}, {high:+.3f}] (paired, bootstrap)")
    for name, results in zip(names, found):
        for attack in args.attacks:
            for line in [line for line in results[attack]["lines"] if line["success"]][:args.show]:
                print(f"\n{name}, {attack}: {labels[line['label']]} -> {labels[line['prediction']]}")
                print(textwrap.fill(marked(line["original"], line["adversarial"], sys.stdout.isatty()), 110,
                                    initial_indent="  ", subsequent_indent="  "))


# ------------------------------------------------------------------------------------------------
# Figures


def finished(folder):
    """What a finished run says of itself: {"settings", "log": [an object an epoch], "metrics"}."""
    return {"settings": settings_of(folder),
            "log": read_lines(folder / "log.jsonl"), "metrics": read_json(folder / "metrics.json")}


def mean_interval(values):
    """Mean of n values and the half width of its 95% interval (Student's t over runs; 0 for one run)."""
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
    n = len(values)
    return np.mean(values), (t.get(n, 1.96) * np.std(values, ddof=1) / math.sqrt(n) if n > 1 else 0.0)


def plot(folders, path, attack):
    """Draws what the runs vary: accuracy over alpha, the trade-off over beta, and forgetting per epoch (section 6).

    attack: whose robust accuracy is drawn. Raises InputError where matplotlib is not installed or nothing varies.
    """
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from None
    runs = [finished(folder) for folder in folders]

    def group(chosen, *keys):
        groups = {}
        for run in chosen:
            groups.setdefault(tuple(run["settings"][k] for k in keys), []).append(run)
        return dict(sorted(groups.items()))

    def score(group_runs, key):
        if missing := [run for run in group_runs if key not in run["metrics"]]:
            s = missing[0]["settings"]
            raise InputError(f"--plot: the {s['method']} run of seed {s['seed']} has no {key} in metrics.json: attack it first")
        return mean_interval([run["metrics"][key] for run in group_runs])

    def over_alpha(ax):
        groups = group([r for r in runs if r["settings"]["method"] == "rift"], "alpha")
        groups = group([r for r in runs if r["settings"]["method"] == "adv"], "method") and {
            (0.0,): [r for r in runs if r["settings"]["method"] == "adv"]} | groups or groups
        for key, label in (("clean", "clean"), (attack, f"under {attack}")):
            y, error = zip(*(score(g, key) for g in groups.values()))
            ax.errorbar(range(len(groups)), y, error, marker="o", capsize=3, label=label)
        ax.set_xticks(range(len(groups)), [f"{a:g}" for a, in groups])
        ax.set(xlabel="alpha, weight of L_info (0: adv)", ylabel="accuracy (share of texts)")
        ax.legend()

    def trade_off(ax):
        for method in ("adv", "rift"):
            groups = group([r for r in runs if r["settings"]["method"] == method], "beta")
            if groups:
                x, xe = zip(*(score(g, attack) for g in groups.values()))
                y, ye = zip(*(score(g, "clean") for g in groups.values()))
                ax.errorbar(x, y, ye, xe, marker="o", capsize=3, label=method)
                for (beta,), a, b in zip(groups, x, y):
                    ax.annotate(f"beta {beta:g}", (a, b), textcoords="offset points", xytext=(4, 4), fontsize=7)
        ax.set(xlabel=f"accuracy under {attack} (share of texts)", ylabel="clean accuracy (share of texts)")
        ax.legend()

    def forgetting(quantity, label):
        def draw(ax):
            for (method,), group_runs in group(runs, "method").items():
                epochs = min(len(run["log"]) for run in group_runs)
                y, error = zip(*(mean_interval([run["log"][e][quantity] for run in group_runs]) for e in range(epochs)))
                ax.errorbar(range(1, epochs + 1), y, error, marker="o", capsize=3, label=method)
            ax.set(xlabel="epoch", ylabel=label)
            ax.legend()
        return draw

    def varies(key, methods):
        return len({r["settings"][key] for r in runs if r["settings"]["method"] in methods}) > 1

    panels = [over_alpha] * varies("alpha", ["rift"]) + [trade_off] * varies("beta", ["adv", "rift"])
    panels = panels or [forgetting("params_l2", "||theta_s - theta_t||_2"), forgetting("cka", "linear CKA of S and T on dev")]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), squeeze=False, layout="constrained")
    for draw, ax in zip(panels, axes[0]):
        draw(ax)
        ax.grid(alpha=0.3)
    figure.suptitle(f"{runs[0]['settings']['task']}: mean over {len({r['settings']['seed'] for r in runs})} seed(s), "
                    "95% interval", fontsize=10)
    temporary = Path(path).with_name(f".{Path(path).stem}.tmp.png")
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)
    print(f"{path}: {', '.join(str(f) for f in folders)}")


# ------------------------------------------------------------------------------------------------


def parse(argv):
    """The command line of eval.py."""
    p = Parser(prog="eval.py", description="Attack finished runs and compare them.",
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that train.py has written")
    p.add_argument("--attacks", nargs="+", choices=ATTACKS, default=[], metavar="ATTACK", help=f"any of {', '.join(ATTACKS)}")
    p.add_argument("--num-examples", type=positive, default=300, metavar="N", help="texts to attack (paper: 1,000; code: 300)")
    p.add_argument("--split", choices=("test", "dev"), default="test", help="dev for choosing anything, test for reporting")
    p.add_argument("--population", type=positive, default=60, metavar="N", help="of the genetic attack, texts (paper: 60)")
    p.add_argument("--generations", type=positive, default=40, metavar="N", help="of the genetic attack (paper: 40)")
    p.add_argument("--lm-constraint", metavar="SOURCE", help="what the genetic attack's synonyms must be likely under: none, "
                   "scores (the published score file) or a causal language model's name or folder (default: the paper's, "
                   "scores, for imdb and snli; none for other tasks)")
    p.add_argument("--seed", type=int, default=0, metavar="S", help="of the choice of examples and of the attacks")
    p.add_argument("--batch-size", type=positive, default=64, metavar="N", help="texts a forward pass")
    p.add_argument("--data-dir", type=Path, metavar="DIR", help="where archives and tables are (default: the run's own)")
    p.add_argument("--neighbors", metavar="FILE", help="substitution table: vectors, .json or wordnet (default: the run's own)")
    p.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")
    p.add_argument("--precision", choices=("auto", "fp32", "bf16"), help="of the encoder (default: the run's own)")
    p.add_argument("--overwrite", action="store_true", help="forget earlier attacks on these runs")
    p.add_argument("--show", type=int, default=2, metavar="N", help="adversarial examples printed for a run and an attack")
    p.add_argument("--plot", type=Path, metavar="FILE", help="draw the figures of finished runs: accuracy over alpha, clean "
                   "against robust over beta, or forgetting per epoch, whatever the runs vary; attacks nothing")
    p.add_argument("--plot-attack", choices=("hull", *ATTACKS[:3]), default="hull", metavar="ATTACK",
                   help="whose robust accuracy --plot draws")
    args = p.parse_args(argv)
    if args.population < 2:
        raise InputError("--population 1: the genetic attack needs at least 2")
    args.attacks = list(dict.fromkeys(args.attacks))
    return args


@run_main
def main(argv=None):
    """eval.py's command line."""
    args = parse(argv)
    if args.plot:
        return plot(args.runs, args.plot, args.plot_attack)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    groups = {}                                          # the runs of one data set are compared with each other
    for folder in args.runs:
        s = settings_of(folder)
        groups.setdefault((s["task"], s["train_size"], s["dev_size"], s["test_size"], s["split_seed"]), []).append(folder)
    asked = args.lm_constraint
    for folders in groups.values():
        task = open_task(settings_of(folders[0]), args.data_dir)
        args.lm_constraint = asked or ("scores" if task.name in ("imdb", "snli") else "none")
        known, allowed = language_model_constraint(args, task)
        chosen = choose(task, args.split, args.num_examples, args.seed, known)
        found = []
        for folder in folders:
            victim = load_run(folder, args.device, args.precision, args.batch_size)
            s = victim.config["settings"]
            if task.fingerprint != victim.config["fingerprints"]["data"]:
                raise InputError(f"{folder}: was trained on other data than is found now: the fingerprints differ")
            if args.neighbors:
                table = open_table(s | {"neighbors": args.neighbors}, task, args.data_dir)
                victim.vocabulary = data.Vocabulary(victim.vocabulary.tokenizer, s["max_len"], table, s["unknown_words"],
                                                    s["candidates"])
            found.append(evaluate(folder, victim, task, chosen, allowed, args))
        report([str(folder) for folder in folders], found, args, task.labels)


if __name__ == "__main__":
    main()
