"""Sapling's architecture in PyTorch: a Llama with the parameter names of Meta's checkpoints.

For pretraining only; whoever uses the model loads it with MLX. Knows nothing of data or files.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Params:
    """The model's shape, under the names of Meta's params.json."""

    dim: int = 256
    n_layers: int = 7
    n_heads: int = 8
    n_kv_heads: int = 4
    hidden_dim: int = 768
    vocab_size: int = 4096
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_seq_len: int = 512


class Attention(nn.Module):
    """Causal self-attention with grouped key-value heads; scores in float32."""

    def __init__(self, params: Params):
        super().__init__()
        self.heads, self.kv_heads = params.n_heads, params.n_kv_heads
        self.head_dim = params.dim // params.n_heads
        self.wq = nn.Linear(params.dim, self.heads * self.head_dim, bias=False)
        self.wk = nn.Linear(params.dim, self.kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(params.dim, self.kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(self.heads * self.head_dim, params.dim, bias=False)

    def forward(self, x, cos, sin, mask):
        """Mixes tokens: (batch, tokens, dims) to the same shape."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.wq, self.wk, self.wv)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        shared = self.heads // self.kv_heads
        k, v = k.repeat_interleave(shared, dim=2), v.repeat_interleave(shared, dim=2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        # Written out, since it compiles to half the time of scaled_dot_product_attention here.
        scores = (q @ k.transpose(-1, -2)).float() * self.head_dim**-0.5 + mask
        return self.wo((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def rotate(x, cos, sin):
    """Rotary embedding of (batch, tokens, heads, head_dim) in Meta's way: pairs are neighbours."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class FeedForward(nn.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, params: Params):
        super().__init__()
        self.w1 = nn.Linear(params.dim, params.hidden_dim, bias=False)
        self.w2 = nn.Linear(params.hidden_dim, params.dim, bias=False)
        self.w3 = nn.Linear(params.dim, params.hidden_dim, bias=False)

    def forward(self, x):
        """Each token on its own: (batch, tokens, dims) to the same shape."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream."""

    def __init__(self, params: Params):
        super().__init__()
        self.attention = Attention(params)
        self.feed_forward = FeedForward(params)
        self.attention_norm = nn.RMSNorm(params.dim, eps=params.norm_eps)
        self.ffn_norm = nn.RMSNorm(params.dim, eps=params.norm_eps)

    def forward(self, x, cos, sin, mask):
        """One layer: (batch, tokens, dims) to the same shape."""
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """A Llama whose parameters have the names of Meta's checkpoints."""

    def __init__(self, params: Params):
        super().__init__()
        self.params = params
        self.tok_embeddings = nn.Embedding(params.vocab_size, params.dim)
        self.layers = nn.ModuleList(Block(params) for _ in range(params.n_layers))
        self.norm = nn.RMSNorm(params.dim, eps=params.norm_eps)
        self.output = nn.Linear(params.dim, params.vocab_size, bias=False)
        half = params.dim // params.n_heads // 2
        frequencies = params.rope_theta ** (-torch.arange(half) / half)
        angles = torch.outer(torch.arange(params.max_seq_len), frequencies)[:, None]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        full = torch.full((params.max_seq_len, params.max_seq_len), float("-inf"))
        self.register_buffer("mask", full.triu(1), persistent=False)
        self._initialise()

    def _initialise(self):
        """Normal weights; wo and w2 start at zero, so that every block starts as the identity."""
        for name, parameter in self.named_parameters():
            if name.endswith(("wo.weight", "w2.weight")):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                nn.init.normal_(
                    parameter, std=0.02 if "output" in name else parameter.shape[1] ** -0.5
                )

    def forward(self, tokens):
        """Logits (batch, tokens, vocab) of token ids (batch, tokens)."""
        length = tokens.shape[1]
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, self.cos[:length], self.sin[:length], self.mask[:length, :length])
        return self.output(self.norm(x))
