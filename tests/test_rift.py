"""The method, stated as properties (rift.py).

The adversary never leaves the convex hull of a text's substitutions, climbs, and touches no
parameter; padding changes nothing. KL has its two sides the right way round. L_info is log N for a
constant score, compares texts of one class only, and reaches g and h but not the teacher. The
similarity of S and T is 0 for features that have nothing to do with each other. Everything holds
for BERT and RoBERTa, two classes and three.
"""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import rift
from tests.conftest import tiny_encoder
from tests.golden import method_case

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def example(encoder, B=4, L=7, K=3):
    """A random batch: texts of 4 to L tokens, about half of their positions with candidates."""
    g = seeded(1)
    pad = encoder.config.pad_token_id
    ids = torch.randint(2, 60, (B, L), generator=g)
    lengths = torch.randint(4, L + 1, (B,), generator=g)
    lengths[0] = L
    attention_mask = (torch.arange(L) < lengths[:, None]).long()
    ids = ids.masked_fill(attention_mask == 0, pad)
    subs = torch.randint(2, 60, (B, L, K), generator=g)
    subs[..., 0] = ids
    n = torch.randint(1, K + 1, (B, L), generator=g) * attention_mask
    n[:, 0] = 1                                                    # a special token has only itself
    subs_mask = torch.arange(K) < n.clamp_min(1)[..., None]
    subs = subs.masked_fill(~subs_mask, pad)
    return dict(input_ids=ids, attention_mask=attention_mask, subs=subs, subs_mask=subs_mask)


def start(batch):
    return rift.noise(batch["subs"].shape, 300, seeded(2))


def head_for(encoder, C=2):
    torch.manual_seed(3)
    return rift.mlp(encoder.config.hidden_size, 256, C)


def hull_of(encoder, batch):
    return rift.hull(encoder, batch["input_ids"], batch["subs"], batch["subs_mask"])


def S_of(encoder, batch, w=None, pooling="pooler"):
    """The features of the texts or, with w, of the points w of their hulls."""
    e, E, free = hull_of(encoder, batch)
    e = e if w is None else rift.mix(e, E, free, w[free])
    return rift.features(encoder, e, batch["attention_mask"], pooling)


def search(encoder, head, batch, **options):
    """The adversary's w, from the same start each time."""
    return rift.adversary(encoder, head, **batch, v=start(batch), **options)


def forward(model, batch, w=None, T=None):
    return model(**batch, y=torch.tensor([0, 0, 1, 1]), w=w, T=T)


def moved(model):
    """The model with an encoder that is no longer the teacher's."""
    with torch.no_grad():
        for p in model.encoder.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


# ---- F_s -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["hidden", "attention"])
@pytest.mark.parametrize("gradient", [True, False])
def test_dropout_acts_in_training_mode_only(encoder, part, gradient):
    """That of the layers and that of attention, which has one way with a gradient and another."""
    batch = example(encoder)
    for name, module in encoder.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5 * (("attention.self" in name) == (part == "attention"))
    with torch.set_grad_enabled(gradient):
        e = rift.embed(encoder, batch["input_ids"])             # in eval mode: no dropout
        for training in (True, False):
            first, second = (rift.features(encoder.train(training), e, batch["attention_mask"])
                             for _ in range(2))
            assert torch.allclose(first, second, atol=1e-3) == (not training)


