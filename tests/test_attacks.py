"""What the attacks promise, on random small texts and victims (every case from a fixed seed):

- an attack changes only words that have synonyms, only into a synonym of the original word;
- success means that the victim's own prediction on the returned text is wrong;
- PWWS and the genetic attack follow their pseudo-code, ties included, and ask for nothing more;
- the exhaustive attack finds what brute force finds, and the fewest swaps;
- a result depends on the seed and the example alone; its queries are the texts really sent;
- the language-model constraint keeps exactly the candidates within the threshold.
"""
import itertools
import json
import shutil
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import attacks
import data
from attacks import (CausalLM, Result, attack, exhaustive, genetic, lm_constraint, margin, pwws,
                     read_lm_scores, scores_constraint)
from tests import golden

VOCABULARY = [f"w{k}" for k in range(40)]
small_genetic = partial(genetic, population=8, generations=6)
ATTACKS = pytest.mark.parametrize("method", [pwws, small_genetic], ids=["pwws", "genetic"])


class BagOfWords:
    """A linear model on word counts, softmax over C classes. Remembers every batch."""

    def __init__(self, seed, C=2, scale=0.7):
        weights = np.random.default_rng(seed).normal(scale=scale, size=(len(VOCABULARY) + 1, C))
        self.weight = dict(zip([*VOCABULARY, "NULL"], weights))
        self.zero, self.batches = np.zeros(C), []

    def __call__(self, texts):
        self.batches.append(list(texts))
        joined = [text if isinstance(text, str) else " ".join(text) for text in texts]
        z = np.array([sum((self.weight[w] for w in text.split()), self.zero) for text in joined])
        return np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)

    @property
    def asked(self):
        return [text for batch in self.batches for text in batch]


def label(victim, text):
    """The class that the victim predicts."""
    return int(victim([text])[0].argmax())


def random_table(rng):
    """A synonym table in which about a third of the words have no synonyms."""
    def some(word):
        others = [v for v in VOCABULARY if v != word]
        return [str(v) for v in rng.choice(others, rng.integers(1, 5), replace=False)]
    return {w: some(w) for w in VOCABULARY if rng.random() < 0.65}


def random_case(seed, C=2, N=12, longest=9, premise=()):
    """A victim, N texts with its own predictions as their labels, and a table."""
    rng, victim = np.random.default_rng(seed), BagOfWords(seed, C)
    texts = [" ".join(rng.choice(VOCABULARY, rng.integers(1, longest + 1))) for _ in range(N)]
    texts = [(*premise, text) for text in texts] if premise else texts
    examples = [(i, text, label(victim, text)) for i, text in enumerate(texts)]
    victim.batches.clear()
    return victim, examples, random_table(rng)


def run(victim, examples, method, synonyms, **options):
    results = list(attack(victim, examples, method, synonyms, progress=False, **options))
    return sorted(results, key=lambda result: result.index)


def drive(steps, probabilities):
    """An attack without a scheduler -> (what it returns, [(texts, P) of each yield])."""
    rounds, P = [], None
    try:
        while True:
            texts = list(steps.send(P))
            P = np.array([probabilities(words) for words in texts])
            rounds.append((texts, P))
    except StopIteration as stop:
        return stop.value, rounds


# ---- Every attack --------------------------------------------------------------------------------


@ATTACKS
@pytest.mark.parametrize("premise", [(), (" ".join(VOCABULARY[:9]),)], ids=["text", "pair"])
def test_words_change_only_into_a_synonym_and_success_means_that_the_victim_is_wrong(
        method, premise):
    """Two classes, or three of pairs, whose premises never change. Queries are the texts sent, and
    no text is sent twice."""
    verdicts = set()
    for seed in range(3):
        victim, examples, table = random_case(seed, C=2 + len(premise), premise=premise)
        for i, text, y in examples:
            before = (text[-1] if premise else text).split()
            if not any(w in table for w in before):
                continue
            victim.batches.clear()
            r, = run(victim, [(i, text, y)], method, table, batch_size=3)
            assert r.queries == len(victim.asked) == len(set(victim.asked))
            *same, after = r.adversarial if premise else [r.adversarial]
            assert r.original == text and tuple(same) == premise
            after = after.split()
            assert len(before) == len(after)
            assert all(v == w or w in table.get(v, []) for v, w in zip(before, after))
            assert r.words_changed == sum(v != w for v, w in zip(before, after))
            assert r.substitutable == sum(w in table for w in before)
            assert r.prediction == label(victim, r.adversarial)
            assert r.correct and r.success == (r.prediction != y)
            verdicts.add(r.success)
    assert verdicts == {True, False}


