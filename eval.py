"""Attack finished runs, compare them, and draw the paper's figures.

    python eval.py runs/imdb/rift --attacks pwws genetic --num-examples 1000
    python eval.py runs/imdb/* --plot figures.png

In Python, a finished run is a function from texts to class probabilities:

    from eval import load_run
    victim = load_run("runs/imdb/rift")
    victim(["a great film"])                        # (1, C)

One process, and for a run one command at a time. In this file: loading finished runs; accuracy,
clean and under the hull attack; attacking runs and keeping what is finished; the tables; the
figures.
"""
import signal

if __name__ == "__main__":      # Ctrl-C without a traceback while the imports below take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import csv
import dataclasses
import functools
import inspect
import itertools
import json
import math
import os
import shlex
import sys
import textwrap
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import attacks
import data
import rift
from data import InputError

# What a run is made of, each with a fingerprint in config.json, and the setting that says where it
# comes from. Fingerprints are compared, not these settings: two paths may have the same content.
SOURCES = {"data": "task", "encoder": "model", "neighbors": "neighbors"}
# The tasks that are no folder of the user's.
NAMED = "imdb", "snli", "toy"
# Settings in which equal runs may differ: these paths, and what has no effect on the method.
INCIDENTAL = (*SOURCES.values(), "data_dir", "device", "eval_batch_size")


# ---- A trained model as a function ---------------------------------------------------------------


class Victim:
    """A trained classifier as a function from texts to class probabilities.

    victim(texts) -> (N, C) float32 array. A text is its words joined by single spaces, a pair is a
    tuple of two such strings; it is already tokenized, and only split at white space. Raises
    ValueError for anything else.
    model: a rift.RIFT; vocabulary: a data.Vocabulary; labels: names of the classes; parts: 1 if the
    model reads single texts, 2 for pairs.
    """

    def __init__(self, model, vocabulary, batch_size=64, labels=None, parts=1):
        self.model, self.vocabulary, self.batch_size = model, vocabulary, batch_size
        self.labels, self.parts, self.device = labels, parts, model.encoder.device

    def words(self, text):
        """A text, or a pair, as Example.words; ValueError if it is not what this model reads."""
        strings = [text] if isinstance(text, str) else text
        if not isinstance(strings, (list, tuple)) or len(strings) != self.parts or not all(
                isinstance(string, str) for string in strings):
            reads = "a string each" if self.parts == 1 else "a pair of strings each"
            raise ValueError(f"{text!r:.80}: the model reads {reads}")
        return data.from_text(text)

    def batches(self, texts, hull=False, bar=None):
        """Yields (rows, encoded batch on the device), texts of similar length together.

        texts: N texts as words, see data.Example; hull: also the candidates, see
        data.Vocabulary.encode; bar: the name of a progress bar, without one there is no bar.
        """
        order = sorted(range(len(texts)), key=lambda i: sum(map(len, texts[i])))
        starts = range(0, len(order), self.batch_size)
        for start in tqdm(starts, bar, leave=False, disable=None if bar else True):
            rows = order[start:start + self.batch_size]
            yield rows, self.vocabulary.encode([texts[i] for i in rows], hull, self.device)

    @torch.no_grad()
    def features(self, texts, encoder=None, bar=None):
        """S = F_s(x), (N, H) float32, or another encoder's features; dropout is off.

        texts: N texts as words; bar: see batches().
        """
        encoder = encoder or self.model.encoder
        S = torch.empty(len(texts), encoder.config.hidden_size, device=self.device)
        theta = rift.parameters_in(encoder, self.model.dtype)
        with rift.dropout_off(encoder), rift.stand_in(encoder, theta):
            for rows, batch in self.batches(texts, bar=bar):
                e = rift.embed(encoder, batch["input_ids"])                     # (B, L, H)
                S[rows] = rift.features(encoder, e, batch["attention_mask"], self.model.pooling)
        return S

    @torch.no_grad()
    def probabilities(self, S):
        """q(.|s), a (N, C) float32 array, for features S (N, H); dropout is off."""
        with rift.dropout_off(self.model.head):
            return torch.softmax(self.model.head(S), -1).cpu().numpy()

    def __call__(self, texts):
        if isinstance(texts, str):
            raise ValueError(f"{texts!r:.80} is one text, not a list of texts: victim([text])")
        return self.probabilities(self.features([self.words(text) for text in texts]))

    def key(self, text):
        """What the model sees of a text: its token ids, as bytes. An attack sends only one of an
        example's texts with the same key."""
        return np.array(self.vocabulary.input_ids(self.words(text)), np.int32).tobytes()

    def visible(self, text):
        """How many words of the changeable text the model sees; it cuts the rest off."""
        return len(self.vocabulary.visible(self.words(text))[-1])


