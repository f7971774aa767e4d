"""Word-substitution attacks: how often does a text classifier survive a swap of words for synonyms?

An attack is a generator for ONE example and reads like its pseudo-code. It yields the texts (tuples of
words) that it wants scored, receives their class probabilities P (N, C) in the same order, and returns the
words of the adversarial text. It sees probabilities only, so any classifier can be attacked.

- `pwws`: greedy, most salient word first (Ren et al., ACL 2019)
- `genetic`: a population of texts that mutate and mate (Alzantot et al., EMNLP 2018)
- `lm_constraint`, `scores_constraint`: drop the synonyms that a language model finds odd (Jia et al., 2019)
- `attack`: drives many such generators at once; batching, caching and progress live here and only here

    victim = classifier.predict_proba            # any callable: list of N texts -> (N, C) probabilities
    for result in attack(victim, [(0, "a great film", 1)], pwws, {"great": ["grand", "big"]}):
        print(result.success, result.adversarial)
"""
import zipfile
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

# ---- The attacks ---------------------------------------------------------------------------------
# words: tuple of n str, the text that may change; y: int, its label; synonyms: n lists of str.


def replace(words, i, word):
    """The tuple `words` with position i replaced by `word`."""
    return words[:i] + (word,) + words[i + 1:]


def margin(P, y):
    """margin = log P(y) - max over c != y of log P(c): below 0 the model is fooled. For two classes it orders
    texts as P(y) does.   P (N, C) probabilities, y int -> (N,) float64"""
    log_P = np.log(np.maximum(P, 1e-300))  # a float32 probability can underflow to 0
    return log_P[:, y] - np.delete(log_P, y, axis=1).max(axis=1)


def pwws(words, y, synonyms, rng=None, unknown="NULL"):
    """Probability-weighted word saliency (Ren et al. 2019), greedy and deterministic (`rng` is not used).

        S_i  = softmax over all positions of  P(y|x) - P(y|x with word i replaced by `unknown`)
        dP_i = max over the synonyms w of word i of  P(y|x) - P(y|x with word i replaced by w)

    and the best synonyms are applied in descending order of S_i * dP_i until the prediction is not y.
    It asks for x, n saliency texts, every candidate, and one text per applied substitution.
    """
    positions = [i for i, candidates in enumerate(synonyms) if candidates]
    if not positions:
        return words
    n = len(words)
    blanked = [replace(words, i, unknown) for i in range(n)]
    tries = [replace(words, i, w) for i in positions for w in synonyms[i]]
    P = yield [words] + blanked + tries
    P_x, P_blanked, P_tries = P[0, y], P[1:n + 1, y], P[n + 1:, y]

    S = np.exp(P_x - P_blanked)
    S = S / S.sum()  # (n,) no overflow: the differences are in [-1, 1]
    steps, start = [], 0
    for i in positions:
        drops = P_x - P_tries[start:start + len(synonyms[i])]
        best = np.flatnonzero(drops == drops.max())[-1]  # the last of equals
        steps.append((S[i] * drops[best], i, synonyms[i][best]))
        start += len(synonyms[i])

    for _, i, word in sorted(steps, key=lambda step: -step[0]):  # a stable sort: the first of equals
        words = replace(words, i, word)  # also where the drop is negative
        P = yield [words]
        if P[0].argmax() != y:
            break
    return words


def genetic(words, y, synonyms, rng, population=60, generations=40):
    """Genetic attack (Alzantot et al. 2018, as in Jia et al. 2019); the fitness is `margin`, lower is better.

    Each generation keeps its best member; the others are children: two parents drawn with probability
    proportional to sigmoid(-margin) + 1e-8, each word from either by a fair coin, then perturbed. `rng` is a
    numpy Generator. Raises ValueError if `population` is below 2 (nothing could ever change).
    """
    if population < 2:
        raise ValueError(f"the genetic attack needs a population of at least 2, not {population}")
    positions = [i for i, candidates in enumerate(synonyms) if candidates]
    if not positions:
        return words

    def perturb(texts):
        """At one random position of each text, the best of the original word and its synonyms.
        One yield for all texts -> (the perturbed texts, their probabilities (len(texts), C))"""
        at = [positions[k] for k in rng.integers(len(positions), size=len(texts))]
        tries = [[replace(text, i, w) for w in (words[i], *synonyms[i])] for text, i in zip(texts, at)]
        flat = [text for group in tries for text in group]
        P = yield flat
        fitness, best, start = margin(P, y), [], 0
        for group in tries:
            best.append(start + fitness[start:start + len(group)].argmin())  # the first of equals
            start += len(group)
        return [flat[b] for b in best], P[best]

    members, P = yield from perturb([words] * population)
    for _ in range(generations):
        fitness = margin(P, y)
        elite = fitness.argmin()
        if P[elite].argmax() != y:
            break
        p = 1 / (1 + np.exp(fitness)) + 1e-8  # sigmoid(-margin): for two classes 1 - P(y) + 1e-8
        parents = rng.choice(population, size=(population - 1, 2), p=p / p.sum())  # with replacement
        coins = rng.random((population - 1, len(words))) < 0.5
        children = [tuple(v if coin else w for v, w, coin in zip(members[a], members[b], coin_row))
                    for (a, b), coin_row in zip(parents, coins.tolist())]
        children, P_children = yield from perturb(children)
        members = [members[elite]] + children
        P = np.vstack([P[elite], P_children])
    return members[margin(P, y).argmin()]  # after the last generation: its children are checked too