@ATTACKS
def test_a_result_depends_on_the_seed_and_the_example_alone(method):
    victim, examples, table = random_case(3)
    reference = run(victim, examples, method, table, seed=5)
    for batch_size, in_flight in [(1, 1), (7, 3), (1000, 100)]:
        sizes = dict(batch_size=batch_size, in_flight=in_flight)
        assert run(victim, examples, method, table, seed=5, **sizes) == reference
    assert run(victim, examples[::-1], method, table, seed=5) == reference
    by_position = lambda index, words: [table.get(w, []) for w in words]
    assert run(victim, examples, method, by_position, seed=5) == reference
    moved = [(i + 1, text, y) for i, text, y in examples]
    for other in (run(victim, examples, method, table, seed=6),
                  run(victim, moved, method, table, seed=5)):
        same_queries = [r.queries for r in other] == [r.queries for r in reference]
        assert same_queries == (method is pwws)  # PWWS draws nothing


def test_a_misclassified_example_is_not_attacked():
    victim, table = BagOfWords(0), {"w1": ["w2"]}
    y = label(victim, "w1 w3")
    assert run(victim, [(0, "w1 w3", 1 - y)], None, table, name="a") == [
        Result(0, "a", 1 - y, "w1 w3", "w1 w3", False, y, 0, 1, stopped=False, correct=False,
               substitutable=1)]


@pytest.mark.parametrize("text, visible, reason", [
    ("", 9, "is visible to the victim"), ("w2 w2 w2", 9, "has a synonym.*lower-case"),
    (("w3", "W3"), 9, "has a synonym"), (("w3", "w3"), 0, "is visible to the victim")])
def test_nothing_to_substitute_survives_and_is_warned_of_once(text, visible, reason):
    victim = BagOfWords(0)
    victim.weight["W3"], victim.visible = victim.zero, lambda text: visible
    examples = [(i, text, label(victim, text)) for i in range(3)]
    with pytest.warns(UserWarning, match=f"no word of the 3 texts {reason}") as seen:
        results = run(victim, examples, None, {"w3": ["w4"]}, name="a")
    assert len(seen) == 1
    with warnings.catch_warnings(action="error"):       # no texts, and one that can change
        assert run(victim, [], None, {}, name="a") == []
        run(BagOfWords(0), [(0, "w3", 0), (1, "w3", 1), (2, "", 0)], pwws, {"w3": ["w4"]})
    for r in results:
        assert (r.success, r.correct, r.queries, r.adversarial) == (False, True, 1, text)
        assert r.substitutable == 0


# ---- PWWS ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("drops, applied", [
    # the last of equal candidates, the first of equal positions; it never won: the harmful d1 too
    ({"a1": 0.125, "a2": 0.125, "a3": 0, "b1": 0.125, "d1": -0.0625, "d2": -0.125}, "a2 b1 d1"),
    ({"a1": -0.125, "b1": -0.0625}, "b1 a1"),                   # the less harmful one first
    # b goes first once exp(saliency) > 0.1875 / 0.125 = 1.5: for a saliency above 0.405
    ({"a1": 0.1875, "b1": 0.125, "B": 0.25}, "a1 b1"),
    ({"a1": 0.1875, "b1": 0.125, "B": 0.5}, "b1 a1"),
    ({"a1": 0.25, "b1": 0.1875, "c1": 0.125}, "a1 b1")])        # fooled: 0.875 -> 0.625 -> 0.4375