def settings_of(folder, finished=True):
    """(settings, config): a run's settings as attributes, and all of its config.json, a dict.

    Among the attributes is `fingerprints`, of its data, encoder and table. Raises InputError for a
    folder without a run and, if `finished`, for a run that is not.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        runs = [run for run in Path(folder).glob("*/config.json") if run.parent.name != "encoder"]
        hint = f"; the runs in it are {folder}/*" if runs else ""
        problem = "it has no config.json" if Path(folder).is_dir() else "no such folder"
        raise InputError(f"{folder}: not a run of train.py, {problem}{hint}")
    config = data.read_json(path)
    if "settings" not in config:
        raise InputError(f"{path}: is not that of a run of train.py")
    if finished and not (Path(folder) / "metrics.json").exists():
        raise InputError(f"{folder}: the run is not finished; train.py --resume goes on with it")
    return SimpleNamespace(**config["settings"], fingerprints=config["fingerprints"]), config


def load_run(folder, device=None, precision=None, batch_size=64, table=None):
    """The finished run in a folder, as a Victim.

    device: by default a GPU if there is one; precision: by default the run's own; table: a
    substitution table in place of the run's. model.teacher is here a copy of the fine-tuned
    encoder, not F_t; data.load_encoder(settings_of(folder)[0].model)[0] is F_t.
    Raises InputError for a folder without a finished run, or whose files do not fit together.
    """
    folder = Path(folder)
    s, config = settings_of(folder)
    device = data.pick_device(device)
    dtype = data.DTYPES[data.pick_precision(precision or s.precision, device)]
    if table is None:
        table = data.read_neighbors(folder / "neighbors.json")
        if data.fingerprint(table) != s.fingerprints["neighbors"]:
            raise InputError(f"{folder / 'neighbors.json'}: is not the table that the run was "
                             "trained with; --neighbors FILE attacks with another one")
    with torch.random.fork_rng(devices=[]):     # the caller's random numbers stay what they were
        encoder, tokenizer = data.load_encoder(folder.absolute() / "encoder", s.max_len,
                                               complete=True)
        model = rift.RIFT(encoder, len(config["labels"]), s.pooling, s.method == "rift-marginal",
                          dtype, tau=s.tau)
    path = folder / "model.safetensors"
    tensors, _ = data.load_tensors(path)
    wanted = {(name, p.shape) for name, p in model.state_dict().items()
              if not name.startswith(("encoder.", "teacher."))}
    differ = sorted(wanted ^ {(name, tensor.shape) for name, tensor in tensors.items()})
    if differ:
        raise InputError(f"{path}: of another run, or damaged, see {differ[0][0]}")
    model.load_state_dict(tensors, strict=False)
    for part in (encoder.encoder, encoder.pooler):      # once, not at every call in parameters_in()
        part.to(dtype)
    vocabulary = data.Vocabulary(tokenizer, s.max_len, table, s.unknown_words, s.candidates)
    return Victim(model.to(device).eval(), vocabulary, batch_size, config["labels"],
                  config["parts"])


# ---- Accuracy: clean and under the hull attack, and how certain it is ----------------------------


def search_settings(s):
    """The settings of the search in the hull, as rift.adversary takes them."""
    return dict(steps=s.adv_steps, lr=s.adv_lr, weight_decay=s.adv_weight_decay,
                sparsity=s.sparsity)


def hull_attack(victim, examples, *, seed=0, bar=None, **search):
    """Searches the hull for the text that fools the model most, knowing the label, and rounds it:
    at each position the candidate with the largest weight is taken.

    examples: N data.Example; each starts from its own noise, seeded with (seed, its place in the
    list), so that in fp32 the texts found do not depend on the batches. search: see
    search_settings().
    Returns (predictions, texts, S): the classes predicted for the adversarial texts, (N,) int64;
    these texts as words; their features (N, H).
    """
    vocabulary = victim.vocabulary
    texts = [vocabulary.visible(x.words) for x in examples]
    y = torch.tensor([x.y for x in examples], dtype=torch.int64, device=victim.device)
    adversarial = [None] * len(texts)

    def start(i):                                       # v of example i, (max_len, candidates)
        generator = torch.Generator().manual_seed(data.seed_of(seed, i))
        shape = vocabulary.max_len, vocabulary.max_candidates
        return rift.noise(shape, vocabulary.max_len, generator)

    for rows, batch in victim.batches(texts, hull=True, bar=bar):
        B, L, K = batch["subs"].shape
        v = torch.stack([start(i)[:L, :K] for i in rows]).to(victim.device)
        w = victim.model.adversary(**batch, v=v, y=y[rows], **search)           # (B, L, K)
        for i, choice in zip(rows, w.argmax(-1).tolist()):                      # choice: (L,)
            adversarial[i] = vocabulary.substitute(texts[i], choice)
    S = victim.features(adversarial)
    return victim.probabilities(S).argmax(-1), adversarial, S


def accuracy(examples, *predictions):
    """The share of examples whose label is predicted, by all of them if there are several (N,)."""
    y = [x.y for x in examples]
    return float(np.mean(np.all([p == y for p in predictions], axis=0)))


def accuracies(victim, examples, s, bar=None):
    """(clean, hull, S, S_attacked): accuracy on examples as they are, and also after hull_attack();
    the features (N, H) of both. s: the run's settings; bar: the name of the progress bars."""
    S = victim.features([x.words for x in examples], bar=bar)
    clean = victim.probabilities(S).argmax(-1)                                  # (N,)
    attacked, _, S_attacked = hull_attack(victim, examples, bar=bar and f"{bar} hull",
                                          **search_settings(s))
    return accuracy(examples, clean), accuracy(examples, clean, attacked), S, S_attacked


def wilson(successes, n):
    """Wilson's 95% interval of a proportion, (low, high) (Wilson 1927)."""
    z = 1.96
    p, z2n = successes / n, z * z / n
    centre, spread = p + z2n / 2, z * math.sqrt(p * (1 - p) / n + z2n / (4 * n))
    return max((centre - spread) / (1 + z2n), 0.0), min((centre + spread) / (1 + z2n), 1.0)


