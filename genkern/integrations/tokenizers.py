"""The byte-pair encoding of a GPT-2 from a local folder: text to the tokens of genkern.models.GPT and back.

from genkern.integrations.tokenizers import BPE
from genkern.models import GPT

bpe, model = BPE("gpt2/"), GPT.from_gpt2("gpt2/")
print(bpe.generate(model, "Once upon a time", 50, temperature=0.8, top_p=0.95))
"""

from pathlib import Path

import torch

try:
    from tokenizers import ByteLevelBPETokenizer, Tokenizer
except ImportError as error:  # pragma: no cover
    raise ImportError('genkern.integrations.tokenizers needs tokenizers: pip install "genkern[tokenizers]"') from error


class BPE:
    """The tokenizer of a folder that holds tokenizer.json, or vocab.json and merges.txt as GPT-2's does."""

    def __init__(self, folder):
        folder = Path(folder)
        if (folder / "tokenizer.json").is_file():
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            self.tokenizer = ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
        else:
            raise FileNotFoundError(f"BPE: {folder} holds neither tokenizer.json nor vocab.json and merges.txt")

    def __len__(self):
        """The number of tokens."""
        return self.tokenizer.get_vocab_size()

    def encode(self, text):
        """int64 (1, T)."""
        return torch.tensor([self.tokenizer.encode(text).ids], dtype=torch.int64)

    def decode(self, tokens):
        """The text of tokens (T,), or a list of texts of tokens (N, T)."""
        rows = tokens.tolist()
        return self.tokenizer.decode_batch(rows) if tokens.dim() == 2 else self.tokenizer.decode(rows)

    def generate(self, model, prompt, max_new_tokens, **options):
        """The prompt, a text, with max_new_tokens more tokens of a model: its generate() with the same options."""
        if len(self) > model.config.vocabulary:
            raise ValueError(f"BPE: {len(self)} tokens, and a model of {model.config.vocabulary}")
        device = next(model.parameters()).device
        return self.decode(model.generate(self.encode(prompt).to(device), max_new_tokens, **options))[0]
