"""Word-substitution attacks: does a text classifier survive a swap of words for synonyms?

An attack is a generator for ONE example and reads like its pseudo-code. It yields the texts (tuples
of words) that it wants scored, gets their class probabilities P (N, C) in the same order, and
returns the words of the adversarial text. It sees probabilities only, so any classifier will do.

- `pwws`: greedy, most salient word first (Ren et al., ACL 2019)
- `genetic`: a population of texts that mutate and mate (Alzantot et al., EMNLP 2018)
- `exhaustive`: every combination of swaps; only this one can show that a text cannot be fooled
- `attack`: runs an attack on many examples; batching, caching and progress are all in here
- `lm_constraint`, `scores_constraint`: drop synonyms that a language model finds odd (Jia et al.)

    victim = classifier.predict_proba  # any callable: list of N texts -> (N, C) probabilities
    for result in attack(victim, [(0, "a great film", 1)], pwws, {"great": ["grand", "big"]}):
        print(result.success, result.adversarial)
"""
import numbers
import sys
import warnings
import zipfile
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import combinations, islice, product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

# ---- The attacks ---------------------------------------------------------------------------------
# words: tuple of n str, the text that may change; y: int, its class; synonyms: n lists of str.
# At least one position has synonyms: `attack` skips texts without any.


def replace(words, i, word):
    """The tuple `words` with position i replaced by `word`."""
    return words[:i] + (word,) + words[i + 1:]


def positions_of(words, synonyms):
    """The positions that have synonyms, a list of int.
    Raises ValueError unless `synonyms` has as many items as there are words, none of them a str."""
    if len(synonyms) != len(words) or any(isinstance(candidates, str) for candidates in synonyms):
        raise ValueError(f"{' '.join(words)[:60]!r} has {len(words)} words, but its synonyms are "
                         f"{str(synonyms)[:60]}: expected {len(words)} lists of words")
    return [i for i, candidates in enumerate(synonyms) if candidates]


def margin(P, y):
    """log P(y) - max over c != y of log P(c), (N,) float64: below 0 the model is fooled.

    P: (N, C) probabilities; y: int. With two classes it orders texts as P(y) does.
    """
    log_P = np.log(np.maximum(P, 1e-300))   # a float32 probability can underflow to 0
    m = log_P[:, y] - np.delete(log_P, y, axis=1).max(axis=1)
    # of a tie, argmax takes the first class: just below 0 if that is not y
    return np.where((m == 0) & (P.argmax(axis=1) != y), np.nextafter(0, -1), m)


def pwws(words, y, synonyms, rng=None, unknown="NULL"):
    """Probability-weighted word saliency (Ren et al. 2019), greedy; `rng` is not used.

        S_i  = softmax over all i of  P(y|x) - P(y|x with word i replaced by `unknown`)
        dP_i = max over the synonyms w of word i of  P(y|x) - P(y|x with word i replaced by w)

    The best synonyms are applied in descending order of S_i dP_i until the prediction is not y.
    """
    P_x = (yield [words])[0, y]
    P = yield (replace(words, i, unknown) for i in range(len(words)))
    S = np.exp(P_x - P[:, y])
    S = S / S.sum()     # (n,), no overflow: the differences are in [-1, 1]

    swaps = [(i, w) for i in positions_of(words, synonyms) for w in synonyms[i]]
    P = yield (replace(words, i, w) for i, w in swaps)
    dP, best = {}, {}
    for (i, w), drop in zip(swaps, P_x - P[:, y]):
        if i not in dP or drop >= dP[i]:    # the last of equals
            dP[i], best[i] = drop, w

    for i in sorted(dP, key=lambda i: -S[i] * dP[i]):   # a stable sort: the first of equals
        words = replace(words, i, best[i])  # also where dP is negative
        P = yield [words]
        if P[0].argmax() != y:
            break
    return words