@pytest.mark.parametrize("pooling", ["pooler", "mean"])
def test_features_are_the_encoders_own(encoder, pooling):
    """For padded texts too: BERT and RoBERTa count the same positions themselves."""
    batch = example(encoder)
    own = encoder(batch["input_ids"], batch["attention_mask"])
    lengths = batch["attention_mask"].sum(1).tolist()
    means = torch.stack([own.last_hidden_state[b, :n].mean(0) for b, n in enumerate(lengths)])
    right = own.pooler_output if pooling == "pooler" else means
    assert torch.allclose(S_of(encoder, batch, pooling=pooling), right, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")             # it gets another name
def test_what_features_cannot_do_is_refused(encoder):
    batch = example(encoder)
    with pytest.raises(ValueError, match="pooling is 'max'"):
        S_of(encoder, batch, pooling="max")
    pooler, encoder.pooler = encoder.pooler, None
    with pytest.raises(ValueError, match="pooling is 'pooler', but the encoder has none"):
        S_of(encoder, batch)
    S_of(encoder, batch, pooling="mean")
    encoder.pooler = pooler
    encoder.gradient_checkpointing_enable()
    S_of(encoder, batch)                                            # without effect in eval mode
    with pytest.raises(ValueError, match="gradient checkpointing is on: .*disable"):
        S_of(encoder.train(), batch)


def test_bf16_rounds_the_encoder_but_not_the_losses(encoder):
    """With weights in bf16 the losses come out in float32, within 2% of those without. The
    embeddings stay in float32."""
    model, batch, T = rift.RIFT(encoder, 2).eval(), example(encoder), torch.randn(4, 16)
    w = rift.weights(start(batch), batch["subs_mask"])

    def losses(dtype):
        model.dtype = dtype
        return rift.objective(forward(model, batch, w, T), "rift", dict(beta=1, alpha=1))

    exact, rounded = losses(torch.float32), losses(torch.bfloat16)
    for name in ("ce", "info"):
        assert rounded[name].dtype == torch.float32
        assert rounded[name].item() == pytest.approx(exact[name].item(), rel=0.02)
        assert rounded[name].item() != exact[name].item()
    rounded["loss"].backward()                                      # the weights themselves learn
    query = encoder.encoder.layer[0].attention.self.query.weight
    assert query.dtype == query.grad.dtype == torch.float32 and query.grad.abs().sum() > 0
    theta = rift.parameters_in(encoder, torch.bfloat16)
    dtypes = {p.dtype for name, p in theta.items() if name.startswith("embeddings.")}
    assert dtypes == {torch.float32}


# ---- The hull and the adversary in it ------------------------------------------------------------


def test_a_point_of_the_hull_mixes_the_outputs_of_the_embedding_layer(encoder):
    """Position and layer norm included; a corner is a text, and no candidates are no change."""
    batch = example(encoder)
    e, E, free = hull_of(encoder, batch)

    def embeddings(ids):
        return encoder.embeddings(ids, position_ids=rift.position_ids(encoder, 7))

    w = rift.weights(20 * start(batch), batch["subs_mask"])
    mean = sum(w[..., k, None] * embeddings(batch["subs"][..., k]) for k in range(3))
    assert torch.allclose(rift.mix(e, E, free, w[free]), mean, atol=1e-5)
    assert torch.equal(rift.mix(e, E, free, w[free])[~free], e[~free])
    corner = F.one_hot(batch["subs_mask"].sum(-1) - 1, 3).float()   # all weight on the last ones
    text = batch["subs"].gather(-1, corner.argmax(-1, keepdim=True)).squeeze(-1)
    assert not torch.equal(text, batch["input_ids"])
    assert torch.allclose(rift.mix(e, E, free, corner[free]), embeddings(text), atol=1e-5)


def test_the_adversary_climbs_and_never_leaves_the_hull(encoder):
    """Ten steps end at a larger KL than the start. The weights lie on the simplex of the real
    candidates; a masked one gets nothing."""
    batch, head = example(encoder), head_for(encoder)

    def kl(w):
        p, q = (head(S_of(encoder, batch, x)).softmax(-1) for x in (None, w))
        return (p * (p / q).log()).sum()

    w_0 = search(encoder, head, batch, steps=0)
    assert torch.allclose(w_0, rift.weights(start(batch), batch["subs_mask"]))
    w = search(encoder, head, batch, sparsity=0.0)
    assert kl(w) > 1.5 * kl(w_0)
    with torch.no_grad():                                           # it has gradients of its own
        assert torch.equal(w, search(encoder, head, batch, sparsity=0.0))
    assert (w >= 0).all() and torch.allclose(w.sum(-1), torch.ones(w.shape[:2]))
    assert (w[~batch["subs_mask"]] == 0).all()
    assert (w[..., 0][batch["subs_mask"].sum(-1) == 1] == 1).all()


def test_with_a_label_the_adversary_moves_away_from_it(encoder):
    batch, head = example(encoder), head_for(encoder)
    y = torch.tensor([0, 0, 0, 0]), torch.tensor([1, 1, 1, 1])
    w = [search(encoder, head, batch, y=y_c, sparsity=0.0) for y_c in y]
    for c in (0, 1):
        losses = [F.cross_entropy(head(S_of(encoder, batch, w_c)), y[c]) for w_c in w]
        assert losses[c] > losses[1 - c] + 0.02


def test_a_model_applies_its_precision_and_mixout_itself(encoder):
    """In the search and in evaluation only the precision, in training both. Mixout teaches the
    encoder and leaves it as it is."""
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model = moved(rift.RIFT(encoder, 2, dtype=torch.bfloat16, p_mixout=0.7))
    batch, before = example(encoder), dict(encoder.named_parameters())
    w = model.adversary(**batch, v=start(batch), steps=2)
    with rift.stand_in(encoder, rift.parameters_in(encoder, torch.bfloat16)):
        assert torch.equal(w, search(encoder, model.head, batch, steps=2))
    for training in (True, False):
        torch.manual_seed(0)
        outputs = forward(model.train(training), batch, w)
        torch.manual_seed(0)
        theta = rift.mixout(encoder, model.teacher, 0.7) if training else {}
        with rift.stand_in(encoder, theta):
            theta = rift.parameters_in(encoder, torch.bfloat16)
        with rift.stand_in(encoder, theta):
            assert torch.equal(outputs.clean, model.head(S_of(encoder, batch)))
            assert torch.equal(outputs.adversarial, model.head(S_of(encoder, batch, w)))
        encoder.zero_grad()
        rift.ce(outputs).backward()
        assert encoder.encoder.layer[0].output.dense.weight.grad.abs().sum() > 0
    assert all(before[name] is p for name, p in encoder.named_parameters())


def test_sparsity_pushes_towards_single_words(encoder):
    batch, head = example(encoder), head_for(encoder)
    free = batch["subs_mask"].sum(-1) > 1
    none, much = (search(encoder, head, batch, sparsity=s)[free].amax(-1) for s in (0.0, 1e6))
    assert (much > 0.99).all() and none.min() < 0.9


def test_the_search_leaves_the_model_alone(encoder):
    """No parameter gets a gradient, dropout is off, and the mode is what it was."""
    batch, head = example(encoder), head_for(encoder)
    w = search(encoder.train(), head, batch)
    assert not w.requires_grad
    assert all(p.grad is None for m in (encoder, head) for p in m.parameters())
    assert all(m.training for m in encoder.modules())
    assert torch.equal(w, search(encoder.eval(), head, batch)) and not encoder.training


def test_the_gradient_of_the_hull_is_the_same_each_time():
    """On two threads too: what a frequent candidate gets is added up in one order."""
    encoder = tiny_encoder("bert", hidden_size=64).eval()
    batch, threads, gradients = example(encoder, B=256, L=5, K=9), torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for _ in range(6):                      # in any order 5 of 6 would differ from the first
            _, E, _ = hull_of(encoder, batch)
            (E * torch.randn(E.shape, generator=seeded(0))).sum().backward()
            gradients.append(encoder.embeddings.word_embeddings.weight.grad)
            encoder.zero_grad()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_padding_changes_nothing(encoder):
    """Three more positions and two more candidates, all masked: the same adversary."""
    batch, head = example(encoder), head_for(encoder)
    v, w, pad = start(batch), search(encoder, head, batch), encoder.config.pad_token_id
    wide = dict(input_ids=F.pad(batch["input_ids"], (0, 3), value=pad),
                attention_mask=F.pad(batch["attention_mask"], (0, 3)),
                subs=F.pad(batch["subs"], (0, 2, 0, 3), value=pad),
                subs_mask=F.pad(batch["subs_mask"], (0, 2, 0, 3)))
    wide["subs_mask"][:, 7:, 0] = True                              # padding has only itself
    w_wide = rift.adversary(encoder, head, **wide, v=F.pad(v, (0, 2, 0, 3)))
    assert torch.allclose(w, w_wide[:, :7, :3], atol=1e-4)


def test_a_batch_without_candidates_has_no_adversary(encoder):
    batch = example(encoder, K=1)
    w = search(encoder, head_for(encoder), batch)
    assert torch.equal(w, torch.ones(4, 7, 1))
    assert rift.kl(forward(rift.RIFT(encoder, 2).eval(), batch, w)).item() < 1e-6


@pytest.mark.parametrize("max_len", [300, 80])
def test_the_noise_is_a_constant_of_the_task(max_len):
    """Standard deviation sqrt(2 / (longest input * 10)), however short the batch."""
    v = rift.noise((2000, 2, 10), max_len, seeded(0))
    assert v.std().item() == pytest.approx(math.sqrt(2 / (max_len * 10)), rel=0.02)


# ---- The losses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [1.0, 104.0, 1e4])
def test_kl_is_from_clean_to_adversarial_and_teaches_both_sides(gap):
    """sum p log(p/q), p the clean side, the mean over texts, however sure the model is: from a gap
    of 104 between two logits on, exp(-gap) is 0 in float32. KL(q||p) is another number."""
    clean = torch.tensor([[gap, 0.0], [0.4, 0.0]], requires_grad=True)
    adversarial = torch.tensor([[0.0, 0.3], [-1.0, 1.0]], requires_grad=True)
    p, q = (logits.detach().double().log_softmax(-1) for logits in (clean, adversarial))
    right, wrong = ((a.exp() * (a - b)).sum(-1).mean().item() for a, b in ((p, q), (q, p)))
    assert abs(right - wrong) > 0.05
    loss = rift.kl(rift.Outputs(clean, adversarial, None, None, None, None))
    assert loss.item() == pytest.approx(right, abs=1e-5)
    loss.backward()
    for side in (clean, adversarial):
        assert side.grad.isfinite().all() and side.grad[1].abs().sum() > 0
    assert adversarial.grad[0].abs().sum() > 0


def test_info_nce_is_the_equation():
    """For each t_j the sum runs over i, the s_i; the other axis gives another number. It is log N
    for a constant score: nothing tells the right s_i from the others, and the bound is 0."""
    torch.manual_seed(0)
    s, t, tau = torch.randn(5, 8), torch.randn(5, 8), 0.3
    f = F.cosine_similarity(s[:, None], t[None], -1) / tau          # f[i, j]
    right, wrong = (-(f.diag().exp() / f.exp().sum(axis)).log().mean() for axis in (0, 1))
    assert abs(right - wrong) > 1e-3
    assert rift.info_nce(s, t, tau).item() == pytest.approx(right.item(), abs=1e-5)
    assert rift.info_nce(torch.ones(5, 8), t).item() == pytest.approx(math.log(5))


@pytest.mark.parametrize("C", [2, 3])
def test_l_info_compares_texts_of_one_class(C):
    """The mean over classes, each with its own projections; other classes do not compete."""
    torch.manual_seed(5)
    g, h = ([rift.mlp(16, 512, 256) for _ in range(C)] for _ in "gh")
    S, T, y = torch.randn(4 * C, 16), torch.randn(4 * C, 16), torch.arange(C).repeat(4)
    parts = [rift.info_nce(g[c](S[y == c]), h[c](T[y == c])) for c in range(C)]
    assert torch.allclose(rift.L_info(S, T, y, g, h), torch.stack(parts).mean(), atol=1e-5)
    one = y == 0                                                    # a batch of a single class
    assert torch.allclose(rift.L_info(S[one], T[one], y[one], g, h), parts[0], atol=1e-5)
    assert abs(rift.L_info(S, T, y, g, h) - rift.L_info(S, T, y, g[::-1], h[::-1])) > 1e-4
    for labels, own in ((y, h[1:]), (y - 1, h)):                    # a class is not left out
        with pytest.raises(ValueError, match=f"{C} projections g and {len(own)} projections h"):
            rift.L_info(S, T, labels, g, own)


def test_distance_to_the_pretrained_weights():
    """1e-5 at first (the 1e-10 keeps its gradient finite), then the Euclidean distance."""
    model = rift.RIFT(tiny_encoder("bert"), 2)
    distance = rift.pretrained_distance(model.encoder, model.teacher)
    assert distance.item() == pytest.approx(1e-5)
    distance.backward()
    assert all(p.grad.isfinite().all() for p in model.encoder.parameters())
    with torch.no_grad():
        model.encoder.embeddings.word_embeddings.weight[3, 4] += 3
        model.encoder.pooler.dense.bias[0] += 4
    assert rift.pretrained_distance(model.encoder, model.teacher).item() == pytest.approx(5)


def test_mixout_is_unbiased_and_reaches_linear_layers_only(encoder):
    """Each entry comes from theta_s or theta_t, the mean is theta_s, and p = 0 is theta_s."""
    model, p = moved(rift.RIFT(encoder, 2)), 0.7
    theta_s, theta_t = (dict(m.named_parameters()) for m in (model.encoder, model.teacher))
    torch.manual_seed(0)
    name = "encoder.layer.0.attention.self.query.weight"
    draws = torch.stack([rift.mixout(model.encoder, model.teacher, p)[name].detach()
                         for _ in range(200)])
    s, t = theta_s[name].detach(), theta_t[name]
    # the standard deviation of one entry is |theta_s - theta_t| sqrt(p / (1-p))
    error = 4.5 * (s - t).abs() * math.sqrt(p / (1 - p) / 200) + 1e-5
    assert ((draws.mean(0) - s).abs() < error).all()
    kept = torch.isclose(draws, (s - p * t) / (1 - p), atol=1e-5)
    assert (kept | torch.isclose(draws, t, atol=1e-5)).all()
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=0.02)
    mixed = rift.mixout(model.encoder, model.teacher, 0.0)
    assert all(torch.allclose(value, theta_s[key], atol=1e-6) for key, value in mixed.items())
    assert "pooler.dense.bias" in mixed
    assert not any("embeddings" in key or "LayerNorm" in key for key in mixed)
    with pytest.raises(ValueError, match="mixout is 1.0"):
        rift.mixout(model.encoder, model.teacher, 1.0)


