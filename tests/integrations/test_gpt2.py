"""GPT-2 and nanoGPT checkpoints: the logits and the greedy output of transformers."""

import pytest
import torch

import genkern
from genkern.models import GPT, GPTConfig, load

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=61, n_positions=32, n_embd=24, n_layer=2, n_head=3, bos_token_id=0, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(config).eval()
    for weight in model.parameters():  # its initialisation is so small that all tokens would be equal
        torch.nn.init.normal_(weight, std=0.3)
    folder = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder)
    return model, folder


def test_logits_and_greedy_output(gpt2, tmp_path):
    theirs, folder = gpt2
    ours = GPT.from_gpt2(folder)
    prompt = torch.randint(0, 61, (2, 7))
    with torch.no_grad():
        expected = theirs(prompt).logits
        torch.testing.assert_close(ours._run(prompt, None)[0], expected, rtol=1e-4, atol=1e-4)
        first, state = ours.step(prompt[:, :3])
        torch.testing.assert_close(first, expected[:, 2], rtol=1e-4, atol=1e-4)
        greedy = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(prompt, 20, temperature=0), greedy)
    labels = torch.nn.functional.cross_entropy(expected[:, :-1].transpose(1, 2), prompt[:, 1:], reduction="none").sum(1)
    torch.testing.assert_close(ours.log_prob(prompt), -labels, rtol=1e-4, atol=1e-4)
    ours.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path).generate(prompt, 20, temperature=0), greedy)
    with pytest.raises(ValueError, match="needs a token"):
        ours.generate(prompt[:, :0], 3)


def test_nanogpt(gpt2, tmp_path):
    theirs, _ = gpt2
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    weights = {f"_orig_mod.{n}": (x.t() if n.endswith(turned) else x).clone() for n, x in theirs.state_dict().items()}
    arguments = {"vocab_size": 61, "block_size": 32, "n_embd": 24, "n_layer": 2, "n_head": 3, "bias": True, "dropout": 0.0}
    torch.save({"model": weights, "model_args": arguments, "iter_num": 3}, tmp_path / "ckpt.pt")
    ours, prompt = GPT.from_nanogpt(tmp_path / "ckpt.pt", activation="gelu_tanh"), torch.randint(0, 61, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(ours._run(prompt, None)[0], theirs(prompt).logits, rtol=1e-4, atol=1e-4)
    assert GPT.from_nanogpt(tmp_path / "ckpt.pt").config.activation == "gelu"  # what nanoGPT computes
    without = {n: x for n, x in weights.items() if not n.endswith("bias")}
    torch.save({"model": without, "model_args": {**arguments, "bias": False}}, tmp_path / "ckpt.pt")
    assert not GPT.from_nanogpt(tmp_path / "ckpt.pt").norm.bias.any()


def test_refusals(gpt2, tmp_path):
    theirs, folder = gpt2
    with pytest.raises(ValueError, match="no config"):
        GPT.from_gpt2(tmp_path)
    text = (folder / "config.json").read_text().replace("gelu_new", "relu")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="relu"):
        GPT.from_gpt2(tmp_path)
    weights = {"transformer." + n: x.t() for n, x in theirs.transformer.state_dict().items() if x.dim() == 2}
    torch.save({"model": weights, "model_args": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="vocab_size"):
        GPT.from_nanogpt(tmp_path / "ckpt.pt")
    arguments = {"vocab_size": 61, "block_size": 32, "n_embd": 24, "n_layer": 2, "n_head": 3}
    for model, words in (([1], "no checkpoint of nanoGPT"), ({"lm_head.weight": torch.ones(3)}, "Missing key")):
        torch.save({"model": model, "model_args": arguments}, tmp_path / "ckpt.pt")
        with pytest.raises(ValueError, match=words):
            GPT.from_nanogpt(tmp_path / "ckpt.pt")
    torch.save(theirs, tmp_path / "ckpt.pt")  # an object, whose loading could execute code
    with pytest.raises(ValueError, match="holds more than tensors"):
        GPT.from_nanogpt(tmp_path / "ckpt.pt")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="no config"):
        GPT.from_gpt2(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot be read"):
        GPT.from_gpt2(tmp_path)
    with pytest.raises(ValueError, match="activation"):
        GPT(GPTConfig(activation="relu"))
    assert genkern.models.GPT is GPT