# ---- The scheduler -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What became of one example. A text is what the victim sees: words joined by single spaces, or a tuple
    (premise, hypothesis) of two such strings."""
    index: int
    attack: str
    label: int
    original: str | tuple
    adversarial: str | tuple
    success: bool             # the prediction was the label and is not any more
    prediction: int           # the victim's, on `adversarial`
    words_changed: int        # number of positions
    queries: int              # distinct texts sent to the victim for this example, the original included
    correct: bool             # the victim was right on `original`; otherwise it was not attacked


@dataclass
class Running:
    """An example under attack."""
    premise: list  # [premise] of a pair, [] of a single text
    memory: dict   # every answer so far: key of a text -> (C,) probabilities
    steps: object  # the generator
    wanted: list   # the texts (tuples of words) that it waits for


def join(premise, words):
    """The text as the victim sees it."""
    return (*premise, " ".join(words)) if premise else " ".join(words)


def attack(victim, examples, method, synonyms, *, seed=0, batch_size=64, in_flight=32, progress=True, name=None):
    """Attack every example; yields a Result as each is finished (not in the order of the examples).

    victim:    callable, list of N texts -> (N, C) class probabilities (list, numpy or torch). With an attribute
               `key` (callable: text -> hashable, what the model really sees, such as the bytes of its token
               ids) two texts of the same key are one: asked once, exactly equal.
    examples:  iterable, read lazily, of (index, text, y); of a pair (premise, hypothesis) only the second changes
    method:    an attack; bind its hyper-parameters with functools.partial(genetic, population=20)
    synonyms:  mapping word -> list of words, or callable (index, words) -> a list of words for each position
    in_flight: how many examples are attacked at once; memory grows with it, not with the number of examples
    name:      Result.attack, by default the method's own name

    Each example draws from its own random stream, seeded with (seed, index): a result depends neither on the
    batch size nor on the examples beside it. Raises ValueError when the victim's output is not a probability
    per class, a label is not one of its classes, or `synonyms` does not give a list for each position.
    """
    if batch_size < 1 or in_flight < 1:
        raise ValueError(f"batch_size and in_flight must be at least 1, not {batch_size} and {in_flight}")
    name = name or (method.func if isinstance(method, partial) else method).__name__
    total = len(examples) if hasattr(examples, "__len__") else None
    examples, running, done, robust = iter(examples), [], 0, 0
    with tqdm(total=total, desc=name, disable=not progress, leave=False) as bar:
        while True:
            for index, text, y in islice(examples, in_flight - len(running)):
                *premise, changeable = [text] if isinstance(text, str) else text
                words, memory = tuple(changeable.split(" ")) if changeable else (), {}
                steps = attack_one(index, premise, words, y, method, synonyms, seed, name, memory)
                running.append(Running(premise, memory, steps, wanted=next(steps)))
            if not running:
                return
            unfinished = []
            for task, P in zip(running, ask(victim, running, batch_size)):
                try:
                    task.wanted = task.steps.send(P)
                    unfinished.append(task)
                except StopIteration as stop:
                    done, robust = done + 1, robust + (stop.value.correct and not stop.value.success)
                    bar.update()
                    bar.set_postfix_str(f"robust {robust / done:.1%}")
                    yield stop.value
            running = unfinished


def attack_one(index, premise, words, y, method, synonyms, seed, name, memory):
    """One example from its original text to its Result: a generator like the attack that it runs. Raises ValueError
    for a label or synonyms that do not fit, as `attack` says."""
    P, adversarial = (yield [words]), words
    if not 0 <= y < P.shape[1]:
        raise ValueError(f"example {index} has label {y}; the victim has classes 0 to {P.shape[1] - 1}")
    correct = bool(P[0].argmax() == y)
    if correct:
        candidates = synonyms(index, words) if callable(synonyms) else [synonyms.get(w, []) for w in words]
        if len(candidates) != len(words):
            raise ValueError(f"example {index} has {len(words)} words, but its synonyms are for {len(candidates)} "
                             f"positions: give one list, perhaps empty, for each word")
        rng = np.random.default_rng([seed, index])
        adversarial = tuple((yield from method(words, y, candidates, rng)))
        P = yield [adversarial]  # costs nothing where the attack has asked it already
    prediction = int(P[0].argmax())
    return Result(index, name, int(y), join(premise, words), join(premise, adversarial), correct and prediction != y,
                  prediction, sum(v != w for v, w in zip(words, adversarial)), len(memory), correct)


def ask(victim, tasks, batch_size):
    """Answer the wanted texts of all tasks: what is not in a task's memory goes to the victim, sorted by
    length (little padding), in batches of at most batch_size. -> a list of P (texts wanted, C), one per task"""
    key = getattr(victim, "key", lambda text: text)
    keys, unanswered = [], []
    for task in tasks:
        texts = [join(task.premise, words) for words in task.wanted]
        keys.append([key(text) for text in texts])
        for k, text in zip(keys[-1], texts):
            if k not in task.memory:
                task.memory[k] = None  # its place: a text wanted twice in one round is asked once
                unanswered.append((task, k, text))
    unanswered.sort(key=lambda item: "".join(item[2]).count(" "))  # number of words; "".join for pairs
    for start in range(0, len(unanswered), batch_size):
        batch = unanswered[start:start + batch_size]
        P = check_probabilities(victim([text for _, _, text in batch]), len(batch))
        for (task, k, _), row in zip(batch, P):
            task.memory[k] = row
    return [np.array([task.memory[k] for k in task_keys]) for task, task_keys in zip(tasks, keys)]


def check_probabilities(P, N):
    """A victim's answer to N texts (list, numpy or torch) as a float64 array (N, C). Raises ValueError unless
    C >= 2 and every row is finite, not negative and sums to 1 within 1e-2 (bfloat16 sums no better)."""
    right = f"expected class probabilities of shape ({N}, C), C >= 2, one row per text"
    if isinstance(P, torch.Tensor):
        P = P.detach().to("cpu", torch.float64)
    try:
        P = np.asarray(P, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"the victim returned a {type(P).__name__} that is no array of numbers; {right}") from None
    if P.ndim != 2 or len(P) != N or P.shape[1] < 2:
        raise ValueError(f"the victim returned an array of shape {P.shape}; {right}")
    bad = np.flatnonzero(~((P >= 0).all(axis=1) & (abs(P.sum(axis=1) - 1) < 1e-2)))  # catches nan and inf too
    if len(bad):
        raise ValueError(f"the victim returned a row {P[bad[0]].round(4).tolist()[:9]}; {right}, in [0, 1] and "
                         "summing to 1 (logits need a softmax)")
    return P


# ---- The language-model constraint ---------------------------------------------------------------
# A candidate stays if, in its window, it is not much less likely than the original word:
# log p(window with it) - log p(window with the original word) >= threshold (Jia et al. 2019).


def lm_windows(words, i, candidates, radius=6):
    """The window of `radius` words on either side of position i: with the original word, then with each
    candidate. -> 1 + len(candidates) tuples of words"""
    left, right = words[max(0, i - radius):i], words[i + 1:i + 1 + radius]
    return [(*left, w, *right) for w in (words[i], *candidates)]


def lm_constraint(words, synonyms, log_p, threshold=-5.0, radius=6):
    """Keep the synonyms that a language model allows.   synonyms: a list of words per position; log_p: callable,
    list of N windows (tuples of words) -> (N,) natural-log probabilities, called once. -> lists like `synonyms`"""
    windows = [window for i, candidates in enumerate(synonyms) if candidates
               for window in lm_windows(words, i, candidates, radius)]
    scores = iter(np.asarray(log_p(windows) if windows else [], dtype=np.float64))
    kept = []
    for candidates in synonyms:
        original = next(scores) if candidates else None
        kept.append([w for w in candidates if next(scores) - original >= threshold])
    return kept


def scores_constraint(words, synonyms, scores, threshold=-5.0):
    """The same with published scores of this sentence, {position: {lower-cased word: log p}}. A word without
    scores keeps no candidate; nor does -inf against -inf, whose difference is nan."""
    def log_p(i, word):
        return scores.get(i, {}).get(word.lower(), np.nan)  # nan >= threshold is False

    return [[w for w in candidates if log_p(i, w) - log_p(i, word) >= threshold]
            for i, (word, candidates) in enumerate(zip(words, synonyms))]


class CausalLM:
    """log p of windows of words under a Hugging Face causal language model, from the hub or a folder.

    Called with a list of N windows (tuples of words), it returns (N,) float64: the sum of log p(token | tokens
    before) over the window's words joined by spaces, in natural log. BOS (EOS where there is none) goes first so
    that the first word is scored too; a tokenizer without either leaves its first token unscored.
    Raises OSError where the folder or name holds no model with safetensors weights, ValueError for a masked one.
    """

    def __init__(self, name_or_dir, device="cpu", batch_size=64):
        self.tokenizer = AutoTokenizer.from_pretrained(name_or_dir, trust_remote_code=False)
        if self.tokenizer.mask_token is not None:  # would be loaded with a head of random weights
            raise ValueError(f"{name_or_dir}: is a masked language model, wanted a causal one such as GPT-2")
        model = AutoModelForCausalLM.from_pretrained(name_or_dir, use_safetensors=True, trust_remote_code=False)
        self.model, self.device, self.batch_size = model.float().to(device).eval(), device, batch_size

    @torch.no_grad()
    def __call__(self, windows):
        bos = self.tokenizer.bos_token_id
        bos = self.tokenizer.eos_token_id if bos is None else bos
        first = [] if bos is None else [bos]
        ids = [first + self.tokenizer(" ".join(window), add_special_tokens=False)["input_ids"]
               for window in windows]
        order = sorted(range(len(ids)), key=lambda k: len(ids[k]))
        log_p = np.zeros(len(ids))
        for start in range(0, len(order), self.batch_size):
            batch = order[start:start + self.batch_size]
            L = max(2, max(len(ids[k]) for k in batch))  # at least one prediction, even if it is padding
            x = torch.tensor([ids[k] + [0] * (L - len(ids[k])) for k in batch], device=self.device)  # (B, L)
            lengths = torch.tensor([len(ids[k]) for k in batch], device=self.device)
            mask = torch.arange(L, device=self.device) < lengths[:, None]  # (B, L), True on tokens
            logits = self.model(input_ids=x, attention_mask=mask.long()).logits  # (B, L, V)
            nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), x[:, 1:], reduction="none")  # (B, L-1)
            log_p[batch] = -nll.masked_fill(~mask[:, 1:], 0).sum(dim=1).double().cpu().numpy()
        return log_p


def read_lm_scores(path, sentences=None, task=""):
    """The published score file -> {lower-cased sentence: {position: {lower-cased word: log p}}}, for
    `scores_constraint`.   path: a .txt, or a .zip or folder that holds one; of several, the one named after `task`.

    A line `index TAB sentence` opens a sentence; lines `index TAB position TAB word TAB score` follow, for the
    original word and its candidates. `sentences` (lower-cased), if given, are the only ones kept: the whole file
    of IMDB takes gigabytes. Raises ValueError with file, line, value and what would be right.
    """
    path, archive = Path(path), zipfile.ZipFile(path) if zipfile.is_zipfile(path) else None
    files = archive.namelist() if archive else map(str, path.rglob("*") if path.is_dir() else [path])
    files = [file for file in files if file.endswith(".txt") and not Path(file).name.startswith(".")]
    if len(files) > 1:
        files = [file for file in files if task in Path(file).name]
    if len(files) != 1:
        raise ValueError(f"{path}: holds {len(files)} .txt files {task and f'of {task} '}where one is right")
    where = f"{path}: {files[0]}" if archive else files[0]
    scores, index, at, n = {}, None, None, 0  # of the last sentence: index, its scores, number of words
    with archive.open(files[0]) if archive else open(files[0], "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                fields = line.decode("utf-8").lower().rstrip("\r\n").split("\t")
                if len(fields) == 2:
                    index, sentence = fields
                    at, n = {}, len(sentence.split(" "))
                    if sentences is None or sentence in sentences:
                        at = scores.setdefault(sentence, at)
                    continue
                line_index, position, word, score = fields
                if line_index != index or not 0 <= int(position) < n:
                    raise ValueError
                at.setdefault(int(position), {})[word] = float(score)
            except ValueError:  # also wrong utf-8, a wrong number of fields, no number
                raise ValueError(f"{where}, line {number}: {line[:80]!r} should be 'index TAB sentence', or 'index "
                                 "TAB position TAB word TAB score' for a word of the sentence above it") from None
    return scores