# ---- The model and the methods -------------------------------------------------------------------


def test_the_teacher_is_frozen_and_never_drops_out(encoder):
    """A copy of the encoder (RoBERTa's random pooler too), in eval mode, without gradients. All
    else learns, and each class has projections of its own: two layers, weight and bias. The encoder
    does drop out, on clean texts and in the hull."""
    assert not any(m.training for m in rift.RIFT(encoder.train(), 2).teacher.modules())
    model, batch = rift.RIFT(encoder, 2).train(), example(encoder)
    assert len({*model.g.parameters(), *model.h.parameters()}) == 2 * 2 * 4
    assert model.encoder.training and not any(m.training for m in model.teacher.modules())
    assert all(map(torch.equal, model.encoder.parameters(), model.teacher.parameters()))
    outputs = forward(model, batch, search(encoder, model.head, batch), S_of(model.teacher, batch))
    rift.objective(outputs, "rift", dict(beta=10, alpha=0.1))["loss"].backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    for part in (model.encoder, model.head, model.g, model.h):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    for part in ("embeddings.dropout", "encoder.layer.0.output.dropout"):
        for name, module in encoder.named_modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5 * (name == part)
        one, two = (forward(model, batch, search(encoder, model.head, batch)) for _ in range(2))
        assert not torch.allclose(one.clean, two.clean, atol=1e-3)
        assert not torch.allclose(one.S_hat, two.S_hat, atol=1e-3)