def test_pwws_follows_its_pseudo_code_and_asks_for_nothing_more(drops, applied):
    """P(y) = 0.875 - the drops of the words, in exact binary fractions; B: of a blank instead of b.

    It asks for the original, every blank, every candidate, and each text on its way, until another
    class is predicted: with three classes that is not where P(y) falls below 1/2."""
    words, text = tuple("abcd"), list("abcd")
    synonyms = [[word for word in drops if word[0] == letter] for letter in words]
    rounds = [[words], [words[:i] + ("?",) + words[i + 1:] for i in range(4)],
              [words[:i] + (w,) + words[i + 1:] for i in range(4) for w in synonyms[i]]]
    for word in applied.split():
        text["abcd".index(word[0])] = word
        rounds.append([tuple(text)])

    def probabilities(words):
        p = 0.875 - sum(drops.get(letter.upper() if word == "?" else word, 0)
                        for letter, word in zip("abcd", words))
        return [1 - p, p]

    found, asked = drive(pwws(words, 1, synonyms, unknown="?"), probabilities)
    assert [texts for texts, _ in asked] == rounds and found == tuple(text)

    def of_three(words):                            # y is predicted until P(y) is below 1/3
        other, p = probabilities(words)
        return [other / 2, p, other / 2]

    _, asked = drive(pwws(words, 1, synonyms, unknown="?"), of_three)
    right = [P[0].argmax() == 1 for _, P in asked[3:]]
    assert all(right[:-1]) and (not right[-1] or len(right) == sum(map(bool, synonyms)))


# ---- The genetic attack --------------------------------------------------------------------------


def test_margin_is_the_log_ratio_to_the_best_other_class():
    P = np.array([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.0, 0.0, 1.0]])
    assert np.allclose(margin(P, 0)[:2], [np.log(0.5 / 0.3), np.log(0.2 / 0.5)])
    assert np.allclose(margin(P, 1)[:2], [np.log(0.3 / 0.5), np.log(0.3 / 0.5)])
    assert np.isfinite(margin(P, 0)).all() and margin(P, 2)[2] > 100
    ties = np.array([[0.4, 0.4, 0.2], [0.2, 0.4, 0.4]])
    assert (margin(ties, 1) < 0).tolist() == [True, False]               # as argmax decides
    p = np.linspace(0.01, 0.99, 50)
    assert (np.diff(margin(np.stack([1 - p, p], axis=1), 1)) > 0).all()  # ordered as P(y)


def run_genetic(words, synonyms, probabilities, seed=0, **sizes):
    return drive(genetic(words, 1, synonyms, np.random.default_rng(seed), **sizes), probabilities)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("C", [2, 3])
def test_the_genetic_attack_returns_the_best_text_that_it_ever_saw(C, seed):
    """Every text has a random probability, so a child of good parents is no better than chance:
    only a best member that is kept can be returned, perhaps of the last generation. Class 1 stays
    ahead to the end."""
    def probabilities(words):
        p = 0.6 + 0.3 * np.random.default_rng([ord(letter) for letter in "".join(words)]).random()
        return [1 - p, p] if C == 2 else [0.7 * (1 - p), p, 0.3 * (1 - p)]

    words, synonyms = tuple("abcdef"), [[letter * 2, letter * 3] for letter in "abcdef"]
    found, rounds = run_genetic(words, synonyms, probabilities, seed, population=6, generations=8)
    assert len(rounds) == 1 + 8
    P_found = np.array([probabilities(found)])
    assert margin(P_found, 1)[0] == min(margin(P, 1).min() for _, P in rounds)


def test_the_genetic_attack_stops_when_its_best_member_fools_the_model():
    fooled = lambda words: [0.6, 0.4] if "a1" in words else [0.4, 0.6]
    words, rounds = run_genetic(("a", "b"), [["a1"], []], fooled, population=2, generations=9)
    assert words == ("a1", "b") and len(rounds) == 1
    assert rounds[0][0] == [("a", "b"), ("a1", "b")] * 2  # the original word, then its synonyms
    words, rounds = run_genetic(("a", "b"), [["a1"], ["b1"]], lambda words: [0.4, 0.6])
    assert words == ("a", "b")  # the first of equals
    # by default 60 members, 40 generations
    assert [len(texts) for texts, _ in rounds] == [2 * 60] + 40 * [2 * 59]


