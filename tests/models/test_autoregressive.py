import math

import pytest
import torch

import genkern
from genkern import models
from genkern.models import GPT, CharLSTM, CharLSTMConfig, GPTConfig
from genkern.ops import mu_law_decode, mu_law_encode, sample_tokens


def small(name, **settings):
    torch.manual_seed(0)
    if name == "gpt":
        return GPT(GPTConfig(**{"vocabulary": 11, "context": 20, "width": 16, "layers": 2, "heads": 2, **settings})).eval()
    return CharLSTM(CharLSTMConfig(**{"vocabulary": 11, "width": 16, **settings})).eval()


def text(n=3, length=12):
    return torch.randint(0, 11, (n, length), generator=torch.Generator().manual_seed(1))


each_model = pytest.mark.parametrize("name", ["gpt", "lstm"])


@each_model
def test_probabilities_of_all_sequences_sum_to_one(name):
    model = small(name, vocabulary=3)
    every = torch.cartesian_prod(*[torch.arange(3)] * 4)
    assert abs(model.log_prob(every).double().logsumexp(0)) < 1e-5
    out = model(every[:7])
    torch.testing.assert_close(out.loss, -model.log_prob(every[:7]).mean() / 4)
    assert out.loss.requires_grad and out.parts["nll"] == out.loss


@each_model
def test_steps_equal_the_parallel_pass(name):
    model, x = small(name), text()
    parallel = model._run(x, None)[0]
    logits, state = model.step(x[:, :0])
    torch.testing.assert_close(logits, parallel[:, 0], rtol=1e-5, atol=1e-5)
    for begin, end in ((0, 1), (1, 5), (5, 6), (6, 12)):
        logits, state = model.step(x[:, begin:end], state)
        torch.testing.assert_close(logits, parallel[:, end], rtol=1e-5, atol=1e-5)


@each_model
def test_the_future_is_not_seen(name):
    model, x = small(name), text()
    changed = x.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 11
    before, after = model._run(x, None)[0], model._run(changed, None)[0]
    assert torch.equal(before[:, :8], after[:, :8]) and not torch.equal(before[:, 8], after[:, 8])


@each_model
def test_generate_is_the_naive_loop(name):
    model, key, prompt = small(name), genkern.random.key(5), text(3, 4)
    got = model.generate(prompt, 6, temperature=0.8, top_k=7, key=key)
    naive = prompt
    for t in range(6):
        logits = model._run(naive, None)[0][:, -1]
        new = sample_tokens(logits, temperature=0.8, top_k=7, key=genkern.random.fold_in(key, t))
        naive = torch.cat([naive, new.unsqueeze(1)], 1)
    assert torch.equal(got, naive)
    assert torch.equal(model.generate(prompt[:2], 6, temperature=0.8, top_k=7, key=key), got[:2])
    assert model.sample(5, length=9, key=key).shape == (5, 9) and model.generate(prompt, 0).equal(prompt)


@each_model
def test_greedy_text_is_learned(name):
    model = small(name).train()
    x = (torch.arange(12) % 4).repeat(4, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(120):
        loss = model(x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 < math.log(11)
    assert model.eval().sample(1, length=12, temperature=0).equal(x[:1])


@each_model
def test_save_and_load(name, tmp_path):
    model, x = small(name), text().to(torch.uint8)
    model.save_pretrained(tmp_path)
    loaded = models.load(tmp_path)
    assert loaded.config == model.config and torch.equal(loaded.log_prob(x), model.log_prob(x))


@each_model
def test_compiles_in_one_graph(name):
    if name == "lstm":
        pytest.skip("torch.compile does not trace torch.nn.LSTM by default")
    model, x = small(name), text()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x).loss, model(x).loss)


@each_model
@pytest.mark.parametrize(
    "change, error, words",
    [
        (lambda x: x.float(), TypeError, "uint8, int32 or int64"),
        (lambda x: x[0], ValueError, r"\(N, T\)"),
        (lambda x: x + 1, ValueError, r"0\.\.10"),
        (lambda x: x[:, :0], ValueError, "hold a token"),
    ],
)
def test_wrong_tokens_are_refused_in_words(name, change, error, words):
    x = text()
    x[0, 0] = 10
    with pytest.raises(error, match=words):
        small(name).log_prob(change(x))


def test_gpt_refuses_what_exceeds_its_context():
    model = small("gpt")
    assert model.generate(text(1, 12), 8, key=genkern.random.key(0)).shape == (1, 20)
    with pytest.raises(ValueError, match="at most context = 20"):
        model.generate(text(1, 12), 9)
    with pytest.raises(ValueError, match="multiple of heads"):
        small("gpt", heads=3)


def test_mu_law():
    x = torch.tensor([-1.0, 0.0, 1.0])
    assert mu_law_encode(x).tolist() == [0, 128, 255]
    assert mu_law_encode(x, rounding="floor").tolist() == [0, 127, 255]
    assert mu_law_encode(x, 257, rounding="floor").tolist() == [0, 128, 256]
    every = torch.arange(256)
    assert torch.equal(mu_law_encode(mu_law_decode(every)), every)
    assert mu_law_decode(torch.tensor([0, 255])).tolist() == [-1.0, 1.0]
    many = torch.arange(65536)  # more than float16 and bfloat16 tell apart: the arithmetic is float32
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(mu_law_decode(many, 65536, dtype=dtype), mu_law_decode(many, 65536).to(dtype))
    with pytest.raises(TypeError, match="integer"):
        mu_law_decode(x)
    with pytest.raises(ValueError, match="'nearest', 'floor'"):
        mu_law_encode(x, rounding="up")