@pytest.mark.parametrize("method, right", [
    ("standard", {"ce": 1}), ("adv", {"ce": 1, "kl": 10}), ("adv-mixout", {"ce": 1, "kl": 10}),
    ("adv-ptwd", {"ce": 1, "kl": 10, "ptwd": 0.01}),
    ("rift-marginal", {"ce": 1, "kl": 10, "info": 0.1}),
    ("rift", {"ce": 1, "kl": 10, "info": 0.1})])
def test_a_method_is_the_weighted_sum_of_its_terms_and_computes_no_other(method, right):
    model = moved(rift.RIFT(tiny_encoder("bert"), 2, marginal=method == "rift-marginal")).eval()
    batch, weight = example(model.encoder), dict(beta=10, alpha=0.1, ptwd=0.01, tau=7)
    w = rift.weights(start(batch), batch["subs_mask"]) if rift.has_adversary(method) else None
    assert rift.has_adversary(method) == ("kl" in right)
    terms = rift.objective(forward(model, batch, w, torch.randn(4, 16)), method, weight)
    assert terms.keys() == right.keys() | {"loss"}
    assert torch.allclose(terms["loss"], sum(right[name] * terms[name] for name in right))


def test_the_loss_is_the_weighted_sum_whatever_the_name_of_a_term(monkeypatch):
    def loss(o):
        return torch.tensor(7.0)

    monkeypatch.setitem(rift.METHODS, "own", {loss: 2})
    assert rift.objective(None, "own", {})["loss"] == 14