def genetic(words, y, synonyms, rng, population=60, generations=40):
    """Genetic attack (Alzantot et al. 2018, as in Jia et al. 2019); the fitness is `margin`.

    Each generation keeps its best member (the lowest margin). The others are children: two parents
    drawn with probability proportional to sigmoid(-margin) + 1e-8, each word from either by a fair
    coin, then perturbed. rng: a numpy Generator. Raises ValueError if `population` is below 2.
    """
    if population < 2:  # the one member would be kept for ever
        raise ValueError(f"the genetic attack needs a population of at least 2, not {population}")
    positions = positions_of(words, synonyms)

    def crossover(a, b):
        """A child of two texts: each word from either by a fair coin."""
        coins = rng.random(len(words)) < 0.5
        return tuple(v if coin else w for v, w, coin in zip(a, b, coins.tolist()))

    def perturb(texts):
        """(texts, P): each text with the best of the original word and its synonyms at one random
        position, and the probabilities (len(texts), C). The texts are scored in one yield."""
        at = [positions[k] for k in rng.integers(len(positions), size=len(texts))]
        swaps = [(text, i, w) for text, i in zip(texts, at) for w in (words[i], *synonyms[i])]
        P = yield (replace(*swap) for swap in swaps)
        fitness, best, start = margin(P, y), [], 0
        for i in at:
            end = start + 1 + len(synonyms[i])
            best.append(start + fitness[start:end].argmin())    # the first of equals
            start = end
        return [replace(*swaps[b]) for b in best], P[best]

    members, P = yield from perturb([words] * population)
    for _ in range(generations):
        fitness = margin(P, y)
        elite = fitness.argmin()
        if P[elite].argmax() != y:
            break
        p = 1 / (1 + np.exp(fitness)) + 1e-8    # sigmoid(-margin): for two classes 1 - P(y) + 1e-8
        parents = rng.choice(population, size=(population - 1, 2), p=p / p.sum())
        children = [crossover(members[a], members[b]) for a, b in parents]
        children, P_children = yield from perturb(children)
        members = [members[elite]] + children
        P = np.vstack([P[elite], P_children])
    return members[margin(P, y).argmin()]   # the last generation's children are checked too


def exhaustive(words, y, synonyms, rng=None):
    """Every combination of swaps, those of fewer words first; `rng` is not used.

    So a success changes as few words as any attack can, and a text that survives without being
    stopped by max_queries cannot be fooled at all (unless the victim's answer for a text depends on
    the batch, as in bf16). Word i, with k_i synonyms, makes the number of texts (1 + k_i) times as
    large.
    """
    positions = positions_of(words, synonyms)
    swapped = (text for n in range(1, len(positions) + 1)       # n swaps
               for at in combinations(positions, n)             # at these n positions
               for text in product(*(synonyms[i] if i in at else [w] for i, w in enumerate(words))))
    while texts := list(islice(swapped, 64)):   # all at once would not fit in memory
        try:
            P = yield texts
        except OutOfQueries as limit:
            P = limit.P     # the answers until then
            swapped = iter(())
        fooled = P.argmax(axis=1) != y
        if fooled.any():
            return texts[fooled.argmax()]
    return words


# ---- Many examples at once -----------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What became of one example. A text is what the victim gets: words joined by single spaces, or
    a tuple (premise, hypothesis) of two such strings. All values are plain Python's."""
    index: int
    attack: str
    label: int
    original: str | tuple
    adversarial: str | tuple
    success: bool       # the prediction was the label and no longer is
    prediction: int     # the victim's, on `adversarial`
    words_changed: int  # number of positions
    queries: int        # distinct texts sent to the victim for this example, the original included
    stopped: bool       # it survived, but max_queries ended the search; after exhaustive, the true
                        # robust accuracy lies from (survived - stopped) / N to survived / N
    correct: bool       # the victim was right on `original`; otherwise it was not attacked
    substitutable: int  # number of positions that could change, also where it was not attacked