def test_parents_are_drawn_by_their_fitness_and_a_fair_coin_picks_each_word():
    class Recorder:
        """A random generator that remembers what it drew, and with which probabilities."""
        def __init__(self):
            self.rng, self.coins = np.random.default_rng(0), []
            self.integers = self.rng.integers

        def choice(self, n, size, p):
            self.p, self.parents = p, self.rng.choice(n, size, p=p)
            return self.parents

        def random(self, size):
            self.coins.append(self.rng.random(size))
            return self.coins[-1]

    def probabilities(words):
        p = 0.95 - sum(0.02 * place for place, word in enumerate(words) if word.isupper())
        return [1 - p, p]

    words, drawn = tuple("abcdefgh"), Recorder()
    synonyms = [[letter.upper()] for letter in words]
    steps = genetic(words, 1, synonyms, drawn, population=30, generations=1)
    _, [(texts, P), (mutants, _)] = drive(steps, probabilities)
    # a member is the better text of two, the first of equals
    better = np.arange(0, 60, 2) + margin(P, 1).reshape(30, 2).argmin(1)
    weight = 1 / (1 + np.exp(margin(P[better], 1))) + 1e-8
    assert np.allclose(drawn.p, weight / weight.sum()) and len(set(np.round(weight, 6))) > 5
    for (a, b), coins, pair in zip(drawn.parents, drawn.coins, zip(mutants[::2], mutants[1::2])):
        parents = texts[better[a]], texts[better[b]]
        child = [v if coin < 0.5 else w for v, w, coin in zip(*parents, coins, strict=True)]
        assert sum(len({*each}) > 1 for each in zip(*pair)) == 1        # where it is perturbed
        assert all(word in each for word, *each in zip(child, *pair))


# ---- The exhaustive attack -----------------------------------------------------------------------


@pytest.mark.parametrize("premise", [(), ("w1 w2",)], ids=["text", "pair"])
def test_exhaustive_finds_what_brute_force_finds_with_the_fewest_swaps(premise):
    """It asks for every text where none fools the victim, and so never survives where PWWS or the
    genetic attack succeeds."""
    seen = set()
    for seed in range(8):
        victim, examples, table = random_case(seed, C=2 + len(premise), longest=6, premise=premise)
        results = run(victim, examples, exhaustive, table)
        assert len(victim.asked) == sum(r.queries for r in results)
        weaker = [run(victim, examples, method, table) for method in (pwws, small_genetic)]
        for (_, text, y), r, *others in zip(examples, results, *weaker):
            words = (text[-1] if premise else text).split()
            texts = list(itertools.product(*({w, *table.get(w, [])} for w in words)))
            P = victim([(*premise, " ".join(new)) if premise else " ".join(new) for new in texts])
            fewest = min((sum(v != w for v, w in zip(words, new))
                          for new, p in zip(texts, P) if p.argmax() != y), default=None)
            assert r.success == (fewest is not None) and not r.stopped
            assert r.words_changed == fewest if r.success else r.queries == len(texts)
            assert r.success or not any(other.success for other in others)
            seen.add(fewest)
    assert seen >= {None, 1, 2}


def test_exhaustive_uses_every_query_that_it_has_and_stops_at_the_limit():
    """One of 3 ** 40 texts fools the victim: the fourth that is asked for."""
    fooling = " ".join(["w0", "x", *VOCABULARY[2:]])    # after the original, and w0 as x and as y
    victim = lambda texts: np.array([[0, 1] if text == fooling else [1, 0] for text in texts])
    example, table = (0, " ".join(VOCABULARY), 0), {w: ["x", "y"] for w in VOCABULARY}
    for n in (1, 3, 4, 5, 1000):
        r, = run(victim, [example], exhaustive, table, max_queries=n)
        assert r.success == (n >= 4) and r.stopped == (n < 4) and r.queries <= n
    r, = run(returns(sure), [example], exhaustive, table, max_queries=3000)
    assert r.queries == 3000 and r.stopped and r.adversarial == r.original


# ---- How much of a text, and how many texts ------------------------------------------------------