# ---- How much was forgotten ----------------------------------------------------------------------


def test_debiased_cka_is_0_for_texts_in_another_order():
    """Where the plain estimate is not, and 1 for a copy that is rotated, scaled and shifted."""
    # as encoders make them: a few directions hold most of the variance
    T = torch.randn(300, 384, generator=seeded(0)) / torch.arange(1, 385) ** 0.25
    rotation = torch.linalg.qr(torch.randn(384, 384, generator=seeded(1))).Q
    assert rift.debiased_cka(3 * T @ rotation + 1e4, T) == pytest.approx(1, abs=1e-3)
    orders = [torch.randperm(300, generator=seeded(i)) for i in range(10)]
    X = T - T.mean(0)
    plain = [((X[o].T @ X).norm() ** 2 / (X.T @ X).norm() ** 2).item() for o in orders]
    found = [rift.debiased_cka(T[o], T) for o in orders]
    assert min(plain) > 0.2 and max(map(abs, found)) < 0.05 and abs(np.mean(found)) < 0.02
    assert rift.debiased_cka(T[:1].expand(300, -1), T) == 0         # the same everywhere

    def hsic(X, Y):         # as Song et al. (2012) write it, with the matrices
        K, M = ((Z @ Z.T).fill_diagonal_(0).double() for Z in (X, Y))
        N, one = len(K), torch.ones(len(K), dtype=torch.float64)
        return (torch.trace(K @ M) + (one @ K @ one) * (one @ M @ one) / ((N - 1) * (N - 2))
                - 2 / (N - 2) * (one @ K @ M @ one)) / (N * (N - 3))
    S = T[:40] + torch.randn(40, 384, generator=seeded(2))
    wanted = hsic(S, T[:40]) / (hsic(S, S) * hsic(T[:40], T[:40])).sqrt()
    assert rift.debiased_cka(S, T[:40]) == pytest.approx(wanted.item(), abs=1e-5)
    with pytest.raises(ValueError, match="at least 4 texts, not 3"):
        rift.debiased_cka(T[:3], T[:3])


