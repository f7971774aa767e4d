"""Robust Informative Fine-Tuning (RIFT): the method, in the paper's symbols.

Dong, Luu, Lin, Yan, Zhang, "How Should Pre-Trained Language Models Be Fine-Tuned Towards
Adversarial Robustness?", NeurIPS 2021 (arXiv 2112.11668). The hull of word substitutions is
ASCC's: Dong et al., "Towards Robustness Against Natural Language Word Substitutions", ICLR 2021.

    x         a text, y its label, C classes           S = F_s(x)   pooled output, encoder being fine-tuned
    x^        its worst neighbour (adversarial text)   T = F_t(x)   pooled output, frozen pre-trained encoder
    q(y|s)    the task head                            g_c, h_c     projections of S and T for class c

    loss = L_task + alpha * L_info,    L_task = E[ -log q(y|S) + beta * KL( q(.|F_s(x)) || q(.|F_s(x^)) ) ]
    text -> token and candidate ids -> embeddings -> hull -> S -> losses

Shapes: B texts, L tokens, K candidates a token (candidate 0 is the token itself), H hidden units,
P positions of the batch that have more than one candidate.
"""
import copy
import math
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn

# ---- S = F_s(x): the encoder, fed with ids or with embeddings of our own -------------------------


def positions_of(encoder, L):
    """Position ids (1, L) int64 of the L tokens of a text: from 0 in BERT, from padding_idx + 1 in RoBERTa.

    They are passed explicitly because RoBERTa would otherwise count them from the ids, and a row of
    candidates holds padding ids in between.
    """
    first = getattr(encoder.embeddings, "padding_idx", -1) + 1
    return torch.arange(first, first + L, device=encoder.device).unsqueeze(0)


@contextmanager
def embeddings_are(encoder, e):
    """Inside, the encoder's embedding layer returns e (B, L, H) instead of its own output, as the input of the first
    transformer layer. With e None nothing changes."""
    hook = encoder.embeddings.register_forward_hook(lambda module, args, output: e)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def first_token_only(encoder):
    """Inside, the last layer computes its output for the first token alone, (B, 1, H): all that the pooler reads.

    That layer's attention still looks at every token; what follows it, 1/8 of a 6-layer encoder's work, is not done
    for the others.
    """
    last = encoder.encoder.layer[-1].attention.output
    hook = last.register_forward_pre_hook(lambda module, args: tuple(x[:, :1] for x in args))
    try:
        yield
    finally:
        hook.remove()


def features(encoder, input_ids, attention_mask, pooling="pooler", e=None, parameters=None):
    """The pooled output F(x) of a BERT or RoBERTa encoder.

    encoder: a Hugging Face BertModel or RobertaModel; input_ids, attention_mask: (B, L) int64;
    pooling: "pooler" (the encoder's own, on the first token) or "mean" over the text's tokens;
    e: (B, L, H) embeddings to use instead of those of input_ids; parameters: {name: tensor} to use in place
    of the encoder's own (mixout). Returns (B, H) float32. Raises ValueError for another pooling.
    """
    if pooling not in ("pooler", "mean"):
        raise ValueError(f"pooling is {pooling!r}: it has to be 'pooler' or 'mean'")
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask,
              "position_ids": positions_of(encoder, input_ids.shape[1])}
    with embeddings_are(encoder, e), first_token_only(encoder) if pooling == "pooler" else nullcontext():
        output = torch.func.functional_call(encoder, parameters or {}, (), inputs)
    if pooling == "pooler":
        return output.pooler_output.float()                                     # (B, H)
    m = attention_mask.unsqueeze(-1).float()                                    # (B, L, 1)
    return (output.last_hidden_state.float() * m).sum(1) / m.sum(1)             # (B, L, H) -> (B, H)


def float32(x):
    """Everything inside is computed in float32, also where the encoder runs in bfloat16 (autocast): the hull, the
    head, the projections and the losses. x: a tensor, for its device."""
    return torch.autocast(x.device.type, enabled=False)


def head_of(module, x):
    """module(x) for a head or projection, in float32."""
    with float32(x):
        return module(x.float())


@contextmanager
def dropout_off(*modules):
    """Inside, every submodule is in eval mode; afterwards each is back in the mode it was in."""
    before = {m: m.training for module in modules for m in module.modules()}
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for m, mode in before.items():
            m.training = mode