def bootstrap(statistic, *groups, draws=10_000):
    """A statistic of runs that saw the same N texts, and its 95% bootstrap interval.

    groups: arrays (R, N) or (R, N, M): R runs, N texts, M numbers for each. statistic: a function
    of one array for each group, its mean over runs and texts in each of D draws, (D,) or (D, M); it
    returns (D,). Each draw resamples the texts, and the runs too if every group has several: one
    run does not show how much runs differ. Of R runs R - 1 are drawn, because drawing R would make
    the variance of their mean too small by the factor (R - 1) / R (McCarthy and Snowden 1985).
    Returns (value, low, high).
    """
    groups = [np.asarray(x, float) for x in groups]
    rng, N = np.random.default_rng(0), groups[0].shape[1]
    several = all(len(x) > 1 for x in groups)
    values, D = [], 100                                 # D draws at a time, to save memory
    for _ in range(draws // D):
        texts, means = rng.integers(N, size=(D, N)), []
        for x in groups:
            R = len(x)
            share = np.full(R, 1 / R)
            runs = rng.multinomial(R - 1, share, size=D) / (R - 1) if several else [share] * D
            mixed = np.einsum("dr,rn...->dn...", runs, x)                       # (D, N, ..)
            means.append(mixed[np.arange(D)[:, None], texts].mean(1))           # (D, ..)
        values.append(statistic(*means))
    low, high = np.quantile(np.concatenate(values), [0.025, 0.975])
    return statistic(*(x.mean((0, 1))[None] for x in groups))[0], low, high


# ---- Attacking runs ------------------------------------------------------------------------------

# To add an attack, write it like attacks.pwws and add its line here. A keyword argument of it that
# the command line sets has a flag in parse() and a place in keywords(); its defaults go into
# eval.json, so they have to be JSON values.
ATTACKS = {
    "pwws": attacks.pwws,
    "genetic": attacks.genetic,                     # with the synonyms that --lm-constraint leaves
    "pwws-wordnet": attacks.pwws,                   # the synonyms are WordNet's
    "exhaustive": attacks.exhaustive,               # needs --max-queries
    "hull": hull_attack,                            # needs gradients: for finished runs only
}
LINE_KEYS = [field.name for field in dataclasses.fields(attacks.Result) if field.name != "correct"]


@dataclasses.dataclass
class Plan:
    """What all runs on one data set share."""
    task: data.Task
    chosen: dict            # {index in the split: data.Example}, the same for every run and attack;
                            # with the published scores only texts that they know
    settings: dict          # what the choice depends on
    wordnet: dict           # the table of pwws-wordnet; None where it is not asked for
    constraint: dict        # genetic's settings of its language-model constraint
    allowed: object         # this constraint: (index, words, synonyms) -> synonyms


@dataclasses.dataclass
class Evaluation:
    """What one run did on the chosen texts."""
    name: str
    run: SimpleNamespace    # its settings
    labels: list
    robust: dict            # {"clean" or attack: (N,) bool, whether it was right}
    lines: dict             # {attack: [a dict for each attacked text]}
    settings: dict          # {"clean": what all attacks share, attack: its own}
    wrong: list             # [a dict for each text that was wrong before any attack]


def make_plan(s, args):
    """The Plan for all runs that have the data of settings s. Raises InputError."""
    data_dir, task = args.data_dir or s.data_dir, data.open_task(s, args.data_dir)
    examples = getattr(task, args.split)
    wordnet = None
    if "pwws-wordnet" in args.attacks:
        wordnet = data.open_table(s, task, "wordnet", data_dir)
    known, drawn_from = range(len(examples)), "all texts"
    allowed = lambda index, words, synonyms: synonyms
    source = constraint(s, args)
    judge = {"lm_constraint": source}
    if source == "scores":
        sentences = [" ".join(x.words[-1]) for x in examples]
        try:
            path = data.locate("scores", data_dir)
            scores = attacks.read_lm_scores(path, set(sentences), task.name)
        except (OSError, *data.DAMAGE) as error:
            raise InputError(f"language-model scores: {data.first_line(error)}; --lm-constraint "
                             "none attacks without them") from None
        known = {i for i, sentence in enumerate(sentences) if sentence in scores}
        drawn_from = "score file " + data.fingerprint([scores.get(x) for x in sentences])
        allowed = lambda index, words, synonyms: attacks.scores_constraint(
            words, synonyms, scores[sentences[index]])
        print(f"The score file knows {len(known):,} of the {len(examples):,} {args.split} texts; "
              "the attacked ones are drawn from these.")
    elif source != "none":
        try:
            folder = data.model_folder(source)
            model = attacks.CausalLM(folder, data.pick_device(args.device))
        except Exception as error:          # whatever is wrong with it, transformers says it
            raise InputError(f"--lm-constraint {source}: neither none, scores nor a "
                             f"causal language model ({data.first_line(error)})") from None
        allowed = lambda index, words, synonyms: attacks.lm_constraint(words, synonyms, model)
        weights = b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))
        judge["lm_weights"] = data.fingerprint(weights)
    # the first N of one shuffle: a larger N later contains them
    order = np.random.default_rng(args.seed).permutation(len(examples)).tolist()
    first = [i for i in order if i in known][:args.num_examples]
    chosen = {i: examples[i] for i in first}
    if not chosen:
        raise InputError(f"the score file knows no {args.split} text; --lm-constraint none attacks "
                         "without it")
    if len(chosen) < args.num_examples:
        print(f"{task.name}: there are only {len(chosen):,} {args.split} texts to choose from.")
    settings = {"split": args.split, "seed": args.seed, "data": task.fingerprint,
                "drawn_from": drawn_from}
    return Plan(task, chosen, settings, wordnet, judge, allowed)


def constraint(s, args):
    """The genetic attack's language-model constraint: none, scores or the name of a model.

    scores also decides which texts all attacks of a command are drawn from, see make_plan(). So
    with and without genetic among the attacks, the texts of imdb and snli differ by default.
    """
    by_default = "genetic" in args.attacks and s.task in ("imdb", "snli")
    return args.lm_constraint or ("scores" if by_default else "none")


def keywords(name, s, args):
    """The keyword arguments of an attack: its own defaults, with what the command line sets; of
    hull, those of the run's search in training."""
    if name == "hull":
        return search_settings(s)
    flags = {"population": args.population, "generations": args.generations}
    parameters = inspect.signature(ATTACKS[name]).parameters.values()
    return {p.name: flags.get(p.name) or p.default for p in parameters
            if p.default is not p.empty and p.name != "rng"}


def run_attack(name, victim, table, plan, texts, pending, s, args):
    """Yields an attacks.Result for each pending example as it is finished, of hull all at the end.

    table: the attack's substitution table; texts: {index: text} of the chosen examples; pending:
    those of these indices that are to be attacked; s: the run's settings.
    """
    if name == "hull":      # attacks all, so that a command that goes on forms the same batches
        predictions, found, _ = hull_attack(victim, list(plan.chosen.values()), seed=args.seed,
                                            bar=name, **search_settings(s))
        for (i, x), prediction, words in zip(plan.chosen.items(), predictions, found):
            if i in pending:
                before = data.from_text(texts[i])[-1]
                yield attacks.Result(
                    i, name, x.y, texts[i], data.to_text(words), success=bool(prediction != x.y),
                    prediction=int(prediction), correct=True, stopped=False,
                    words_changed=sum(a != b for a, b in zip(before, words[-1])),
                    queries=s.adv_steps + 1,                                    # forward passes
                    substitutable=sum(map(bool, data.substitutes(before, table))))
        return

    def synonyms(index, words):
        lists = data.substitutes(words, table)
        return plan.allowed(index, words, lists) if name == "genetic" else lists

    examples = [(i, texts[i], plan.chosen[i].y) for i in pending]
    method = functools.partial(ATTACKS[name], **keywords(name, s, args))
    yield from attacks.attack(victim, examples, method, synonyms, seed=args.seed, name=name,
                              batch_size=args.batch_size, max_queries=args.max_queries)


def conditions(folder, s, precision, tables, plan, args, before):
    """The settings and weights that an outcome depends on: {"clean": what all attacks share,
    attack: its own}.

    Two things are missing: the attack's code (after a change give --overwrite) and the batches,
    which in bf16 can decide about a text that is barely right. before: what is in eval.json. If
    what its attacks share is today's, those that are not asked for today keep their settings, and
    evaluate() keeps their results.
    """
    paths = folder / "encoder" / "model.safetensors", folder / "model.safetensors"
    weights = data.fingerprint(b"".join(path.read_bytes() for path in paths))
    shared = plan.settings | {"precision": precision, "weights": weights}
    settings, earlier = {"clean": shared}, before.get("settings")
    if isinstance(earlier, dict) and earlier.get("clean") == shared:
        settings |= earlier
    for name in args.attacks:
        settings[name] = keywords(name, s, args) | {"neighbors": data.fingerprint(tables[name])}
        if name == "genetic":
            settings[name] |= plan.constraint
        if name != "hull":
            settings[name]["max_queries"] = args.max_queries
    return settings


def files_of(split):
    """The names of a run's two files of an evaluation: its summary, and a line for each text."""
    suffix = "" if split == "test" else f"-{split}"
    return f"eval{suffix}.json", f"attacks{suffix}.jsonl"


