"""Tiny encoders with random weights, BERT and RoBERTa alike: what holds for them holds for the big ones."""
import pytest
import torch
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

SIZE = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)


def tiny_encoder(kind, **changes):
    """A "bert" or "roberta" of 16 hidden units, 60 tokens and at most 20 positions, weights large enough to matter."""
    torch.manual_seed(0)
    if kind == "bert":
        return BertModel(BertConfig(**SIZE | dict(max_position_embeddings=20, initializer_range=0.5) | changes))
    return RobertaModel(RobertaConfig(**SIZE | dict(max_position_embeddings=22, type_vocab_size=1, pad_token_id=1,
                                                    initializer_range=0.5) | changes))


@pytest.fixture(params=["bert", "roberta"])
def encoder(request):
    """Each test that asks for it runs twice: for BERT and for RoBERTa. Dropout is off."""
    return tiny_encoder(request.param).eval()
