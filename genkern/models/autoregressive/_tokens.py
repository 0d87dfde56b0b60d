"""Sequences of tokens, one after another: what CharLSTM and GPT share."""

import math

import torch
import torch.nn.functional as F

from genkern import random
from genkern.models._base import Output
from genkern.ops import sample_tokens


class Tokens:
    """p(x) = product over t of p(x_t | x_1 .. x_{t-1}); bytes by default. The first token follows a start symbol.

    A model supplies _run(tokens (N, T), state) -> (logits (N, T', vocabulary), state), the logits of the token after each input. Where
    state is None the start symbol is put first and T' = T + 1, else T' = T. A model without it (`starts` False) needs a token to begin
    with, and its probabilities are those of the tokens after the first.
    """

    starts = True

    def forward(self, batch, *, key=None):
        """.loss: -log p per token, the mean over the batch, nats; .parts: nll, the same. batch (N, T): integers, such as bytes.

        key: taken from the shared training loop; the loss draws nothing.
        """
        nll = -self.log_prob(batch).mean() / (batch.shape[1] - (not self.starts))
        return Output(nll, {"nll": nll.detach()})

    def log_prob(self, batch, *, key=None):
        """log p(x), nats per sequence: (N,). With gradients. key: of bounds that draw; this is exact."""
        tokens = self._checked(batch)
        if tokens.shape[1] <= (not self.starts):
            raise ValueError(f"{type(self).__name__}: sequences must hold a token to predict, got shape {tuple(batch.shape)}")
        logits, _ = self._run(tokens[:, :-1], None)
        tokens = tokens if self.starts else tokens[:, 1:]
        return -F.cross_entropy(logits.transpose(1, 2).float(), tokens, reduction="none").sum(1)

    def bits_per_dim(self, batch, *, key=None):
        """-log p / (T ln 2): bits per token, (N,); of bytes, bits per character."""
        nats = -self.log_prob(batch)
        return nats / ((batch.shape[1] - (not self.starts)) * math.log(2))

    @torch.no_grad()
    def step(self, tokens, state=None):
        """(logits (N, vocabulary) of the token after these, new state). tokens (N,) or (N, T); state None: the sequence begins here.

        Equal to the parallel pass up to the rounding of torch's matrix products, which may sum in another order for another shape:
        about 1e-5 of the logits in float32. A state is used up by the step that takes it.
        """
        tokens = self._checked(tokens.unsqueeze(1) if tokens.dim() == 1 else tokens)
        if tokens.shape[1] == 0 and (state is not None or not self.starts):
            raise ValueError(f"{type(self).__name__}: step needs a token, but for the start symbol")
        logits, state = self._run(tokens, state)
        return logits[:, -1], state

    @torch.no_grad()
    def generate(
        self, prompt, max_new_tokens, *, temperature=1.0, top_k=None, top_p=None, min_p=None, order="joint", key=None, generator=None
    ):
        """prompt (N, T), T >= 0, with max_new_tokens more: int64 (N, T + max_new_tokens). The filters are those of ops.sample_tokens.

        key: (2,), or (N, 2) for one per sequence. The uniform of sequence i's t-th new token depends on the key, i and t alone.
        """
        if max_new_tokens < 0:
            raise ValueError(f"{type(self).__name__}: max_new_tokens must be non-negative, got {max_new_tokens}")
        tokens = self._checked(prompt)
        self._check_length(tokens.shape[1] + max_new_tokens)
        if key is None:
            key = random.draw_key(generator, tokens.device)
        result, new, state = [tokens], tokens, None
        for t in range(max_new_tokens):
            logits, state = self.step(new, state)
            new = sample_tokens(
                logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, order=order, key=random.fold_in(key, t)
            ).unsqueeze(1)
            result.append(new)
        return torch.cat(result, 1)

    def sample(
        self,
        n,
        *,
        length=64,
        prompt: str | None = None,
        temperature=1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        order="joint",
        key=None,
        generator=None,
        batch_size=256,
    ):
        """n sequences of `length` tokens from the start symbol on: int64 (n, length), each with a key of its own.

        prompt: a text, of a model of bytes, with which all of them begin; it counts towards their length.
        """
        keys, filters = (
            self.sample_keys(n, key, generator, batch_size),
            {"top_k": top_k, "top_p": top_p, "min_p": min_p, "order": order},
        )
        known = keys.new_tensor(list((prompt or "").encode()), dtype=torch.int64)
        if len(known) > length:
            raise ValueError(f"{type(self).__name__}: the prompt has {len(known)} tokens, more than length = {length}")
        parts = [
            self.generate(known.expand(len(k), -1), length - len(known), temperature=temperature, key=k, **filters)
            for k in keys.split(batch_size)
        ]
        return torch.cat(parts)

    def _check_length(self, length):
        pass

    def _inputs(self, tokens, state):
        """tokens with the start symbol, number `vocabulary`, put first where there is no state."""
        return F.pad(tokens, (1, 0), value=self.config.vocabulary) if state is None and self.starts else tokens

    def _checked(self, tokens):
        name, size = type(self).__name__, self.config.vocabulary
        if not isinstance(tokens, torch.Tensor) or tokens.dtype not in (torch.uint8, torch.int32, torch.int64):
            raise TypeError(
                f"{name}: tokens must be a uint8, int32 or int64 tensor, got {getattr(tokens, 'dtype', type(tokens).__name__)}"
            )
        if tokens.dim() != 2:
            raise ValueError(f"{name}: tokens must be (N, T), got {tuple(tokens.shape)}")
        tokens = tokens.long()
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and ((tokens < 0) | (tokens >= size)).any():
            raise ValueError(f"{name}: tokens must be in 0..{size - 1}, found {int(tokens.min())}..{int(tokens.max())}")
        return tokens


def check_text(name, data):
    if len(data.shape) != 1 or data.levels != 255:
        raise ValueError(f"{name}: needs a text, read as bytes (a file: --data book.txt), got {data.name} of shape {tuple(data.shape)}")