def evaluate(folder, s, plan, args):
    """The Evaluation of one run: clean accuracy and every attack asked for, on the chosen texts.

    Writes attacks.jsonl, each line with a fingerprint of the settings and weights that it was made
    with. Lines that were made as today are used again, the others stay in the file. Writes
    eval.json, the latest result of each attack. That of an attack that is not asked for today stays
    if its lines cover today's texts, see conditions(). On the test split metrics.json gets the same
    results, except hull's, and loses older ones.
    """
    table = None
    if args.neighbors:
        table = data.open_table(s, plan.task, args.neighbors, args.data_dir)
    victim = load_run(folder, args.device, args.precision, args.batch_size, table)
    if plan.task.fingerprint != s.fingerprints["data"]:
        raise InputError(f"{folder}: was trained on other data than is found now in {s.task} "
                         "(other texts, or another NLTK, see versions in its config.json)")
    metrics = data.read_json(folder / "metrics.json")
    tables = dict.fromkeys(args.attacks, victim.vocabulary.neighbors)
    tables["pwws-wordnet"] = plan.wordnet
    precision = data.pick_precision(args.precision or s.precision, victim.device)
    eval_path, lines_path = (folder / name for name in files_of(args.split))
    before = data.read_json(eval_path) if eval_path.exists() else {}
    settings = conditions(folder, s, precision, tables, plan, args, before)

    texts = {i: data.to_text(victim.vocabulary.visible(x.words)) for i, x in plan.chosen.items()}
    P = attacks.check_probabilities(victim(list(texts.values())), len(texts))   # (N, C)
    labels, predictions = [x.y for x in plan.chosen.values()], P.argmax(1)      # (N,)
    attacked = [i for i, y, p in zip(texts, labels, predictions) if p == y]
    wrong = [dict(index=i, label=y, original=text, adversarial=text, prediction=int(p))
             for (i, text), y, p in zip(texts.items(), labels, predictions) if p != y]

    marks = {name: data.fingerprint([name, settings["clean"], settings[name]])
             for name in settings if name != "clean"}
    # done: {attack: {index: line}}, the lines to use; others: the rest
    done, others = {name: {} for name in marks}, []
    for line in data.read_lines(lines_path):
        if line.get("made_with") not in marks.values():
            others.append(line)
        elif not (args.overwrite and line["attack"] in args.attacks):
            done[line["attack"]][line["index"]] = line

    def survived(name):                                                         # (N,)
        # by the last prediction: in bf16 a text that is barely right may be wrong in another batch
        lines = done[name]
        still_right = {i for i in attacked if lines[i]["prediction"] == lines[i]["label"]}
        return np.array([i in still_right for i in texts])

    # a new file: another eval.py that still writes to the old one stops, see keep()
    write_lines(lines_path, others, done)
    for name in args.attacks:
        pending = [i for i in attacked if i not in done[name]]
        if pending:
            results = run_attack(name, victim, tables[name], plan, texts, pending, s, args)
            keep(results, marks[name], done[name], lines_path)
            write_lines(lines_path, others, done)
        if not sys.stderr.isatty():                     # a terminal has shown the bar instead
            print(f"{folder}: {name} {survived(name).mean():.3f} (N {len(texts)})", file=sys.stderr)

    robust = {"clean": predictions == labels}
    robust |= {name: survived(name) for name in done if done[name].keys() >= set(attacked)}
    scores = {name: float(x.mean()) for name, x in robust.items()}
    data.write_json(eval_path, scores | {
        "num_examples": len(texts), "settings": {name: settings[name] for name in robust}})
    if args.split == "test":            # "clean" and "hull" there stay those of all test texts
        older = (ATTACKS.keys() | before.keys()) - {"clean", "hull"}
        rest = {key: value for key, value in metrics.items() if key not in older}
        now = {key: value for key, value in scores.items() if key not in rest}
        data.write_json(folder / "metrics.json", rest | now)
    lines = {name: [done[name][i] for i in attacked] for name in args.attacks}
    return Evaluation(str(folder), s, victim.labels, robust, lines, settings, wrong)


def keep(results, mark, lines, path):
    """Adds each Result to lines, {index: line}, and at once to attacks.jsonl, so that a stop loses
    none of them. Raises InputError if a second eval.py has replaced the file meanwhile."""
    with open(path, "ab", buffering=0) as file:
        for result in results:
            if os.fstat(file.fileno()).st_nlink == 0:
                raise InputError(f"{path}: another eval.py has replaced it; evaluate a run with "
                                 "one command at a time")
            line = {key: getattr(result, key) for key in LINE_KEYS} | {"made_with": mark}
            lines[result.index] = line
            with data.writing(path):
                file.write(json.dumps(line).encode() + b"\n")


def write_lines(path, others, done):
    """Writes attacks.jsonl: the lines of other settings, then `done`, {attack: {index: line}}."""
    lines = [line for by_index in done.values() for _, line in sorted(by_index.items())]
    data.write_atomically(path, "".join(json.dumps(line) + "\n" for line in others + lines))


# ---- Tables --------------------------------------------------------------------------------------

LEGEND = """
N: texts, the same for every run on a data set. clean: the share of them that is classified right.
Each attack: the share that is right and stays right under the attack. Both with a 95% Wilson
interval. hull: the search of training, but against the true label and rounded to words, a quick
stand-in for the attacks. unknown: PWWS puts it in place of each word in turn, to see how much that
word matters. words: share of the words that successful attacks changed. queries: different texts
that the attack asked about, on average (hull: forward passes). fixed: share of the attacked texts
in which no word that the model sees has a synonym to use. stopped: share of all N texts that
survived, but for which --max-queries ended the attack. The true robust accuracy is at most what
survived, and if the attack is exhaustive, at least that minus what was stopped."""