def attack(victim, examples, method, synonyms, *, seed=0, batch_size=64, in_flight=32,
           max_words=None, max_queries=None, progress=True, name=None):
    """Attack every example; yields a Result as each is finished (not in the order of the examples).

    victim:      callable, list of N texts -> (N, C) class probabilities (list, numpy or torch). It
                 may have these attributes. `key`, text -> bytes or str: what the model really sees,
                 such as its token ids; of an example's texts with the same key only one is sent.
                 `visible`, text -> how many words of the changeable text it sees. `labels`: its
                 classes in order, a list or an array such as scikit-learn's classes_ (of a run
                 they are strings, also "1").
    examples:    iterable, read lazily, of (index, text, y). A text is lower-case words joined by
                 single spaces; of a pair, a tuple (premise, hypothesis), only the second changes. y
                 is one of the victim's labels or, unless these are numbers, the class number. Mind
                 the order of the classes: SNLI is entailment 0, contradiction 1, neutral 2 here,
                 but many published models have neutral 1 and contradiction 2.
    method:      an attack; set its parameters with functools.partial(genetic, population=20)
    synonyms:    mapping word -> list of words, or callable (index, words) -> a list for each word
    in_flight:   how many examples are attacked at once
    max_words:   only the first max_words words of the changeable text may change, or as many as are
                 visible if that is less. The victim still gets the whole text.
    max_queries: how many different texts may be sent for an example, its original included. An
                 attack that wants one more is stopped by OutOfQueries; unless it catches that, the
                 example has survived, unchanged.
    name:        Result.attack, by default the method's own name

    Each example has its own random stream, seeded with (seed, index): if the victim's answer for a
    text does not depend on the batch, the result depends neither on batch_size nor on the other
    examples. Raises ValueError when batch_size, in_flight, max_words or max_queries is less than 1,
    an item of `examples` is not (index, text, y), the victim's key is neither bytes nor a str, its
    output is not a probability per class, of as many classes each time and as it has labels, y is
    not one of them, a text does not get a list of synonyms for each word, or the attack is not a
    generator that yields lists of texts and returns one text of as many words. Warns if no word of
    any text could change.
    """
    limits = batch_size, in_flight, max_words, max_queries
    if any(limit is not None and limit < 1 for limit in limits):
        raise ValueError("batch_size, in_flight, max_words and max_queries have to be at least 1, "
                         f"not {', '.join(map(str, limits))}")
    name = name or (method.func if isinstance(method, partial) else method).__name__
    total = len(examples) if hasattr(examples, "__len__") else None
    examples, running = iter(examples), []
    C = None    # the number of classes, known from the first answer on
    done, robust, substitutable, unseen = 0, 0, 0, 0
    with tqdm(total=total, desc=name, disable=None if progress else True, leave=False) as bar:
        while True:
            for item in islice(examples, in_flight - len(running)):
                index, text, y = checked(item)
                example = Running(text, victim, max_words)
                example.steps = attack_one(example, index, y, victim, method, synonyms, seed, name)
                example.begin(next(example.steps))
                running.append(example)
            if not running:
                break
            C = ask(victim, running, batch_size, max_queries, C)
            unfinished = []
            for example in running:
                try:
                    if example.out_of_queries:
                        example.begin(example.steps.throw(OutOfQueries(example.answers(C))))
                    elif example.complete:
                        example.begin(example.steps.send(example.answers(C)))
                    unfinished.append(example)
                except StopIteration as stop:
                    result = stop.value
                    done += 1
                    robust += result.correct and not result.success
                    substitutable += result.substitutable
                    unseen += not example.words
                    bar.update()
                    bar.set_postfix_str(f"robust {robust / done:.1%}")
                    yield result
            running = unfinished
    if done and not substitutable:
        reason = "is visible to the victim" if unseen == done else "has a synonym"
        warnings.warn(f"{name}: no word of the {done} texts {reason}, nothing was attacked. A text "
                      "is lower-case words joined by single spaces", stacklevel=2)


def checked(item):
    """The example (index, text, y). Raises ValueError where it is something else."""
    try:
        index, text, y = item
        numbered = isinstance(index, numbers.Integral) and index >= 0
    except (TypeError, ValueError):
        numbered = False
    if not numbered:
        raise ValueError(f"{item!r:.80} is no example: expected (index, text, label), with an "
                         "index of at least 0")
    parts = text if isinstance(text, tuple) and len(text) == 2 else [text]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"example {index} has the text {text!r:.80}: expected a string, or a "
                         "tuple of two strings (premise, hypothesis)")
    if any(part != " ".join(part.split()) for part in parts):   # victims count words by split()
        raise ValueError(f"example {index} has the text {text!r:.80}: expected words joined by "
                         "single spaces, as ' '.join(text.split()) gives them")
    return index, text, y


class OutOfQueries(Exception):
    """Raised inside an attack that wants more texts than max_queries. P: (N, C), the probabilities
    of the first N texts that it wanted in this round, those before the limit."""

    def __init__(self, P):
        self.P = P


