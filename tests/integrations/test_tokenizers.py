"""BPE of a local folder: a tiny tokenizer made here, in both forms of files."""

import pytest
import torch

import genkern
from genkern.models import GPT, GPTConfig

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture
def folder(tmp_path):
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(["the cat sat on the mat", "the dog ate the cat's food"] * 4, vocab_size=290, show_progress=False)
    made.save_model(str(tmp_path))
    return tmp_path, made


def test_round_trip_and_generation(folder):
    from genkern.integrations.tokenizers import BPE

    path, made = folder
    bpe, text = BPE(path), "the cat ate the mat, naïvely"
    tokens = bpe.encode(text)
    assert tokens.tolist() == [made.encode(text).ids] and tokens.dtype == torch.int64
    assert tokens.shape[1] < len(text.encode()) and bpe.decode(tokens) == [text] and bpe.decode(tokens[0]) == text
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocabulary=len(bpe), context=32, width=16, layers=1, heads=2, start=False)).eval()
    key = genkern.random.key(3)
    written = bpe.generate(model, "the cat", 5, top_k=10, key=key)
    assert written == bpe.decode(model.generate(bpe.encode("the cat"), 5, top_k=10, key=key))[0] and written.startswith("the cat")
    made.save(str(path / "tokenizer.json"))
    assert BPE(path).encode(text).equal(tokens)


def test_refusals(folder, tmp_path):
    from genkern.integrations.tokenizers import BPE

    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json"):
        BPE(tmp_path / "none")
    with pytest.raises(ValueError, match="a model of 11"):
        BPE(folder[0]).generate(GPT(GPTConfig(vocabulary=11, context=8, width=8, layers=1, heads=1)), "a", 1)