@ATTACKS
def test_words_behind_those_that_the_victim_sees_make_no_difference(method):
    """The victim sees 13 words, and behind them are 200 that could be swapped."""
    rng, table = np.random.default_rng(0), {w: ["w0", "w1", "w2"] for w in VOCABULARY[25:]}
    bag, cut = BagOfWords(1, scale=0.3), lambda text: " ".join(text.split()[:13])
    victim = lambda texts: bag(list(map(cut, texts)))
    texts = [" ".join(rng.choice(VOCABULARY[5:], 213)) for _ in range(20)]
    long = [(i, text, label(victim, text)) for i, text in enumerate(texts)]
    expected = run(bag, [(i, cut(text), y) for i, text, y in long], method, table)
    assert {r.success for r in expected} == {True, False}
    by_number = run(victim, long, method, table, max_words=13)
    victim.visible = lambda text: 13
    for results in (by_number, run(victim, long, method, table, max_words=100)):
        assert [r.original for r in results] == texts
        for r, e in zip(results, expected):
            assert vars(r) | {"original": e.original, "adversarial": cut(r.adversarial)} == vars(e)
    fewer = run(victim, long, method, table, max_words=3)  # the smaller of the two counts
    assert all(r.substitutable <= 3 and r.words_changed <= 3 for r in fewer)


@ATTACKS
def test_an_example_that_has_used_up_its_queries_survived_and_was_stopped(method):
    victim, examples, table = random_case(0)
    free, stopped = run(victim, examples, method, table), 0
    for max_queries in (1, 2, 10, 30, 1000):
        limited = run(victim, examples, method, table, max_queries=max_queries)
        for r, f in zip(limited, free):
            assert r.stopped == (f.queries > max_queries) and not f.stopped
            if f.queries <= max_queries:
                assert r == f
            else:
                stopped += 1
                assert r.queries == max_queries and r.adversarial == r.original
                assert not r.success and r.correct and r.prediction == r.label
    assert limited == free and stopped > 20


# ---- The scheduler and its victims ---------------------------------------------------------------


def test_batches_are_full_and_sorted_by_length():
    """And examples are read as they are needed."""
    victim, examples, table = random_case(2)
    run(victim, examples, pwws, table, batch_size=10, in_flight=100)
    sizes = [len(batch) for batch in victim.batches]
    assert sizes[:2] == [10, 2] and max(sizes) == 10  # the 12 originals come first
    lengths = [len(text.split()) for text in victim.asked]
    assert lengths[:12] == sorted(lengths[:12]) and np.mean(sizes) > 7
    rest = iter(examples)
    next(attack(victim, rest, pwws, table, in_flight=4, progress=False))
    assert len(list(rest)) == 12 - 4


def test_texts_that_the_model_sees_as_one_are_asked_once_and_are_equal():
    bag = BagOfWords(1)
    seen = lambda text: " ".join(text.replace("w0", "w1").split()[:2])  # w0 and w1 are the same
    victim = lambda texts: bag([seen(text) for text in texts])
    victim.key = lambda text: seen(text).encode()
    table = {"w2": ["w0", "w1"], "w4": ["w5", "w6"]}
    result, = run(victim, [(0, "w2 w3 w4", label(BagOfWords(1), "w2 w3"))], pwws, table)
    assert result.queries == len(bag.asked) == len(set(bag.asked))
    assert {text for text in bag.asked if "NULL" not in text} == {"w2 w3", "w1 w3"}
    assert result.adversarial.split()[0] == "w1"  # exactly equal, so the last of equals


def returns(output, labels=None, key=None):
    """A victim that answers N texts with output(N)."""
    victim = lambda texts: output(len(texts))
    victim.labels, victim.key = labels, key
    return victim


def sure(N):
    return np.tile([1.0, 0.0], (N, 1))


def ends_with(found, wanted=()):
    """An attack that asks for the wanted texts and returns what was found."""
    def own(words, y, synonyms, rng):
        yield wanted
        return found
    return own


CAN_CHANGE = dict(synonyms={"w1": ["w2"]})