class Running:
    """An example under attack: the words that may change, and the texts its attack waits for."""

    def __init__(self, text, victim, max_words):
        *self.premise, changeable = [text] if isinstance(text, str) else text   # [] of one text
        words = tuple(changeable.split(" ")) if changeable else ()
        n = len(words) if max_words is None else max_words
        if hasattr(victim, "visible"):
            n = min(n, victim.visible(text))
        self.words, self.rest = words[:n], words[n:]    # `rest` is sent, but never changed
        self.length = len(words) + sum(len(part.split(" ")) for part in self.premise)
        self.memory = {}        # every answer so far: digest of a text -> C probabilities
        self.stopped = False    # True from the first time that it is out of queries, see begin()

    def text(self, words):
        """The text that the victim gets: with `words` in place of self.words."""
        try:
            text = " ".join(words + self.rest)
        except TypeError:
            raise ValueError(f"the attack wants {words!r:.80} scored: expected a tuple of words, "
                             "in a list of such texts") from None
        return (*self.premise, text) if self.premise else text

    def begin(self, wanted):
        """Starts a round: the texts (tuples of words) that the attack wants to see scored."""
        try:
            self.wanted = iter(wanted)
        except TypeError:
            raise ValueError(f"the attack yielded {wanted!r:.80}: expected a list of texts, each a "
                             "tuple of words") from None
        self.asked = []                 # digests of the texts taken from wanted
        self.complete = False           # True when all that it wants is asked
        self.out_of_queries = False     # True if the next new text would exceed max_queries

    def answers(self, C):
        """P (N, C) of the N texts asked in this round."""
        return np.array([self.memory[digest] for digest in self.asked]).reshape(-1, C)


def attack_one(example, index, y, victim, method, synonyms, seed, name):
    """Attacks one example and returns its Result: a generator, like the attack that it runs."""
    words, everything = example.words, example.words + example.rest
    P_x = yield [words]
    y = class_of(y, index, getattr(victim, "labels", None), P_x.shape[1])
    if callable(synonyms):
        candidates = synonyms(index, everything)
    else:
        candidates = [synonyms.get(word, []) for word in everything]
    substitutable = sum(i < len(words) for i in positions_of(everything, candidates))
    correct = bool(P_x[0].argmax() == y)
    adversarial, P = words, P_x
    if correct and substitutable:
        steps = method(words, y, candidates[:len(words)], np.random.default_rng([seed, index]))
        if not isinstance(steps, Generator):
            raise ValueError(f"the attack {name} returned {steps!r:.80}: expected a generator, "
                             "which yields the texts that it wants scored")
        try:
            found = yield from steps
            if not isinstance(found, (tuple, list)) or len(found) != len(words):
                raise ValueError(f"the attack {name} returned {found!r:.80}: expected the words of "
                                 f"a text of {len(words)}")
            P = yield [tuple(found)]    # costs nothing where the attack has asked it already
            adversarial = tuple(found)
        except OutOfQueries:
            pass    # it has survived: adversarial and P stay those of the original
    prediction = int(P[0].argmax())
    success = correct and prediction != y
    return Result(
        index=int(index), attack=name, label=y, original=example.text(words),
        adversarial=example.text(adversarial), success=success, prediction=prediction,
        words_changed=sum(v != w for v, w in zip(words, adversarial)), queries=len(example.memory),
        stopped=example.stopped and not success, correct=correct, substitutable=substitutable)


def class_of(y, index, labels, C):
    """The class number, a plain int, of the label y. Raises ValueError as `attack` says."""
    def plain(x):
        return x.item() if getattr(x, "ndim", None) == 0 else x     # of numpy or torch

    y = plain(y)
    right, numbered = f"an integer from 0 to {C - 1}", True
    if labels is None and isinstance(y, str):
        right += " (an attribute `labels` of the victim gives its classes names)"
    if labels is not None:
        labels = [plain(label) for label in labels]
        if len(labels) != C:
            raise ValueError(f"the victim returns {C} probabilities for a text, but has the labels "
                             f"{labels}: expected {C} of them")
        if isinstance(y, (str, int, float)) and y in labels:
            return labels.index(y)
        # if the labels are numbers, 1 could mean either
        numbered = not any(isinstance(label, (int, float)) for label in labels)
        right = f"{right} or one of {labels}" if numbered else f"one of {labels}"
    if numbered and isinstance(y, int) and not isinstance(y, bool) and 0 <= y < C:
        return int(y)
    raise ValueError(f"example {index} has label {y!r}: expected {right}")