# ---- The convex hull of a text's substitutions (ASCC), and the adversary in it -------------------


def hull(encoder, input_ids, subs, subs_mask):
    """The corners of the hull: embeddings e(c_lk, l), taken after the whole embedding layer (layer norm included).

    input_ids: (B, L) int64; subs: (B, L, K) int64 candidate ids; subs_mask: (B, L, K) bool.
    Returns e (B, L, H) of the text itself, E (P, K, H) of the candidates at the P positions that have more than
    one, and free (B, L) bool, which marks those positions. Elsewhere the hull is the single point e.
    """
    B, L = input_ids.shape
    position_ids = positions_of(encoder, L)                                      # (1, L)
    e = encoder.embeddings(input_ids=input_ids, position_ids=position_ids)      # (B, L, H)
    free = subs_mask.sum(-1) > 1                                                 # (B, L)
    l = torch.arange(L, device=input_ids.device).expand(B, L)[free]             # (P,)
    # Texts share candidates: embed each (token, position) pair of the batch once.
    pairs, inverse = torch.unique(subs[free] * L + l.unsqueeze(-1), return_inverse=True)   # (M,), (P, K)
    rows = encoder.embeddings(input_ids=(pairs // L).unsqueeze(0), position_ids=position_ids[:, pairs % L])
    # F.embedding and not rows[0][inverse]: the gradient of indexing adds up in any order on several threads.
    return e, F.embedding(inverse, rows[0]), free                                # rows: (1, M, H)


def weights(v, subs_mask):
    """w_l = softmax_k(v_l * mask + 500 * (mask - 1)): a point of the simplex over the real candidates.

    v: (.., K) float; subs_mask: (.., K) bool. Returns (.., K), rows sum to 1 (uniform where all is masked).
    """
    m = subs_mask.to(v.dtype)
    return torch.softmax(v * m + 500 * (m - 1), dim=-1)


def mix(e, E, free, w):
    """e^_l = sum_k w_lk * e(c_lk, l): the text's embeddings with every free position at its point of the hull.

    e: (B, L, H); E: (P, K, H); free: (B, L) bool; w: (P, K). Returns (B, L, H).
    """
    with float32(e):
        return e.index_put((free,), torch.einsum("pk,pkh->ph", w, E))


def entropy(w):
    """H(w_l) = - sum_k w_lk log w_lk, in nats. w: (.., K). Returns (..)."""
    return -(w * w.clamp_min(1e-30).log()).sum(-1)           # clamped: masked candidates have w = 0 and no gradient


def noise(like, max_len, generator=None):
    """Where the adversary starts: v ~ N(0, 2 / (max_len * 10)), Kaiming's variance for the shape the paper pads to.

    The standard deviation depends on the task's longest input (300 or 80), not on the batch's, so that padding
    less does not change the method. like: a tensor of the shape wanted, (.., L, K), and its device; drawn on the CPU,
    so that a seed gives the same numbers everywhere. Returns (.., L, K) float32.
    """
    return torch.randn(like.shape, generator=generator).to(like.device) * math.sqrt(2 / (max_len * 10))


def search_hull(objective, predict, e, E, free, subs_mask, v, steps=10, lr=1.0, weight_decay=2e-5, sparsity=15.0):
    """Adam's ascent in the hull.

        max over v of   objective(predict(e^(v))) - sparsity * sum_l H(w_l) / (300 * 128)

    objective: logits (B, C) -> scalar, summed over the batch; predict: embeddings (B, L, H) -> logits (B, C);
    e, E, free: from hull(), constants here; subs_mask: (B, L, K) bool; v: (B, L, K) the start; weight_decay is
    L2 on v. The entropy term pushes w towards a single word; its divisor is a constant, whatever the shape.
    Returns w (B, L, K), a constant. Only v gets a gradient, and only at the P positions where it matters.
    """
    v, mask = v.clone(), subs_mask[free]                                         # mask: (P, K)
    v_free = v[free].requires_grad_()                                            # (P, K)
    adam = torch.optim.Adam([v_free], lr=lr, weight_decay=weight_decay)
    for _ in range(steps if len(v_free) else 0):
        w = weights(v_free, mask)
        gain = objective(predict(mix(e, E, free, w))) - sparsity * entropy(w).sum() / (300 * 128)
        v_free.grad, = torch.autograd.grad(-gain, v_free)                        # no gradient for any parameter
        adam.step()
    v[free] = v_free.detach()
    return weights(v, subs_mask)


def adversary(encoder, head, input_ids, attention_mask, subs, subs_mask, v, y=None, *, pooling="pooler",
              steps=10, lr=1.0, weight_decay=2e-5, sparsity=15.0):
    """The worst point of the hull, for training and for the quick robust accuracy.

    Without y, the self-supervised adversary of training: argmax KL( q(.|F_s(x)) || q(.|F_s(x')) ), which starts
    from the model's own prediction. With y (B,) int64, argmax -log q(y|F_s(x')).
    head: (B, H) -> (B, C) logits; v: (B, L, K) the start, see noise(); the rest as in hull() and search_hull().
    Dropout is off during the search. Returns w (B, L, K) float32, rows on the simplex, no gradient.
    """
    with dropout_off(encoder, head):
        def predict(e):
            return head_of(head, features(encoder, input_ids, attention_mask, pooling, e))

        with torch.no_grad():
            corners = hull(encoder, input_ids, subs, subs_mask)
            clean = predict(corners[0]) if y is None else None                   # (B, C)

        def objective(logits):
            if y is None:
                return kl_divergence(clean, logits) * len(logits)
            return F.cross_entropy(logits, y, reduction="sum")

        return search_hull(objective, predict, *corners, subs_mask, v, steps, lr, weight_decay, sparsity)


def discrete(subs, w):
    """The text at the corner nearest to the mixture: candidate argmax_k w_lk at every position.

    subs: (B, L, K) int64; w: (B, L, K). Returns ids (B, L) int64.
    """
    return subs.gather(-1, w.argmax(-1, keepdim=True)).squeeze(-1)


# ---- The losses ----------------------------------------------------------------------------------


def kl_divergence(clean, adversarial):
    """KL( q(.|F_s(x)) || q(.|F_s(x^)) ), the mean over the batch, in nats; gradients flow through both sides.

    clean, adversarial: logits (B, C). Returns a scalar.
    """
    return F.kl_div(F.log_softmax(adversarial, -1), F.softmax(clean, -1), reduction="batchmean")


def info_nce(s, t, tau=0.2):
    """The contrastive bound on I(S;T) (van den Oord et al. 2018): I(S;T) >= log N - info_nce.

        info_nce = -(1/N) sum_j log( exp f(s_j, t_j) / sum_i exp f(s_i, t_j) ),    f(s, t) = cos(s, t) / tau

    The competitors of t_j are the other s_i. s, t: (N, D) projected features, row j of both from one text. Returns a
    scalar, in nats: log N for a constant score.
    """
    with float32(s):
        f = F.normalize(s, dim=-1) @ F.normalize(t, dim=-1).T / tau              # f[i, j]: (N, N)
    return -F.log_softmax(f, dim=0).diagonal().mean()


def L_info(S, T, y, g, h, tau=0.2):
    """The loss that holds on to what pre-training knew, a bound on I(S;T|Y) >= log N - L_info.

        L_info    = mean over c of -(1/N) sum_j log( exp f_c(s_j, t_j) / sum_i exp f_c(s_i, t_j) )
        f_c(s, t) = cos( g_c(s), h_c(t) ) / tau,   over the N texts of class c in the batch

    S: (B, H) from adversarial texts; T: (B, H) from the clean ones; y: (B,) int64 in 0..C-1; g, h: C projections
    each. A class that the batch lacks adds nothing. The marginal form, a bound on I(S;T), is the same with one
    pair of projections and all y equal to 0. Returns a scalar, in nats.
    """
    return torch.stack([info_nce(head_of(g[c], S[y == c]), head_of(h[c], T[y == c]), tau)
                        for c in range(len(g)) if (y == c).any()]).mean()


def pretrained_distance(encoder, teacher):
    """||theta_s - theta_t||_2 = sqrt(1e-10 + sum (theta_s - theta_t)^2) over the whole encoder. Returns a scalar.

    The regulariser of adv-ptwd, and the measure of how far fine-tuning has moved.
    """
    return torch.sqrt(1e-10 + sum((s - t).square().sum() for s, t in zip(encoder.parameters(), teacher.parameters())))


def mixout(encoder, teacher, p):
    """Mixout (Lee et al. 2020) of the weights and biases of the encoder's linear layers.

        (m * theta_t + (1 - m) * theta_s - p * theta_t) / (1 - p),   m ~ Bernoulli(p) for every single entry

    0 <= p < 1. Returns {name: tensor}, to be passed to features(parameters=..): the encoder itself is untouched,
    gradients reach theta_s.
    Raises ValueError for p outside its range.
    """
    if not 0 <= p < 1:
        raise ValueError(f"mixout is {p}: a probability from 0 up to, but not including, 1")
    linear = {name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
    theta_t = dict(teacher.named_parameters())
    mixed = {}
    for name, theta_s in encoder.named_parameters():
        if name.rpartition(".")[0] in linear:
            m = torch.rand_like(theta_s) < p
            mixed[name] = (torch.where(m, theta_t[name], theta_s) - p * theta_t[name]) / (1 - p)
    return mixed


def linear_cka(S, T):
    """Linear CKA (Kornblith et al. 2019): ||S'T||_F^2 / (||S'S||_F ||T'T||_F), columns centred.

    How similar two representations (N, H) of the same N texts are, from 0 to 1 (1: equal up to rotation and
    scale). Returns a float.
    """
    S, T = (X.double() - X.double().mean(0) for X in (S, T))
    return ((S.T @ T).norm() ** 2 / ((S.T @ S).norm() * (T.T @ T).norm()).clamp_min(1e-30)).item()


# ---- The model -----------------------------------------------------------------------------------


def mlp(d_in, d_hidden, d_out):
    """Linear, ReLU, Linear: the shape of the task head and of the projections."""
    return nn.Sequential(nn.Linear(d_in, d_hidden), nn.ReLU(), nn.Linear(d_hidden, d_out))


class RIFT(nn.Module):
    """The objective model F_s with its head q, the frozen teacher F_t, and the projections g_c, h_c.

    encoder: a Hugging Face BERT or RoBERTa encoder; C: number of classes; pooling: see features();
    marginal: one pair of projections for all classes, for the bound on I(S;T). The teacher is a copy of the
    encoder as it comes: loading twice would give two different poolers where none was pre-trained (RoBERTa).
    """

    def __init__(self, encoder, C, pooling="pooler", marginal=False):
        super().__init__()
        H = encoder.config.hidden_size
        self.pooling, self.marginal = pooling, marginal
        self.encoder = encoder
        self.teacher = copy.deepcopy(encoder).requires_grad_(False)
        self.head = mlp(H, 256, C)
        self.g = nn.ModuleList(mlp(H, 512, 256) for _ in range(1 if marginal else C))
        self.h = nn.ModuleList(mlp(H, 512, 256) for _ in range(1 if marginal else C))

    def train(self, mode=True):
        """Sets the mode of everything but the teacher, which stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, input_ids, attention_mask, y, subs=None, subs_mask=None, w=None, T=None, *, tau=0.2,
                ptwd=False, mixout_p=0.0, gather=lambda x: x):
        """The terms of the loss for one batch, as {"ce": .., "kl": .., "info": .., "ptwd": ..}, scalars.

        input_ids, attention_mask: (B, L) int64; y: (B,) int64; subs, subs_mask, w: (B, L, K), the adversary's
        mixture: with w comes the term "kl"; T: (B, H), the teacher's features: with w and T comes "info". One
        pass on x^ serves both. ptwd: also the distance to the pre-trained weights; mixout_p: probability of mixout;
        gather: collects (b, ..) tensors of all processes into (B, ..), with gradients.
        """
        def F_s(e=None):
            mixed = mixout(self.encoder, self.teacher, mixout_p) if mixout_p and self.training else None
            return features(self.encoder, input_ids, attention_mask, self.pooling, e, mixed)

        clean = head_of(self.head, F_s())                                     # (B, C)
        terms = {"ce": F.cross_entropy(clean, y)}
        if w is not None:
            e, E, free = hull(self.encoder, input_ids, subs, subs_mask)          # again: dropout on, with gradients
            S = F_s(mix(e, E, free, w[free]))                                    # (B, H)
            terms["kl"] = kl_divergence(clean, head_of(self.head, S))
            if T is not None:
                classes = torch.zeros_like(y) if self.marginal else y
                terms["info"] = L_info(gather(S), gather(T), gather(classes), self.g, self.h, tau)
        if ptwd:
            terms["ptwd"] = pretrained_distance(self.encoder, self.teacher)
        return terms
