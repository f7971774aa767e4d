"""Recompute a recorded case with the project's own code and print the outcome as one JSON object:

    python -m tests.golden PATH

PATH is a case folder (the model, the adversary and the losses: `method_case`) or a json of texts
and a victim that needs no network (the attacks: `attack_cases`). The recorded outputs are never
read.
"""
import json
import sys
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from transformers import AutoConfig, AutoModel

import attacks
import rift

# --------------------------------------------------------------------------------------------------
# A case folder: model.safetensors, config.json, case.npz


def stored_name(name, marginal):
    """The name in the file of a parameter of rift.RIFT.

    "g.0.2.bias" is "project_s.0.2.bias" or, where one pair of projections serves all classes,
    "project_s_all.2.bias".
    """
    part, _, rest = name.partition(".")
    if part not in ("g", "h"):
        return name
    part = {"g": "project_s", "h": "project_t"}[part]
    return f"{part}_all.{rest.partition('.')[2]}" if marginal else f"{part}.{rest}"


def stored_model(path, marginal):
    """rift.RIFT with the weights of a case folder, dropout off."""
    stored = safetensors.torch.load_file(path / "model.safetensors")
    config = AutoConfig.for_model(**json.loads((path / "config.json").read_text(encoding="utf-8")))
    encoder, C = AutoModel.from_config(config), len(stored["head.2.bias"])
    model = rift.RIFT(encoder, C, marginal=marginal).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(stored[stored_name(name, marginal)])
    return model


def method_case(path):
    """The adversary's weights, its text, logits, every loss, and the total's gradient norms."""
    arrays = np.load(path / "case.npz", allow_pickle=False)
    case = {name: torch.from_numpy(array) for name, array in arrays.items()}
    text = {"input_ids": case["input_ids"], "attention_mask": case["attention_mask"]}
    candidates = {"subs": case["subs"], "subs_mask": case["subs_mask"].bool()}
    y, v = case["y"], case["w_init"]
    model, marginal = stored_model(path, False), stored_model(path, True)
    encoder, head = model.encoder, model.head

    w = rift.adversary(encoder, head, **text, **candidates, v=v)                         # (B, L, K)
    w_ce = rift.adversary(encoder, head, **text, **candidates, v=v, y=y)
    S, T = (rift.features(F, rift.embed(F, case["input_ids"]), case["attention_mask"])   # (B, H)
            for F in (encoder, model.teacher))

    o = model(**text, **candidates, y=y, w=w, T=T)
    beta, alpha = (10, 0.1) if len(model.g) == 2 else (5, 0.7)
    terms = rift.objective(o, "rift", {"beta": beta, "alpha": alpha})
    terms["loss"].backward()
    rounded = case["subs"].gather(-1, w_ce.argmax(-1, keepdim=True)).squeeze(-1)         # (B, L)
    out = {"w_adv": w, "adv_ids_ce": rounded,
           "logits_clean": o.clean, "logits_adv": o.adversarial,
           "loss_ce": terms["ce"], "loss_kl": terms["kl"], "loss_mi_given_y_adv": terms["info"],
           "loss_mi_adv": rift.info(marginal(**text, **candidates, y=y, w=w, T=T)),
           "loss_mi_clean": rift.L_info(S, T, torch.zeros_like(y), marginal.g, marginal.h),
           "params_l2": rift.ptwd(o), "loss_total": terms["loss"]}
    norms = {stored_name(name, False): p.grad.norm().item()
             for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.tolist() for name, value in out.items()} | {"grad_norms": norms}


# --------------------------------------------------------------------------------------------------
# A json of attacked texts


class Weights(dict):
    """weight(s) in [-1, 1) of a string: the first 8 hex digits of its sha256, computed once."""

    def __missing__(self, s):
        self[s] = int(sha256(s.encode()).hexdigest()[:8], 16) / 2**32 * 2 - 1
        return self[s]


def hash_victim(scale, bias):
    """A victim, list of N texts -> (N, 2) probabilities: P(y=1) = 1 / (1 + exp(-scale * z)) with
    z = bias + sum_i weight(w_i) + 0.5 sum_i weight(w_i + "_" + w_{i+1})."""
    weight = Weights()

    def victim(texts):
        z = np.empty(len(texts))
        for k, text in enumerate(texts):
            words = text.split(" ")
            pairs = map("_".join, zip(words, words[1:]))
            z[k] = bias + sum(weight[word] for word in words)
            z[k] += 0.5 * sum(weight[pair] for pair in pairs)
        p = 1 / (1 + np.exp(-scale * z))
        return np.stack([1 - p, p], axis=1)

    return victim


def neighbor_table(path):
    """word -> list of synonyms: data/counterfitted_neighbors.json of the folder above the case's
    or of the folder `shared` beside the project. Raises FileNotFoundError if neither is there."""
    name = Path("data") / "counterfitted_neighbors.json"
    places = [Path(path).resolve().parent.parent / name,
              Path(__file__).resolve().parents[2] / "shared" / name]
    for place in places:
        if place.exists():
            return json.loads(place.read_text(encoding="utf-8"))
    raise FileNotFoundError(f"no table of synonyms: looked for {places[0]} and {places[1]}")


def attack_cases(path):
    """{"cases": [{"adv", "success", "queries", "genetic_robust"}, ..]} in the order of the file."""
    recorded = json.loads(Path(path).read_text(encoding="utf-8"))
    synonyms = neighbor_table(path)
    victim = hash_victim(recorded["scale"], recorded["bias"])
    examples = [(i, case["text"], case["y"]) for i, case in enumerate(recorded["cases"])]

    def run(method):
        results = attacks.attack(victim, examples, method, synonyms, progress=False)
        return sorted(results, key=lambda result: result.index)

    genetic = partial(attacks.genetic, population=60, generations=40)
    return {"cases": [{"adv": p.adversarial, "success": p.success, "queries": p.queries,
                       "genetic_robust": g.correct and not g.success}
                      for p, g in zip(run(attacks.pwws), run(genetic))]}


def main(argv):
    if len(argv) != 1:
        raise SystemExit(__doc__)
    path = Path(argv[0])
    print(json.dumps(method_case(path) if path.is_dir() else attack_cases(path)))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        print(f"golden: {error}", file=sys.stderr)
        sys.exit(2)