@pytest.mark.parametrize("change, message", [
    (dict(victim=returns(lambda N: np.ones((N, 1)))), r"shape \(1, 1\); expected .* \(1, C\)"),
    (dict(victim=returns(lambda N: sure(N + 1))), r"shape \(2, 2\); expected"),
    (dict(victim=returns(lambda N: None)), "shape"),
    *[(dict(victim=returns(lambda N, row=row: [row] * N)), "logits need a softmax")
      for row in ([np.nan, 1], [1.5, -0.5], [1.02, 0])],
    (dict(victim=returns(lambda N: [[[1.0, 0.0], [1.0]]])), "no array of numbers"),
    *[(dict(examples=[(7, "w1 w2", y)]), "example 7 has label .*: expected an integer from 0 to 1")
      for y in (2, -1, torch.tensor(True), 1.0, "1")],
    (dict(victim=returns(sure, ["neg", "pos"]), examples=[(7, "w1 w2", "good")]),
     r"label 'good': expected .* or one of \['neg', 'pos'\]"),
    (dict(victim=returns(sure, ["a", "b", "c"])), "returns 2 probabilities .* 'c'.*expected 2"),
    *[(dict(victim=returns(sure, np.array(labels)), examples=[(7, "w1 w2", 0)]),
       r"label 0: expected one of \[1.*, 2.*\]") for labels in ([1, 2], [1.0, 2.0])],
    (CAN_CHANGE | dict(victim=returns(lambda N, C=itertools.count(2): np.eye(next(C))[[0] * N])),
     "returned 3 probabilities .* but 2 for earlier"),
    *[(dict(synonyms=lambda index, words, wrong=wrong: wrong),
       "'w1 w2' has 2 words.*expected 2 lists") for wrong in ([["a"]], ["a", ["a"]])],
    *[({limit: 0}, f"{limit}.* at least 1, not ")
      for limit in ("batch_size", "in_flight", "max_words", "max_queries")],
    (CAN_CHANGE | dict(method=partial(genetic, population=1)), "at least 2, not 1"),
    *[(dict(examples=[item]), "is no example") for item in ("w1 w2", ("w1 w2", 0), (-1, "w1", 0))],
    *[(dict(examples=[(7, text, 0)]), "example 7 has the text .*: expected a string, or a tuple")
      for text in (None, b"w1", ["w1", "w2"], ("w1", None), ("w1", "w2", "w3"))],
    *[(dict(examples=[(7, text, 0)]), "example 7 has the text .*: expected words joined by single")
      for text in ("w1  w2", " w1", "w1\tw2", ("w1", "w2 "))],
    *[(dict(victim=returns(sure, key=lambda text, key=key: key)), "key is .*expected bytes or a s")
      for key in (None, np.arange(2000), ("w1", "w2"))],
    *[(CAN_CHANGE | dict(method=ends_with(found)), "own returned .*: expected the words of a text "
       "of 2") for found in (("w1",), "w2", None)],
    (CAN_CHANGE | dict(method=lambda words, y, synonyms, rng: words),
     r"<lambda> returned \('w1', 'w2'\): expected a generator"),
    (CAN_CHANGE | dict(method=ends_with(("w2", "w2"), ["w2 w2"])), "wants 'w2.*tuple of words"),
    (CAN_CHANGE | dict(method=ends_with(("w2", "w2"), None)), "yielded None: expected a list of"),
])
def test_what_cannot_be_attacked_is_refused(change, message):
    good = dict(victim=returns(sure), examples=[(7, "w1 w2", 0)], method=pwws, synonyms={})
    with pytest.raises(ValueError, match=message):
        run(**good | change)


with_gradients = partial(torch.tensor, requires_grad=True)
NAMES = np.array(["neg", "pos"])


@pytest.mark.parametrize("kind, labels, form", [
    (int, ["neg", "pos"], np.ndarray.tolist), (np.uint8, NAMES, np.ndarray.tolist),
    (NAMES.tolist().__getitem__, NAMES, np.array), (NAMES.__getitem__, ("neg", "pos"), list),
    ([1, 2].__getitem__, np.array([1, 2]), list),
    ([0.5, 1.0].__getitem__, np.array([0.5, 1.0]), list), (np.bool_, np.array([False, True]), list),
    (torch.tensor, None, with_gradients), (torch.tensor, None, lambda P: list(with_gradients(P)))])