def show(title, rows):
    """Prints a title and rows of cells in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    print(f"\n{title}")
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def head_of(name, evaluations):
    """The column head of an attack, with its settings. Among them is the start of the table's
    fingerprint if runs are attacked with different tables."""
    heads, tables = [], {x.settings[name].get("neighbors") for x in evaluations}
    for x in evaluations:
        shown = {key: value for key, value in x.settings[name].items()
                 if key not in ("neighbors", "lm_weights") and value is not None
                 and (name != "hull" or key == "steps")}
        if len(tables) > 1:
            shown["neighbors"] = x.settings[name]["neighbors"][:6]
        shown = [f"{key.replace('_', ' ')} {value}" for key, value in shown.items()]
        heads.append(f"{name} ({', '.join(shown)})")
    return " / ".join(dict.fromkeys(heads))


def run_table(evaluations, names):
    """Rows of cells: one for each run."""
    def share(right):
        return "{:.3f} [{:.3f}, {:.3f}]".format(right.mean(), *wilson(right.sum(), len(right)))

    def mean(numbers, form):
        return format(np.mean(numbers), form) if numbers else "-"

    rows = []                                           # of (column head, cell)
    for x in evaluations:
        N = len(x.robust["clean"])
        rows.append([("run", x.name), ("N", str(N)), ("clean", share(x.robust["clean"]))])
        for name in names:
            lines = x.lines[name]
            changed = [line["words_changed"] / max(len(data.from_text(line["original"])[-1]), 1)
                       for line in lines if line["success"]]
            rows[-1].append((head_of(name, evaluations), share(x.robust[name])))
            if any(y.settings[name].get("max_queries") for y in evaluations):
                stopped = sum(line["stopped"] for line in lines) / N
                rows[-1].append(("stopped", f"{stopped:.1%}"))
            rows[-1] += [("words", mean(changed, ".1%")),
                         ("queries", mean([line["queries"] for line in lines], ".0f")),
                         ("fixed", mean([line["substitutable"] == 0 for line in lines], ".1%"))]
    return [[head for head, _ in rows[0]], *([cell for _, cell in row] for row in rows)]


def own_settings(s, *varying):
    """The settings that set a run apart from others, a dict, without those named by `varying`.

    Of data, encoder and table the fingerprints count, not the paths. Left out are also the
    incidental settings, flags that were not given, and mixout, tau and weights that the method does
    not use: adv with alpha 0.1 and with 0.5 is the same.
    """
    terms = rift.METHODS[s.method]
    unused = {"alpha", "beta", "ptwd", "mixout", "tau"} - set(terms.values())
    if s.method == "adv-mixout":
        unused.discard("mixout")
    if terms.keys() - {rift.ce, rift.kl, rift.ptwd}:    # a term that may compute f_c
        unused.discard("tau")
    return s.fingerprints | {
        key: value for key, value in vars(s).items() if value is not None
        and key not in {*INCIDENTAL, "fingerprints", *varying, *unused}}


def by_settings(runs, *varying):
    """{name: [run, ..]}: runs that differ only in the seed and the settings named by `varying`.

    runs: objects whose `run` holds the settings. A name is the method's, with what sets it apart
    from other runs of that method.
    """
    groups = {}
    for x in runs:
        s = own_settings(x.run, "seed", *varying)
        groups.setdefault(json.dumps(s, sort_keys=True), (s, []))[1].append(x)
    named = {}
    for s, same in groups.values():
        others = [other for other, _ in groups.values() if other["method"] == s["method"]]
        apart = {key: value for key, value in s.items()
                 if any(other.get(key) != value for other in others)}
        for key in SOURCES.keys() & apart.keys():       # where it came from, and which one it is
            apart[key] = f"{getattr(same[0].run, SOURCES[key])} ({apart[key][:6]})"
        named[" ".join([s["method"], *(f"{key} {value}" for key, value in apart.items())])] = same
    return named


def weight_of(s, key):
    """The weight alpha or beta of a run; 0 where its method has no term with it."""
    return getattr(s, key) if key in rift.METHODS[s.method].values() else 0


def by_weight(runs, key):
    """{value: [run, ..]}: the runs of a curve at each value of alpha or beta."""
    values = dict.fromkeys(weight_of(x.run, key) for x in runs)
    return {value: [x for x in runs if weight_of(x.run, key) == value] for value in values}


def right(runs, name):
    """Which texts each run has right, clean or under an attack: (R, N) bool."""
    return np.stack([x.robust[name] for x in runs])


def seeds_table(methods, names):
    """Rows of cells: mean and standard deviation over the runs of each method."""
    rows = [["method", "runs", "clean", *names]]
    for method, runs in methods.items():
        means = [right(runs, name).mean(1) for name in ("clean", *names)]
        rows.append([method, str(len(runs))])
        rows[-1] += [f"{x.mean():.3f}" + (f" (sd {x.std(ddof=1):.3f})" if len(x) > 1 else "")
                     for x in means]
    return rows


def differences_table(pairs, names):
    """Rows of cells: for each (label, runs, other runs) the difference with its interval.

    A star marks an interval over texts only, because one side is a single run.
    """
    rows = [["difference", "clean", *names]]
    for label, runs, others in pairs:
        star = "*" if min(len(runs), len(others)) == 1 else ""
        rows.append([label])
        for name in ("clean", *names):
            found = bootstrap(lambda a, b: a - b, right(runs, name), right(others, name))
            rows[-1].append("{:+.3f} [{:+.3f}, {:+.3f}]".format(*found) + star)
    return rows


def tradeoff_gain(reference, runs, name):
    """Robust accuracy minus a reference's at the same clean accuracy: (value, low, high).

    reference, runs: {beta: [run, ..]}. The reference's points (clean, robust) are joined by
    straight lines in the order of their clean accuracy; beyond its ends, the robust accuracy of the
    end counts. The difference is averaged over the betas of `runs`. The interval is over runs and
    texts, see bootstrap().
    """
    def statistic(*means):                                                      # each (D, 2)
        known, asked = np.stack(means[:len(reference)]), np.stack(means[len(reference):])
        gains = []
        for d in range(known.shape[1]):
            x, y = known[np.argsort(known[:, d, 0]), d].T
            gains.append(np.mean(asked[:, d, 1] - np.interp(asked[:, d, 0], x, y)))
        return np.array(gains)

    groups = [*reference.values(), *runs.values()]
    return bootstrap(statistic, *[np.stack([right(same, "clean"), right(same, name)], axis=-1)
                                  for same in groups])                          # each (R, N, 2)


def report(groups, args):
    """Prints the tables and some adversarial texts. groups: for each data set its Evaluations."""
    everything = [x for group in groups for x in group]
    show(f"Accuracy on {args.split} texts", run_table(everything, args.attacks))
    print(LEGEND)
    note = "(95% bootstrap interval over texts and runs; *: over texts, one side is a single run)"
    for group in groups:
        # several data sets may have the same name
        of = f", {group[0].run.task} ({group[0].name} ..)" if len(groups) > 1 else ""
        # standard, the reference, comes first
        methods = by_settings(sorted(group, key=lambda x: x.run.method != "standard"))
        if len(methods) < len(group):
            show(f"Mean and standard deviation over runs{of}", seeds_table(methods, args.attacks))
        pairs = [(f"{b} - {a}", methods[b], methods[a])
                 for a, b in itertools.combinations(methods, 2)]
        if pairs:
            show(f"Differences on the same texts{of} {note}",
                 differences_table(pairs, args.attacks))
        for text in tradeoffs(group, args.attacks):
            print(text)
    for x in everything:
        for name in args.attacks:
            for line in [line for line in x.lines[name] if line["success"]][:args.show]:
                before, after = (x.labels[line[key]] for key in ("label", "prediction"))
                print(f"\n{x.name}, {name}: {before} -> {after}")
                print(textwrap.fill(marked(line["original"], line["adversarial"]), 98,
                                    initial_indent="  ", subsequent_indent="  "))
    if args.csv:
        with data.replacing(args.csv) as tmp, tmp.open("w", newline="", encoding="utf-8") as file:
            write_csv(file, everything, args.attacks)


def write_csv(file, evaluations, names):
    """Writes the original and adversarial texts: every text of every run and attack. Those that
    were wrong before (`correct` is False) were not attacked: of these, `success`, `queries` and the
    like are empty."""
    rows = csv.DictWriter(file, ["run", *LINE_KEYS, "correct"], extrasaction="ignore")
    rows.writeheader()
    for x, name in itertools.product(evaluations, names):
        for line in [line | {"correct": True} for line in x.lines[name]] + [
                line | {"attack": name, "correct": False} for line in x.wrong]:
            joined = {key: " | ".join([line[key]] if isinstance(line[key], str) else line[key])
                      for key in ("original", "adversarial")}
            labels = {key: x.labels[line[key]] for key in ("label", "prediction")}
            rows.writerow({"run": x.name} | line | joined | labels)


def tradeoffs(group, names):
    """Yields lines of text: for each method with several betas its gain over adv's curve.

    The mean is over the betas whose mean clean accuracy lies within adv's range. A beta beyond it
    can only be compared with the end of adv's curve, and has a line of its own.
    """
    settings = by_settings(group, "beta")
    by_beta = {curve: by_weight(runs, "beta") for curve, runs in settings.items()}
    references = [curve for curve, runs in settings.items() if runs[0].run.method == "adv"]
    if names and len(references) > 1 and max(map(len, by_beta.values())) > 1:
        yield f"\nNo gain over adv's curve, because adv has several: {', '.join(references)}"
        return
    adv = by_beta.pop("adv", {})
    by_beta = {curve: points for curve, points in by_beta.items() if len(points) > 1}
    if len(adv) < 2:
        return
    ends = [right(runs, "clean").mean() for runs in adv.values()]
    for curve, name in itertools.product(by_beta, names):
        within = {beta: runs for beta, runs in by_beta[curve].items()
                  if min(ends) <= right(runs, "clean").mean() <= max(ends)}
        rows = [(f"mean over the {len(within)} of {len(by_beta[curve])} betas within adv's range",
                 within)] if within else []
        rows += [(f"beta {beta:g}, beyond the ends of adv's curve", {beta: runs})
                 for beta, runs in by_beta[curve].items() if beta not in within]
        for label, points in rows:
            star = "*" if min(map(len, [*adv.values(), *points.values()])) == 1 else ""
            gain = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*tradeoff_gain(adv, points, name))
            yield f"\n{curve} against adv at the same clean accuracy, {name}, {label}: {gain}{star}"


def marked(original, adversarial):
    """The adversarial text with its changed words shown as [old -> new]."""
    def words(text):
        return " | ".join(map(" ".join, data.from_text(text))).split(" ")   # premise | hypothesis
    pairs = zip(words(original), words(adversarial))
    return " ".join(b if a == b else f"[{a} -> {b}]" for a, b in pairs)


# ---- Figures -------------------------------------------------------------------------------------

# Colour-blind safe colours (Okabe and Ito) with a marker each, in the order of rift.METHODS; the
# last four are for new methods.
STYLES = [("#000000", "o"), ("#0072B2", "s"), ("#009E73", "D"), ("#CC79A7", "P"), ("#E69F00", "v"),
          ("#D55E00", "^"), ("#56B4E9", "X"), ("#999999", "*"), ("#8C510A", "h"), ("#4D4D4D", "<")]


def curves(runs, *varying):
    """Yields (name, runs, look) for each curve, see by_settings(); look: for matplotlib's errorbar.

    A method has one colour and marker; its curves with different settings differ in line style.
    """
    seen, styles = Counter(), dict(zip(rift.METHODS, itertools.cycle(STYLES)))
    for name, same in by_settings(runs, *varying).items():
        method = same[0].run.method
        colour, marker = styles[method]
        line = ["-", "--", ":", "-."][seen[method] % 4]
        seen[method] += 1
        yield name, same, dict(color=colour, marker=marker, ls=line, lw=1.2, ms=5, capsize=2.5,
                               elinewidth=0.8)


def spread(values, n=None):
    """(mean, below, above): the last two are the lengths of the error bar's halves.

    values: one for each seed; the bar is their range. n: number of texts; with it the bar of a
    single run's accuracy is its Wilson interval.
    """
    mean = np.mean(values)
    low, high = min(values), max(values)
    if len(values) == 1 and n:
        low, high = wilson(mean * n, n)
    return mean, max(mean - low, 0), max(high - mean, 0)


# In a figure of accuracies these settings of an evaluation may differ, because they are the run's
OF_THE_RUN = "data", "weights", "precision"


def read_finished(folder, attack, split):
    """A finished run for the figures: its folder, run (its settings), scores {"clean", attack}, n
    texts, log (a dict for each epoch), kept (that of the kept epoch), how (the attack's settings).

    The scores are those of eval.json. If hull is missing there, both are those that train.py
    measured: on dev for the kept epoch, on test for the whole split. Raises InputError where the
    attack, or the kept epoch's line of log.jsonl, is missing.
    """
    s, _ = settings_of(folder)
    metrics, log = data.read_json(folder / "metrics.json"), data.read_lines(folder / "log.jsonl")
    best = metrics["best_epoch"]
    kept = next((line for line in log if line["epoch"] == best), None)
    if kept is None:
        raise InputError(f"{folder / 'log.jsonl'}: lacks epoch {best}, the kept one")
    path = folder / files_of(split)[0]
    scores = data.read_json(path) if path.exists() else {}
    if attack not in scores and attack == "hull":
        on_dev = {"clean": kept["dev_clean"], "hull": kept["dev_hull"],
                  "num_examples": metrics["dev_examples"]}
        scores = on_dev if split == "dev" else metrics
    if attack not in scores:
        raise InputError(f"{folder}: its last evaluation on {split} was without {attack}: first "
                         f"run eval.py {folder} --attacks {attack} --split {split}")
    n = scores.get("num_examples") or scores.get("test_examples")
    settings = scores.get("settings", {})
    # hull has the settings of the run's own search
    given = settings.get("clean", {}) | (settings.get(attack, {}) if attack != "hull" else {})
    how = {"num_examples": n} | {key: given[key] for key in given if key not in OF_THE_RUN}
    return SimpleNamespace(folder=folder, run=s, scores=scores, n=n, log=log, kept=kept, how=how)


def draw_accuracy(ax, runs, attack, over):
    """Clean and robust accuracy of rift over alpha, with adv at 0; or, for every method, robust
    against clean accuracy, a point for each beta."""
    from matplotlib.patheffects import withStroke       # not at the top: matplotlib is optional
    if over == "alpha":
        runs = [x for x in runs if x.run.method in ("adv", "rift")]
        smallest = min(x.run.alpha for x in runs if weight_of(x.run, "alpha") > 0)
        ax.set_xscale("symlog", linthresh=smallest)     # logarithmic, but with a place for 0
        ax.set(xlabel="alpha, weight of L_info (adv has none)", ylabel="accuracy")
    else:
        ax.margins(0.08)
        ax.set(xlabel="clean accuracy", ylabel=f"accuracy under {attack}")
    for name, same, look in curves(runs, over):
        adv = same[0].run.method == "adv"
        values, at = zip(*sorted(by_weight(same, over).items()))
        clean, robust = (np.array([spread([x.scores[key] for x in some], some[0].n) for some in at])
                         for key in ("clean", attack))                          # (V, 3) each
        if over == "alpha":
            for y, label, fill in ((clean, "clean", look["color"]), (robust, attack, "white")):
                ax.errorbar(values, y[:, 0], y[:, 1:].T, mfc=fill, label=f"{name}, {label}", **look)
            continue
        ax.errorbar(clean[:, 0], robust[:, 0], robust[:, 1:].T, clean[:, 1:].T, label=name, **look)
        for beta, x, y in zip(values, clean[:, 0], robust[:, 0]):
            # the curves lie close: labels on either side
            ax.annotate(f"{beta:g}", (x, y), textcoords="offset points", fontsize=8,
                        xytext=(-5, -11) if adv else (5, 5), ha="right" if adv else "left",
                        color=look["color"], path_effects=[withStroke(linewidth=2, foreground="w")])


def draw_forgetting(ax, runs, measure, label):
    """A measure of forgetting over the epochs; rings mark the epochs that were kept."""
    for name, same, look in curves(runs):
        epochs = sorted({line["epoch"] for x in same for line in x.log})
        points = np.array([spread([measure(line) for x in same for line in x.log
                                   if line["epoch"] == epoch]) for epoch in epochs])
        ax.errorbar(epochs, points[:, 0], points[:, 1:].T, label=name, **look)
        kept = [(x.kept["epoch"], measure(x.kept)) for x in same]
        ax.scatter(*zip(*kept), s=70, facecolors="none", linewidths=1.2,
                   edgecolors=look["color"])
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set(xlabel="epoch (rings: the kept ones)", ylabel=label)


FORGETTING = {
    "weights: ||theta_s - theta_t||": lambda line: line["params_l2"],
    "share of T within classes that S predicts": lambda line: line["dev_retained"],
    "debiased CKA of S and T": lambda line: line["dev_cka"],
    "log N - L_info, nats":                             # None for methods without L_info
        lambda line: math.log(line["info_n"]) - line["dev_info"] if "info_n" in line else None,
}


def forgetting_table(runs):
    """Rows of cells: the measures of forgetting at the kept epochs, mean and range over runs."""
    rows = [["method", "runs", *FORGETTING]]
    for name, same in by_settings(runs).items():
        rows.append([name, str(len(same))])
        for measure in FORGETTING.values():
            values = [measure(x.kept) for x in same if measure(x.kept) is not None]
            rows[-1].append(f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"
                            if values else "-")
    return rows


def plot(folders, path, attack, split):
    """Draws rift's accuracy over alpha, and clean against robust accuracy over beta, where the runs
    of a task differ in these; else forgetting over the epochs. Prints a table of forgetting.

    Raises InputError where a run lacks what is drawn, or runs were evaluated differently.
    """
    from matplotlib.figure import Figure                # not at the top: matplotlib is optional
    tasks = {}                                          # {name: [finished run, ..]}
    finished = [read_finished(folder, attack, split) for folder in folders]
    for x in finished:
        others = [Path(y.run.task).name for y in finished
                  if y.run.fingerprints["data"] != x.run.fingerprints["data"]]
        name = Path(x.run.task).name
        if name in others:                              # two data sets share it
            name = f"{x.run.task} ({x.run.fingerprints['data'][:6]})"
        tasks.setdefault(name, []).append(x)
    panels = []                                         # (what draws it, title, runs, arguments)
    for task, runs in tasks.items():
        title, before = f"{task}, {split} texts", len(panels)
        of = {method: [x.run for x in runs if x.run.method == method] for method in rift.METHODS}
        if len({s.alpha for s in of["rift"]}) > 1:
            panels.append((draw_accuracy, title, runs, dict(attack=attack, over="alpha")))
        if any(len({weight_of(s, "beta") for s in of[method]}) > 1 for method in of):
            panels.append((draw_accuracy, title, runs, dict(attack=attack, over="beta")))
        if len(panels) > before:
            for x in runs:
                first = runs[0].how
                here, there = ({key: how[key] for key in how if x.how.get(key) != first.get(key)}
                               for how in (x.how, first))
                if here != there:
                    raise InputError(f"--plot: {x.folder} was evaluated with {here}, but "
                                     f"{runs[0].folder} with {there}; evaluate all runs with one "
                                     "command first")
            continue
        for label, measure in FORGETTING.items():
            having = [x for x in runs if measure(x.kept) is not None]
            more = dict(measure=measure, label=label)
            if having:
                panels.append((draw_forgetting, f"{task}, dev texts", having, more))
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.5 * rows + 0.3), layout="constrained")
    for place, (draw, title, runs, more) in enumerate(panels, 1):
        ax = figure.add_subplot(rows, columns, place)
        draw(ax, runs, **more)
        ax.grid(alpha=0.3)
        ax.set_title(title, size=10, parse_math=False)              # a name may have $ in it
        joined = "numbers: beta, joined in its order" if more.get("over") == "beta" else None
        for text in ax.legend(fontsize=8, title=joined).get_texts():
            text.set_parse_math(False)
    bars = "Bars: range over seeds"
    if any(draw is draw_accuracy for draw, *_ in panels):
        bars += "; for a single run's accuracy, its 95% interval"
    figure.suptitle(bars, size=9)
    with data.replacing(path) as tmp:
        figure.savefig(tmp, format=path.suffix[1:].lower() or "png", dpi=150)
    print(f"{path}: drawn from {', '.join(map(str, folders))}")
    for task, runs in tasks.items():
        show(f"Forgetting, {task}, dev texts at the kept epochs: mean over runs (lowest to "
             "highest)", forgetting_table(runs))


# ---- The command line ----------------------------------------------------------------------------


def parse(argv):
    """The command line of eval.py, as attributes. Exits with 2 and one line for bad flags."""
    p = argparse.ArgumentParser(
        prog="eval.py", description="Attack finished runs and compare them.", allow_abbrev=False,
        usage=argparse.SUPPRESS, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag, positive = p.add_argument, data.number(int, 1)
    flag("runs", nargs="+", type=Path, metavar="RUN", help="folders that train.py wrote")
    flag("--attacks", nargs="+", choices=ATTACKS, default=[], metavar="NAME",
         help=f"any of {', '.join(ATTACKS)}; without any, clean accuracy only")
    flag("--num-examples", type=positive, default=300, metavar="N",
         help="texts to attack; paper: 1000, authors' code: 300")
    flag("--split", choices=("test", "dev"), default="test",
         help="dev to choose settings by, test to report")
    flag("--population", type=data.number(int, 2), metavar="N",
         help="texts in a generation of the genetic attack; None: the attack's own number, 60")
    flag("--generations", type=positive, metavar="N",
         help="generations of the genetic attack; None: the attack's own number, 40")
    flag("--lm-constraint", metavar="SOURCE", help="judges which synonyms the genetic attack may "
         "use: none, scores (the published file; all attacks then use texts that it knows) or a "
         "causal language model's name or folder; by default, with genetic, scores for imdb and "
         "snli, else none")
    flag("--max-queries", type=positive, metavar="N", help="texts that are sent for "
         "one example at most; one that would need more survives; exhaustive needs it")
    flag("--seed", type=data.number(int, 0), default=0, metavar="S",
         help="chooses the texts and drives the attacks")
    flag("--batch-size", type=positive, default=64, metavar="N", help="texts in a forward pass")
    flag("--data-dir", metavar="DIR", help="where archives and tables are; None: as the run had it")
    flag("--task", metavar="FOLDER", help="where the runs' own data folder is now; None: where it "
         "was")
    flag("--neighbors", metavar="TABLE", help="published, vectors, wordnet or a file, as for "
         "train.py; None: the run's own")
    flag("--device", metavar="NAME", help="cpu, cuda:0, ..; None: a GPU if there is one")
    flag("--precision", choices=("auto", "fp32", "bf16"),
         help="number format of the encoder; None: the run's")
    flag("--overwrite", action="store_true",
         help="forget what these attacks found with these settings, and attack anew; what they "
         "found with others stays")
    flag("--show", type=data.number(int, 0), default=2, metavar="N",
         help="adversarial texts printed for each run and attack")
    flag("--csv", type=Path, metavar="FILE", help="write the original and adversarial texts, all N")
    flag("--plot", type=Path, metavar="FILE", help="draw rift's accuracy over alpha or clean "
         "against robust accuracy over beta where runs differ in them, else forgetting; without "
         "--attacks nothing is attacked")
    flag("--plot-attack", choices=ATTACKS, default="hull", metavar="NAME",
         help="the attack under which --plot draws accuracy")
    args = p.parse_args(argv)
    args.attacks, args.runs = list(dict.fromkeys(args.attacks)), list(dict.fromkeys(args.runs))
    return args


def check_first(args):
    """Raises InputError for what is cheap to check, before hours are spent on attacks."""
    if args.csv and not args.attacks:
        raise InputError("--csv writes what --attacks found: which attacks?")
    if "exhaustive" in args.attacks and not args.max_queries:
        raise InputError("--attacks exhaustive tries every combination of swaps, which for a long "
                         "text never ends: wanted --max-queries N, such as 10000")
    if args.plot:
        try:
            from matplotlib.figure import Figure        # not at the top: matplotlib is optional
        except ImportError:
            raise InputError("--plot needs matplotlib: pip install matplotlib") from None
        formats = sorted(Figure().canvas.get_supported_filetypes().keys() - {"pgf"})    # wants TeX
        if (args.plot.suffix[1:].lower() or "png") not in formats:
            raise InputError(f"{args.plot}: wanted one of the formats {', '.join(formats)}")
        if args.attacks and args.plot_attack not in (*args.attacks, "hull"):
            raise InputError(f"--plot-attack {args.plot_attack}: name it among --attacks as well "
                             "(what is finished is not attacked again)")
    for path in filter(None, (args.csv, args.plot)):
        if not path.parent.is_dir() or path.is_dir():
            raise InputError(f"{path}: wanted the name of a file in a folder that is there")
        data.check_writable(path.parent)
    seen, tasks = {}, set()
    for folder in args.runs:
        s, _ = settings_of(folder)
        tasks.add(s.task)
        if s.method not in rift.METHODS:
            raise InputError(f"{folder}: its method {s.method} is not in rift.METHODS: add it "
                             "there")
        twin = seen.setdefault(json.dumps(own_settings(s), sort_keys=True), folder)
        if twin != folder:
            raise InputError(f"{folder}: has the settings and the seed of {twin}; give one of them "
                             "(if the code differs, it is a new method in rift.METHODS)")
    if args.task and tasks <= set(NAMED):
        raise InputError(f"--task {args.task}: says where a data folder of one's own is now, but "
                         f"these runs are on {', '.join(sorted(tasks))}")


@data.command
def main(argv):
    """eval.py's command line."""
    args = parse(argv)
    check_first(args)
    runs = {folder: settings_of(folder)[0] for folder in args.runs}
    precisions = {args.precision or s.precision for s in runs.values()}
    data.warn_of_slow_bf16(precisions, data.pick_device(args.device))
    if args.attacks or not args.plot:
        plans, groups = {}, {}
        try:
            for folder, s in runs.items():              # all plans, before an attack takes hours
                key = s.fingerprints["data"]
                if s.task not in NAMED:
                    # absolute, so that a folder that is named imdb is not the public task
                    s.task = str(Path(args.task or s.task).absolute())
                    if not Path(s.task).is_dir():
                        raise InputError(f"{folder}: its data folder {s.task} is not there; --task "
                                         "FOLDER says where it is now")
                if key not in plans:
                    plans[key], groups[key] = make_plan(s, args), []
            for folder, s in runs.items():
                key = s.fingerprints["data"]
                groups[key].append(evaluate(folder, s, plans[key], args))
        except KeyboardInterrupt:
            again = shlex.join(word for word in argv if word != "--overwrite")
            raise KeyboardInterrupt(
                "finished texts are kept, and this goes on: python eval.py " + again
                + " (but runs that were not attacked yet still need --overwrite)" * args.overwrite
            ) from None
        report(list(groups.values()), args)
    if args.plot:
        plot(args.runs, args.plot, args.plot_attack, args.split)


if __name__ == "__main__":
    main()
