"""Written by hand with torch: recurrence."""

from __future__ import annotations

import torch
from torch import nn

from zoo.registry import entry
from zoo.sizes import VOCAB, token_ids


class AttentiveSeq2Seq(nn.Module):
    """A bidirectional LSTM reads; an LSTM cell writes token after token, attending to what was read."""

    def __init__(self, width=32):
        super().__init__()
        self.source = nn.Embedding(VOCAB, width)
        self.target = nn.Embedding(VOCAB, width)
        self.encoder = nn.LSTM(width, width // 2, num_layers=2, batch_first=True, bidirectional=True, dropout=0.1)
        self.cell = nn.LSTMCell(2 * width, width)
        self.query = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(2 * width, VOCAB)

    def forward(self, source, target):
        memory, (hidden, cell) = self.encoder(self.source(source))
        h, c = torch.cat([hidden[-2], hidden[-1]], dim=-1), torch.cat([cell[-2], cell[-1]], dim=-1)
        context, logits = torch.zeros_like(h), []
        for token in self.target(target).unbind(1):
            h, c = self.cell(torch.cat([token, context], dim=-1), (h, c))
            weights = torch.softmax(torch.einsum("bd,btd->bt", self.query(h), memory), dim=-1)
            context = torch.einsum("bt,btd->bd", weights, memory)
            logits.append(self.out(torch.cat([h, context], dim=-1)))
        return torch.stack(logits, dim=1)


@entry("torch")
def lstm_seq2seq():
    return AttentiveSeq2Seq(), (token_ids(), token_ids(6)), {}


class RecurrentTagger(nn.Module):
    """Several GRUs with a residual around each; returns a dictionary with the last state."""

    def __init__(self, width=32):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.layers = nn.ModuleList(nn.GRU(width, width, batch_first=True) for _ in range(3))
        self.head = nn.Linear(width, 5)

    def forward(self, ids, lengths=None):
        x = self.embed(ids)
        for layer in self.layers:
            y, state = layer(x)
            x = x + y
        if lengths is not None:
            x = x.masked_fill((torch.arange(x.shape[1], device=x.device) >= lengths[:, None])[..., None], 0.0)
        return {"tags": self.head(x), "state": state}


@entry("torch")
def gru_tagger():
    return RecurrentTagger(), (token_ids(),), {"lengths": torch.tensor([12, 7])}