def test_labels_and_probabilities_may_be_of_any_kind_and_results_are_plain(kind, labels, form):
    """Labels may be names too, or a scikit-learn classifier's classes_."""
    bag, examples, table = random_case(4)
    expected = run(bag, examples, pwws, table)
    victim = lambda texts: form(bag(texts))
    victim.labels = labels
    results = run(victim, [(np.int64(i), text, kind(y)) for i, text, y in examples], pwws, table)
    assert results == expected
    assert json.loads(json.dumps([vars(r) for r in results])) == [vars(r) for r in expected]
    assert {type(value) for r in results for value in vars(r).values()} == {int, bool, str}
    rounded = torch.tensor(bag(VOCABULARY), dtype=torch.bfloat16)  # rows sum to 1 within 1e-2
    assert np.array_equal(attacks.check_probabilities(rounded, 40), rounded.double())


# ---- The language-model constraint ---------------------------------------------------------------


def test_the_constraint_keeps_the_candidates_within_the_threshold():
    log_p_of = {"a": -10.0, "x": -15.0, "y": -15.1, "z": 0.0, "b": -3.0, "v": -np.inf}
    calls = []

    def log_p(windows):
        calls.append(windows)
        return [sum(log_p_of[w] for w in window) for window in windows]

    synonyms = [["x", "y", "z"], [], ["v", "z", "b"]]
    assert lm_constraint(("a", "b", "b"), synonyms, log_p) == [["x", "z"], [], ["z", "b"]]
    assert len(calls) == 1 and len(calls[0]) == 8
    assert lm_constraint(("a", "b", "b"), synonyms, log_p, threshold=1) == [["z"], [], ["z"]]
    with pytest.raises(ValueError, match=r"shape \(7,\): expected \(8,\)"):
        lm_constraint(("a", "b", "b"), synonyms, lambda windows: log_p(windows)[:-1])


def test_a_window_has_radius_words_on_either_side():
    windows = []
    lm_constraint(tuple("abcdefg"), [["X"], [], [], ["X", "Y"], [], [], ["X"]], radius=2,
                  log_p=lambda texts: windows.extend(map("".join, texts)) or [0.0] * len(texts))
    assert windows == ["abc", "Xbc", "bcdef", "bcXef", "bcYef", "efg", "efX"]


SCORES = ("0\tA Good film .\n0\t1\tgood\t-10\n0\t1\tGreat\t-14.5\n0\t1\tfine\t-15.5\n"
          "0\t1\tnice\t-inf\n1\tbad\n1\t0\tbad\t-inf\n1\t0\tawful\t-inf\n")


def test_published_scores_constrain_like_a_model(tmp_path):
    file = tmp_path / "scores.txt"
    file.write_text(SCORES)
    scores = read_lm_scores(file)
    of_good = scores["a good film ."]
    assert of_good == {1: {"good": -10, "great": -14.5, "fine": -15.5, "nice": -np.inf}}
    words = "a good film .".split()
    synonyms = [["the"], ["fine", "great", "nice", "unheard"], [], []]
    assert scores_constraint(words, synonyms, of_good) == [[], ["great"], [], []]
    assert scores_constraint(words, synonyms, of_good, -6)[1] == ["fine", "great"]
    assert scores_constraint(words, synonyms, of_good, -5.5)[1] == ["fine", "great"]
    assert scores_constraint(["bad"], [["awful"]], scores["bad"]) == [[]]  # -inf against -inf
    assert read_lm_scores(file, sentences={"bad"}).keys() == {"bad"}


def test_the_score_file_may_be_in_a_zip_or_a_folder(tmp_path):
    for member in ("imdb.txt", "in/snli.txt", "README"):
        data.write_atomically(tmp_path / "scores" / member, SCORES)
    packed = shutil.make_archive(tmp_path / "packed", "zip", tmp_path / "scores")
    for path in (tmp_path / "scores", packed):
        assert read_lm_scores(path, task="imdb").keys() == {"a good film .", "bad"}
        with pytest.raises(ValueError, match="holds 2 .txt files .*wanted one"):
            read_lm_scores(path)