def ask(victim, running, batch_size, max_queries, C):
    """Asks the victim for new texts, up to four batches of each example, and puts the answers into
    the examples' memories. Returns the number of classes; C: that of earlier answers, or None.

    Texts of similar length share a batch (little padding). PWWS wants a text of n words for each of
    n words in one round. To save memory they are made a few at a time, and of each only a 16-byte
    digest and the answer are kept.
    """
    key = getattr(victim, "key", None)
    new = []    # (example, digest, text)
    for example in running:
        enough = len(new) + 4 * batch_size
        for words in example.wanted:
            text = example.text(words)
            seen = key(text) if key else text
            if key and not isinstance(seen, (bytes, str)):  # repr of a long array omits numbers
                raise ValueError(f"the victim's key is {seen!r:.80}: expected bytes or a str")
            seen = seen if isinstance(seen, bytes) else repr(seen).encode()
            digest = blake2b(seen, digest_size=16).digest()
            if digest not in example.memory:
                if len(example.memory) == max_queries:
                    example.out_of_queries = example.stopped = True
                    break
                example.memory[digest] = None   # its place: a text wanted twice is asked once
                new.append((example, digest, text))
            example.asked.append(digest)
            if len(new) == enough:
                break
        else:
            example.complete = True
    new.sort(key=lambda item: item[0].length)
    for start in range(0, len(new), batch_size):
        batch = new[start:start + batch_size]
        P = check_probabilities(victim([text for _, _, text in batch]), len(batch))
        if C not in (None, P.shape[1]):
            raise ValueError(f"the victim returned {P.shape[1]} probabilities for a text, but {C} "
                             "for earlier ones: expected as many each time")
        C = P.shape[1]
        for (example, digest, _), row in zip(batch, P.tolist()):
            example.memory[digest] = row
    return C


def check_probabilities(P, N):
    """A victim's answer to N texts as a float64 array (N, C), from list, numpy or torch. ValueError
    unless C >= 2 and each row is finite, not negative and sums to 1 (within 1e-2, for bfloat16)."""
    def detached(x):
        return x.detach().to("cpu", torch.float64) if isinstance(x, torch.Tensor) else x

    right = f"expected class probabilities of shape ({N}, C), C >= 2, one row per text"
    P = [detached(row) for row in P] if isinstance(P, (list, tuple)) else detached(P)
    try:
        P = np.asarray(P, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"the victim returned a {type(P).__name__} that is no array of numbers; "
                         f"{right}") from None
    if P.ndim != 2 or len(P) != N or P.shape[1] < 2:
        raise ValueError(f"the victim returned an array of shape {P.shape}; {right}")
    good = (P >= 0).all(axis=1) & (abs(P.sum(axis=1) - 1) < 1e-2)   # False for nan and inf too
    if not good.all():
        row = P[good.argmin()].round(4).tolist()[:9]
        raise ValueError(f"the victim returned a row {row}; {right}, in [0, 1] and summing to 1 "
                         "(logits need a softmax)")
    return P


# ---- The language-model constraint ---------------------------------------------------------------
# A candidate stays if, in its window, it is not much less likely than the original word:
# log p(window with it) - log p(window with the original word) >= threshold (Jia et al. 2019).


def lm_constraint(words, synonyms, log_p, threshold=-5.0, radius=6):
    """The synonyms that a language model allows: n lists of str, like `synonyms`.

    words: tuple of n str; log_p: callable, list of N windows (tuples of words, up to `radius` on
    either side) -> (N,) natural-log probabilities, called at most once. Raises ValueError if it
    returns another number of them.
    """
    positions = positions_of(words, synonyms)
    windows = [(*words[max(0, i - radius):i], w, *words[i + 1:i + 1 + radius])
               for i in positions for w in (words[i], *synonyms[i])]
    scores = np.asarray(log_p(windows) if windows else [], dtype=np.float64)
    if scores.shape != (len(windows),):
        raise ValueError(f"log_p returned shape {scores.shape}: expected ({len(windows)},)")
    kept, scores = [[] for _ in words], iter(scores.tolist())
    for i in positions:
        original = next(scores)
        kept[i] = [w for w in synonyms[i] if next(scores) - original >= threshold]
    return kept


def scores_constraint(words, synonyms, scores, threshold=-5.0):
    """The same with published scores of this sentence, {position: {lower-cased word: log p}}.
    A candidate without a score is dropped, and so is -inf against -inf (the difference is nan)."""
    kept = [[] for _ in words]
    for i in positions_of(words, synonyms):
        log_p = {w: scores.get(i, {}).get(w.lower(), np.nan) for w in (words[i], *synonyms[i])}
        kept[i] = [w for w in synonyms[i] if log_p[w] - log_p[words[i]] >= threshold]
    return kept