def retained(S, T, y, n):
    """R^2 on all texts but the first n, from a regression on these."""
    return rift.retained(S[:n], T[:n], y[:n], S[n:], T[n:], y[n:])


def test_retained_is_what_can_be_read_off_linearly_within_classes():
    """1 for a copy, 1/2 for half of the variance, about 0 for the label alone or another order.
    The class means are those of the training texts, for dev texts elsewhere too."""
    y = torch.arange(600) % 3
    T = torch.randn(600, 32, generator=seeded(0)) + 5 * y[:, None]
    mixing = torch.randn(32, 32, generator=seeded(1))
    noise = torch.randn(600, 32, generator=seeded(2))
    assert retained(T @ mixing + 7, T, y, 400) == pytest.approx(1, abs=0.01)
    assert retained(T[:, :16] @ mixing[:16], T, y, 400) == pytest.approx(0.5, abs=0.05)
    for S in (F.one_hot(y, 32) + 0.1 * noise, T[torch.randperm(600, generator=seeded(3))], noise):
        assert -0.1 < retained(S, T, y, 400) < 0.03
    assert rift.retained(T[:400], T[:400], y[:400], T[400:], T[400:] + 5, y[400:]) < 0.1


def test_retained_does_not_believe_a_regression_on_few_texts():
    """With hardly more texts than features, noise fits the training texts, but predicts no other:
    leave-one-out has to choose a ridge that says so. A copy is still read off."""
    y = torch.arange(240) % 2
    T, noise = (torch.randn(240, 32, generator=seeded(i)) for i in (0, 1))
    assert -0.15 < retained(noise, T, y, 40) < 0.1 and retained(2 * T, T, y, 40) > 0.9


# ---- Recorded numbers ----------------------------------------------------------------------------


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the authors' recorded numbers are not there")
@pytest.mark.parametrize("name", ["bert_y2_seed0", "bert_y3_seed1"])
def test_the_authors_numbers(name):
    """Adversary, logits, losses and gradient norms to 1e-3; the discrete text word for word."""
    ours = method_case(GOLDEN / name)
    for key, recorded in np.load(GOLDEN / name / "case.npz", allow_pickle=False).items():
        if key in ("w_adv", "logits_clean", "logits_adv"):
            assert np.abs(np.array(ours[key]) - recorded).max() < 1e-3
        elif key.startswith("loss_") or key == "params_l2":
            assert ours[key] == pytest.approx(float(recorded), rel=1e-3)
        elif key == "adv_ids_ce":
            assert ours[key] == recorded.tolist()
    norms = json.loads((GOLDEN / name / "grad_norms.json").read_text())
    assert ours["grad_norms"] == pytest.approx(norms, rel=1e-3, abs=1e-6)