@pytest.mark.parametrize("line", [b"0\t1\tgood", b"0\t1\tgood\tmany", b"0\t-1\tgood\t-1",
                                  b"0\t4\tgood\t-1", b"3\t1\tgood\t-1", b"0\t1\tgo\xff\t-1"])
def test_a_line_of_the_wrong_shape_is_named(tmp_path, line):
    file = tmp_path / "scores.txt"
    for n, before in [(1, b""), (3, b"0\ta good film .\n0\t1\tgood\t-10\n")]:  # 1: no sentence yet
        file.write_bytes(before + line + b"\n")
        with pytest.raises(ValueError, match=f"scores.txt, line {n}: .*'index TAB sentence'"):
            read_lm_scores(file)


def save_gpt2(folder, n_positions, **special):
    """A tiny GPT-2 with a token for each word, in the folder; its tokens' log-probabilities."""
    torch.manual_seed(0)
    vocabulary = {w: i for i, w in enumerate([*VOCABULARY, "[UNK]", "<s>"])}    # 0 is a word
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(       # its own special tokens
        single="<s> $A <s>", special_tokens=[("<s>", vocabulary["<s>"])])
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=len(vocabulary), n_embd=16, n_layer=2, n_head=2, n_positions=n_positions,
        initializer_range=0.5, bos_token_id=41, eos_token_id=41)).eval()
    model.save_pretrained(folder)

    @torch.no_grad()
    def log_p(ids):  # one token after the other, nothing padded
        P = [model(torch.tensor([ids[:t]])).logits[0, -1].softmax(-1) for t in range(1, len(ids))]
        return sum(P_t[token].log().item() for P_t, token in zip(P, ids[1:]))
    return log_p


@pytest.mark.parametrize("special", [{"bos_token": "<s>"}, {"eos_token": "<s>"}, {}],
                         ids=["bos", "eos", "none"])
def test_a_causal_model_sums_the_log_probabilities_of_the_tokens_that_fit(tmp_path, special):
    one_by_one = save_gpt2(tmp_path, 10, **special)
    rng, first = np.random.default_rng(0), [41] * bool(special)
    windows = [tuple(rng.choice(VOCABULARY, n)) for n in [3, 9, 1, 10, 11, 13, 40]] + [()]
    windows.append(("w0", "w5", "w0", "w7"))
    tokens = [[VOCABULARY.index(w) for w in window] for window in windows]
    expected = [one_by_one(first + ids[-(10 - len(first)):]) for ids in tokens]
    assert len(set(expected)) > 5
    log_p = CausalLM(tmp_path, batch_size=4)                    # batches of 4, 4 and 1
    assert log_p.model.dtype == torch.float32
    assert np.allclose(log_p(windows), expected, atol=1e-4)


def test_a_masked_model_is_no_causal_model(model_folder):
    """BERT and RoBERTa would load, with a head of random weights."""
    with pytest.raises(ValueError, match="masked language model"):
        CausalLM(model_folder)


def test_a_causal_model_without_its_tokenizer_is_refused(tmp_path):
    """It would find every window equally likely."""
    save_gpt2(tmp_path, 10)
    for path in tmp_path.glob("token*"):
        path.unlink()
    with pytest.raises(ValueError, match="the files of its tokenizer are missing"):
        CausalLM(tmp_path)


# ---- The authors' own code -----------------------------------------------------------------------

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "pwws_a.json"


@pytest.mark.skipif(not GOLDEN.exists(), reason="the recorded cases are not here")
def test_the_attacks_return_what_the_authors_code_returns(capsys):
    """And `python -m tests.golden` prints them, as one JSON object."""
    golden.main([str(GOLDEN)])
    printed = json.loads(capsys.readouterr().out)["cases"]
    for case, ours in zip(json.loads(GOLDEN.read_text())["cases"], printed, strict=True):
        for key in ("adv", "success", "genetic_robust"):
            assert ours[key] == case[key]
        assert ours["queries"] <= case["queries"]
