"""GPT: a decoder-only transformer over bytes (Radford et al., 2019): pre-norm blocks of causal attention and a GELU network."""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from genkern.models._base import Model, Training
from genkern.models.autoregressive._tokens import Tokens, check_text


@dataclass
class GPTConfig:
    vocabulary: int = 256
    context: int = 256  # the greatest length of a sequence
    width: int = 128
    layers: int = 4
    heads: int = 4
    dropout: float = 0.0
    activation: str = "gelu"  # "gelu_tanh": its approximation, as in GPT-2
    start: bool = True  # sequences follow a start symbol; False: as in GPT-2, the first token is given


class GPT(Tokens, Model):
    """GPT(GPTConfig()): sequences (N, T) of at most `context` tokens, figures in nats.

    Learned positions, the embedding tied to the output, residual projections initialised smaller by sqrt(2 layers). Steps keep keys
    and values of every layer, so that a token costs one pass over the weights; they are written in place into the state.

    from_gpt2(folder) and from_nanogpt(file) read the checkpoints of transformers' GPT2LMHeadModel and of nanoGPT.
    """

    Config = GPTConfig
    defaults = Training(epochs=9, batch_size=16, learning_rate=3e-3, weight_decay=0.1, warmup=50, schedule="cosine", clip_grad_norm=1.0)

    @classmethod
    def config_for(cls, data, **settings):
        check_text(cls.__name__, data)
        return cls.Config(**{"context": data.shape[0], **settings})

    def __init__(self, config):
        super().__init__(config)
        c = config
        if c.activation not in ("gelu", "gelu_tanh"):
            raise ValueError(f"GPT: activation must be 'gelu' or 'gelu_tanh', got {c.activation!r}")
        self.starts = c.start
        if c.width % c.heads:
            raise ValueError(f"GPT: width must be a multiple of heads, got {c.width} and {c.heads}")
        self.embedding = nn.Embedding(c.vocabulary + c.start, c.width)  # the last one is the start symbol
        self.position = nn.Parameter(torch.empty(c.context, c.width))
        self.blocks = nn.ModuleList(_Block(c) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.width)
        nn.init.normal_(self.position, std=0.02)
        for name, weight in self.named_parameters():
            if name.endswith("weight") and weight.dim() == 2:
                residual = name.endswith(("attention_out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * c.layers) ** 0.5 if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def optimizer(self, parameters, training):
        """AdamW whose averages forget sooner than torch's defaults: short runs gain by it."""
        return torch.optim.AdamW(parameters, training.learning_rate, betas=(0.9, 0.95), weight_decay=training.weight_decay)

    def _run(self, tokens, state):
        """state: (tokens seen, keys and values (layers, 2, N, heads, context, width / heads)); caches only where gradients are off."""
        tokens = self._inputs(tokens, state)
        n, length = tokens.shape
        c = self.config
        seen, cache = state or (0, None)
        self._check_length(seen + length)
        if cache is None and not torch.is_grad_enabled():
            cache = self.position.new_empty(c.layers, 2, n, c.heads, c.context, c.width // c.heads)
        x = self.embedding(tokens) + self.position[seen : seen + length]
        x = F.dropout(x, c.dropout, self.training)
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[i], seen)
        return F.linear(self.norm(x), self.embedding.weight[: c.vocabulary]), (seen + length, cache)

    def _check_length(self, length):
        if length > self.config.context:
            raise ValueError(f"GPT: sequences must hold at most context = {self.config.context} tokens, got {length}")

    # ---- checkpoints of others

    @classmethod
    def from_gpt2(cls, folder):
        """The model of a local folder of transformers' GPT2LMHeadModel (config.json and model.safetensors), in evaluation mode."""
        folder = Path(folder)
        try:
            found = json.loads((folder / "config.json").read_text())
            facts = {
                "vocabulary": found["vocab_size"], "context": found["n_positions"], "width": found["n_embd"],
                "layers": found["n_layer"], "heads": found["n_head"],
            }  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"GPT: {folder / 'config.json'} is no config of a GPT-2: {error}") from error
        activations = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
        known = {
            "activation_function": (None, *activations), "layer_norm_epsilon": (None, 1e-5), "n_inner": (None, 4 * facts["width"]),
            "scale_attn_weights": (None, True), "scale_attn_by_inverse_layer_idx": (None, False), "add_cross_attention": (None, False),
        }  # fmt: skip
        for name, values in known.items():
            if found.get(name) not in values:
                raise ValueError(f"GPT: {folder / 'config.json'} has {name} {found[name]!r}, which this GPT does not know")
        activation = activations[found.get("activation_function") or "gelu_new"]
        try:
            weights = safetensors.torch.load_file(folder / "model.safetensors")
        except safetensors.SafetensorError as error:
            raise ValueError(f"GPT: {folder / 'model.safetensors'} cannot be read: {error}") from error
        turned = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # stored (in, out)
        return cls._of_gpt2({name: x.t() if name.endswith(turned) else x for name, x in weights.items()}, activation, facts)

    @classmethod
    def from_nanogpt(cls, file, activation="gelu"):
        """The model of a local checkpoint of nanoGPT (ckpt.pt), in evaluation mode. Nothing in the file is executed."""
        try:
            stored = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError, RuntimeError):  # torch's words advise to load what may execute code
            raise ValueError(f"GPT: {file} is no checkpoint of nanoGPT: it is damaged or holds more than tensors") from None
        try:
            weights = {name.removeprefix("_orig_mod."): x for name, x in stored["model"].items()}
            found = stored["model_args"]
            facts = {
                "vocabulary": found["vocab_size"], "context": found["block_size"], "width": found["n_embd"],
                "layers": found["n_layer"], "heads": found["n_head"],
            }  # fmt: skip
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"GPT: {file} is no checkpoint of nanoGPT: {error}") from error
        return cls._of_gpt2(weights, activation, facts)

    @classmethod
    def _of_gpt2(cls, weights, activation, facts):
        """Weights under GPT-2's names, as torch.nn.Linear has them; biases that are missing are zero."""
        names = {
            "wte.weight": "embedding.weight", "wpe.weight": "position", "ln_1": "attention_norm",
            "attn.c_attn": "qkv", "attn.c_proj": "attention_out", "ln_2": "norm", "mlp.c_fc": "up", "mlp.c_proj": "down",
        }  # fmt: skip
        model = cls(GPTConfig(**facts, activation=activation, start=False))
        state = {name: torch.zeros_like(x) for name, x in model.state_dict().items() if name.endswith("bias")}
        head = weights.get("lm_head.weight")
        for name, x in weights.items():
            name = name.removeprefix("transformer.")
            if name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias")):  # tied; masks
                continue
            if name in names:
                state[names[name]] = x
            elif name.startswith("ln_f."):
                state["norm." + name[5:]] = x
            else:
                _, layer, rest = (*name.split(".", 2), "", "")[:3]
                module, _, kind = rest.rpartition(".")
                state[f"blocks.{layer}.{names.get(module, module)}.{kind}"] = x
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"GPT: the checkpoint cannot be used: {' '.join(str(error).split())}") from error
        if head is not None and not torch.equal(head, state["embedding.weight"]):
            raise ValueError("GPT: the checkpoint's output weights differ from its embedding; this GPT ties them")
        return model.eval()


class _Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.dropout = c.heads, c.dropout
        self.attention_norm, self.norm = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.qkv = nn.Linear(c.width, 3 * c.width)
        self.attention_out = nn.Linear(c.width, c.width)
        self.approximate = "tanh" if c.activation == "gelu_tanh" else "none"
        self.up, self.down = nn.Linear(c.width, 4 * c.width), nn.Linear(4 * c.width, c.width)

    def forward(self, x, cache, seen):
        n, length, width = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mask = None
        if cache is not None:
            cache[0, :, :, seen : seen + length], cache[1, :, :, seen : seen + length] = k, v
            k, v = cache[:, :, :, : seen + length]
        if seen and length > 1:  # query i sees keys 0 .. seen + i
            mask = torch.ones(length, seen + length, dtype=torch.bool, device=x.device).tril(seen)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=not seen)
        mixed = mixed.transpose(1, 2).reshape(n, length, width)
        x = x + F.dropout(self.attention_out(mixed), self.dropout, self.training)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm(x)), approximate=self.approximate)), self.dropout, self.training)