class CausalLM:
    """log p of windows of words under a Hugging Face causal language model (hub or folder).

    Called with a list of N windows (tuples of words), it returns (N,) float64: the sum of
    log p(token | tokens before) over the window's words joined by spaces, in natural log. BOS (EOS
    where there is none) goes first so that the first word is scored too; without either the first
    token is not scored. A window longer than the model's positions keeps the last tokens that fit.
    Raises OSError where there is no model with safetensors weights, ValueError for a masked one and
    for one without its tokenizer's files.
    """

    def __init__(self, name_or_dir, device="cpu", batch_size=64):
        self.tokenizer = AutoTokenizer.from_pretrained(name_or_dir, trust_remote_code=False)
        if self.tokenizer.mask_token is not None:   # its head would be loaded with random weights
            raise ValueError(f"{name_or_dir}: its tokenizer has a mask token, as those of masked "
                             "language models: expected a causal one")
        if len(self.tokenizer) <= len(self.tokenizer.all_special_ids):      # no text has tokens
            raise ValueError(f"{name_or_dir}: the files of its tokenizer are missing")
        model = AutoModelForCausalLM.from_pretrained(name_or_dir, use_safetensors=True,
                                                     trust_remote_code=False)
        self.model = model.float().to(device).eval()
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, windows):
        bos = self.tokenizer.bos_token_id
        bos = self.tokenizer.eos_token_id if bos is None else bos
        first = [] if bos is None else [bos]
        # GPT-2's n_positions goes by this name too; a model without it has no limit.
        fit = getattr(self.model.config, "max_position_embeddings", sys.maxsize) - len(first)
        ids = []
        for window in windows:
            tokens = self.tokenizer(" ".join(window), add_special_tokens=False)["input_ids"]
            ids.append(torch.tensor(first + tokens[-fit:] or [0]))  # not empty; one token scores 0
        order = sorted(range(len(ids)), key=lambda k: len(ids[k]))
        log_p = np.zeros(len(ids))
        for start in range(0, len(order), self.batch_size):
            rows = order[start:start + self.batch_size]
            x = pad_sequence([ids[k] for k in rows], batch_first=True, padding_value=-100)
            x = x.to(self.model.device)                                         # (B, L)
            logits = self.model(input_ids=x.clamp(min=0), attention_mask=(x >= 0).long()).logits
            logits = logits[:, :-1].transpose(1, 2)                             # (B, V, L-1)
            nll = F.cross_entropy(logits, x[:, 1:], reduction="none", ignore_index=-100)  # (B, L-1)
            log_p[rows] = -nll.sum(dim=1).cpu().double().numpy()
        return log_p


def read_lm_scores(path, sentences=None, task=""):
    """Published scores: {lower-cased sentence: {position: {lower-cased word: log p}}}.

    path: a .txt, or a .zip or folder that holds one; of several, the one with `task` in its name. A
    line `index TAB sentence` opens a sentence; lines `index TAB position TAB word TAB score` follow
    for the original word and its candidates. Only `sentences` (lower-cased), if given, are kept:
    all of IMDB takes gigabytes. Raises ValueError that names file, line and value, OSError or
    zipfile.BadZipFile where the file cannot be read.
    """
    path = Path(path)
    files = [path, *path.rglob("*")]
    if zipfile.is_zipfile(path):
        files = [zipfile.Path(path, name) for name in zipfile.ZipFile(path).namelist()]
    files = [file for file in files if file.name.endswith(".txt") and file.name[0] != "."]
    if len(files) > 1:
        files = [file for file in files if task in file.name]
    if len(files) != 1:
        raise ValueError(f"{path}: holds {len(files)} .txt files with {task!r} in their names, "
                         "wanted one")
    scores = {}
    index, of_sentence, n = None, None, 0   # of the last sentence: index, scores, number of words
    with files[0].open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                fields = line.decode("utf-8").lower().rstrip("\r\n").split("\t")
                if len(fields) == 2:
                    index, sentence = fields
                    of_sentence, n = {}, len(sentence.split(" "))
                    if sentences is None or sentence in sentences:
                        of_sentence = scores.setdefault(sentence, of_sentence)
                    continue
                line_index, position, word, score = fields
                if line_index != index or not 0 <= int(position) < n:
                    raise ValueError
                of_sentence.setdefault(int(position), {})[word] = float(score)
            except ValueError:  # also bytes that are not UTF-8, too few or many fields, no number
                raise ValueError(f"{files[0]}, line {number}: {line[:80]!r} should be 'index TAB "
                                 "sentence', or 'index TAB position TAB word TAB score' for a word "
                                 "of the sentence above it") from None
    return scores
