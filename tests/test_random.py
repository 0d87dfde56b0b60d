"""The random stream is a contract: known answers, an independent oracle, golden hashes, equality everywhere, statistics."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import philox_oracle as oracle
import pytest
import torch

import genkern
import genkern.random as gr
from genkern.core._backends import INTERPRET
from genkern.testing import backends

BACKENDS = ["reference", *backends()]
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CONTINUOUS = ("uniform", "normal", "exponential", "gumbel", "logistic")
SEED, OFFSET = 0x123456789ABCDEF, 2**32 - 100  # the counter's low word overflows inside every test
KEY = torch.tensor([SEED, OFFSET])

# Triton's interpreter stores float32 to bfloat16 by cutting the low bits off; a GPU rounds to nearest like everything else.
TRUNCATING = ("triton",) if INTERPRET else ()

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def unsigned(x):
    return x.numpy().view(np.uint32 if x.dtype == torch.int32 else np.uint64)


# ---- bits


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # published with Random123
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
         (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)  # fmt: skip
def test_host_known_answers(counter, key, expected):
    host = pytest.importorskip("genkern._host", reason="the host module is not built")
    assert host.philox4x32(*counter, *key) == expected


@each_backend
def test_first_words_are_the_known_answer(backend):
    with genkern.backend(backend):
        got = gr.bits(gr.key(0), (4,))
    assert unsigned(got).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@each_backend
def test_bits_equal_the_oracle(backend):
    expected = oracle.words((SEED, OFFSET), 1200)
    with genkern.backend(backend):
        assert np.array_equal(unsigned(gr.bits(KEY, (1197,))), expected[:1197])
        pairs = expected.astype(np.uint64).reshape(-1, 2)
        assert np.array_equal(unsigned(gr.bits(KEY, (599,), dtype=torch.int64)), (pairs[:, 0] << np.uint64(32) | pairs[:, 1])[:599])


def test_offset_wraps_at_2_to_64():
    key = torch.tensor([5, -2])  # two counters before the end
    assert torch.equal(gr.bits(key, (16,))[8:], gr.bits(torch.tensor([5, 0]), (8,)))


# ---- values


@each_backend
@pytest.mark.parametrize("name", CONTINUOUS)
def test_values_equal_the_oracle(backend, name):
    for dtype, numpy_dtype in ((torch.float32, np.float32), (torch.float64, np.float64)):
        expected = getattr(oracle, name)((SEED, OFFSET), 4001, numpy_dtype)
        with genkern.backend(backend):
            got = getattr(gr, name)(KEY, (4001,), dtype=dtype).numpy()
        if backend == "reference" and dtype == torch.float64:
            np.testing.assert_allclose(got, expected, rtol=1e-14, atol=1e-14)
        else:
            assert np.array_equal(got, expected)


@each_backend
def test_truncated_normals_equal_the_oracle(backend):
    for low, high in ((-2.0, 2.0), (0.5, 3.0), (-5.0, 5.0)):
        with genkern.backend(backend):
            got = gr.truncated_normal(KEY, (4001,), low, high)
        assert np.array_equal(got.numpy(), oracle.truncated_normal((SEED, OFFSET), 4001, low, high))


def test_normal_quantile_is_as_exact_as_it_says():
    special = pytest.importorskip("scipy.special")
    for dtype, allowed, finest in ((torch.float32, 4e-7, -6.5), (torch.float64, 1e-15, -15)):
        fine = torch.logspace(finest, -1, 5000, dtype=torch.float64)
        y = torch.cat([torch.linspace(-1, 1, 20001, dtype=torch.float64)[1:-1], 1 - fine, fine - 1]).to(dtype)
        truth = np.sqrt(2) * special.erfinv(y.double().numpy())
        got = gr._random.normal_quantile(y).double().numpy()
        assert np.all(np.abs(got - truth) <= allowed * np.maximum(1, np.abs(truth)))


def test_draws_are_what_their_names_say():
    """Against NumPy's own functions in float64: the polynomials are as exact as float32 allows."""
    u = oracle.words((SEED, OFFSET), 4000) * 2.0**-32 + 2.0**-33
    radius, angle = np.sqrt(-2 * np.log(u[0::2])), 2 * np.pi * u[1::2]
    true = {
        "normal": np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1),
        "exponential": -np.log(u),
        "gumbel": -np.log(-np.log(u)),
        "logistic": np.log(u) - np.log1p(-u),
    }
    for name, expected in true.items():
        got = getattr(gr, name)(KEY, (4000,)).double().numpy()
        assert np.all(np.abs(got - expected) <= 2e-6 * np.maximum(1, np.abs(expected))), name


@each_backend
@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_backends_agree_bit_for_bit(backend, name, dtype):
    draw = getattr(gr, name)
    for key in (KEY, gr.split(KEY, 3)):
        for n in (0, 1, 7, 1031):
            with genkern.backend("reference"):
                expected = draw(key, (3, n), dtype=dtype)
            with genkern.backend(backend):
                got = draw(key, (3, n), dtype=dtype)
            if dtype == torch.bfloat16 and backend in TRUNCATING and name != "uniform":  # uniforms are exact in bfloat16
                single = draw(key, (3, n)).view(torch.int32)
                expected = (single >> 16 << 16).view(torch.float32).to(dtype)
            if dtype == torch.float64 and name != "uniform":  # the reference's NumPy-exact functions differ in the last places
                torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)
            else:
                assert torch.equal(got, expected)


@each_backend
def test_bernoulli(backend):
    for p in (0.0, 0.3, 0.5, 1.0):
        expected = oracle.bernoulli((SEED, OFFSET), 3001, p=p).astype(bool)
        for dtype in (torch.float32, torch.uint8, torch.bool, torch.bfloat16):
            with genkern.backend(backend):
                assert np.array_equal(gr.bernoulli(KEY, p, (3001,), dtype=dtype).bool().numpy(), expected)
    probabilities = torch.tensor([0.0, 1.0, 0.25]).expand(1000, 3)
    assert gr.bernoulli(KEY, probabilities).mean(0).sub(probabilities[0]).abs().max() < 0.06


GOLDEN = {
    "bits": "4787f8dd7ef36517",
    "uniform": "483ec33786229ed5",
    "normal": "ebe9163a73685186",
    "exponential": "e475d90426233786",
    "gumbel": "6688bea58b37b3f9",
    "logistic": "b571acc94aed220f",
    "truncated_normal": "58bb79683ebe04f3",
}


def golden_hash(name):
    """One hash over all types whose bits are a promise; also run in other processes, see test_instruction_sets."""
    types = (torch.int32, torch.int64) if name == "bits" else (torch.float32, torch.bfloat16, torch.float16)
    digest = hashlib.sha256()
    for dtype in types:
        digest.update(getattr(gr, name)(KEY, (10007,), dtype=dtype).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@each_backend
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(backend, name):
    if backend in TRUNCATING:
        pytest.skip("Triton's interpreter truncates to bfloat16")
    with genkern.backend(backend):
        assert golden_hash(name) == GOLDEN[name]


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_instruction_sets(capability):
    script = "import test_random as t; print(*(t.golden_hash(n) for n in t.GOLDEN))"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=os.path.dirname(__file__), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(GOLDEN.values())


# ---- independence of shape, slice, batch, threads


@each_backend
@pytest.mark.parametrize("dtype", FLOATS)
def test_prefixes_and_slices(backend, dtype):
    per_counter = 2 if dtype == torch.float64 else 4
    with genkern.backend(backend):
        whole = gr.normal(KEY, (5003,), dtype=dtype)
        assert torch.equal(gr.normal(KEY, (1001,), dtype=dtype), whole[:1001])
        assert torch.equal(gr.normal(KEY, (5003 // 3, 3), dtype=dtype).flatten(), whole[: 5003 // 3 * 3])
        later = gr.normal(torch.tensor([SEED, OFFSET + 77]), (99,), dtype=dtype)
        assert torch.equal(later, whole[77 * per_counter :][:99])


def test_threads_share_a_draw():
    threads, draws = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            draws.append([gr.normal(KEY, (40_003,), dtype=dtype) for dtype in FLOATS])  # a thread takes 16384 elements at least
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *draws))


@each_backend
def test_one_key_per_sample_does_not_depend_on_the_batch(backend):
    keys = gr.split(KEY, 8)
    with genkern.backend(backend):
        whole = gr.normal(keys, (8, 3, 77))
        assert torch.equal(gr.normal(keys[2:5], (3, 3, 77)), whole[2:5])
        assert torch.equal(gr.normal(keys[6], (3, 77)), whole[6])


def test_split_and_fold_in():
    keys = gr.split(KEY, 100)
    assert torch.equal(gr.split(KEY, 7), keys[:7])
    assert torch.equal(gr.fold_in(KEY, 42), keys[42])
    assert torch.equal(gr.fold_in(KEY, torch.tensor(42)), keys[42])
    assert torch.equal(gr.split(keys[:5], 3)[4], gr.split(keys[4], 3))
    words = oracle.words((SEED, OFFSET), 12).astype(np.uint64).reshape(3, 4)
    expected = np.stack([words[:, 0] | words[:, 1] << np.uint64(32), words[:, 2] | words[:, 3] << np.uint64(32)], 1)
    assert np.array_equal(keys[:3].numpy().view(np.uint64), expected)
    assert len({tuple(k) for k in keys.tolist()}) == 100


# ---- torch's seed, out=, compile


def test_manual_seed_gives_the_same_noise_eager_and_compiled():
    mu, log_var = torch.zeros(3, 40), torch.zeros(3, 40)
    compiled = torch.compile(lambda m, v: genkern.ops.reparameterize(m, v), fullgraph=True, backend="aot_eager")
    draws = []
    for function in (genkern.ops.reparameterize, compiled):
        torch.manual_seed(3)
        draws.append([function(mu, log_var) for _ in range(2)])
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[0][1])
    generator = torch.Generator().manual_seed(3)
    first = genkern.ops.reparameterize(mu, log_var, generator=generator)
    assert torch.equal(first, draws[0][0])


@each_backend
def test_out(backend):
    with genkern.backend(backend):
        room = torch.zeros(300)
        out = room[100:200]
        version = out._version
        assert gr.normal(KEY, (100,), out=out) is out and out._version > version
        assert torch.equal(gr.normal(KEY, out=torch.empty(100)), out) and gr.bernoulli(KEY, 1.0, out=torch.zeros(9)).all()
        assert torch.equal(out, gr.normal(KEY, (100,)))
        assert room[:100].eq(0).all() and room[200:].eq(0).all()
        for wrong in (torch.empty(99), torch.empty(200)[::2], torch.empty(100, dtype=torch.int32)):
            with pytest.raises(ValueError, match="out must be contiguous"):
                gr.normal(KEY, (100,), out=wrong)


def test_vmap_over_keys():
    keys = gr.split(KEY, 3)
    for name in CONTINUOUS:
        draw = getattr(gr, name)
        assert torch.equal(torch.vmap(lambda k, d=draw: d(k, (9,)))(keys), draw(keys, (3, 9)))


# ---- errors


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: gr.normal(3, (2,)), TypeError, "key must be an int64 tensor"),
        (lambda: gr.normal(torch.zeros(2), (2,)), ValueError, "float32"),
        (lambda: gr.normal(gr.split(KEY, 3), (2, 4)), ValueError, "3 keys need a shape that starts with 3"),
        (lambda: gr.normal(KEY, (2,), dtype=torch.int32), TypeError, "dtype must be one of"),
        (lambda: gr.bernoulli(KEY, 1.5, (2,)), ValueError, r"p must be in \[0, 1\], got 1.5"),
        (lambda: gr.exponential(KEY, (2,), 0.0), ValueError, "rate must be positive"),
        (lambda: gr.truncated_normal(KEY, (2,), 1.0, 1.0), ValueError, "low must be below high"),
        (lambda: gr.key("seven"), TypeError, "seed must be an int, got str"),
        (lambda: gr.split(KEY, -1), ValueError, "n must be an int of at least 0"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


# ---- statistics: thresholds at about one in a million for the fixed keys, so a failure is a change


N = 1 << 20


def test_moments_and_tails():
    x = gr.normal(gr.key(1), (N,)).double()
    assert abs(x.mean()) < 5 / N**0.5 and abs(x.var() - 1) < 5 * (2 / N) ** 0.5
    assert abs((x**3).mean()) < 5 * (15 / N) ** 0.5 and abs((x**4).mean() - 3) < 5 * (96 / N) ** 0.5
    expected = 6.334e-05 * N  # P(|x| > 4)
    assert abs((x.abs() > 4).sum() - expected) < 5 * expected**0.5
    e = gr.exponential(gr.key(2), (N,)).double()
    assert abs(e.mean() - 1) < 5 / N**0.5 and e.min() > 0 and abs((e > 10).sum() - N * np.exp(-10)) < 5 * (N * np.exp(-10)) ** 0.5
    assert abs(gr.gumbel(gr.key(3), (N,)).double().mean() - 0.5772156649) < 5 * np.pi / 6**0.5 / N**0.5
    u = gr.uniform(gr.key(4), (N,))
    assert u.min() >= 0 and u.max() < 1 and abs(u.double().mean() - 0.5) < 5 / (12 * N) ** 0.5
    t = gr.truncated_normal(gr.key(5), (N,), -2, 1)
    assert t.min() >= -2 and t.max() <= 1


@pytest.mark.parametrize("name", CONTINUOUS)
def test_kolmogorov_smirnov(name):
    stats = pytest.importorskip("scipy.stats")
    names = {"normal": "norm", "exponential": "expon", "gumbel": "gumbel_r"}
    x = getattr(gr, name)(gr.key(6), (100_000,)).double().numpy()
    assert stats.kstest(x, names.get(name, name)).pvalue > 1e-4


def test_truncated_normal_distribution():
    stats = pytest.importorskip("scipy.stats")
    for low, high in ((-2, 2), (0.5, 3.0)):
        x = gr.truncated_normal(gr.key(8), (100_000,), low, high).double().numpy()
        assert stats.kstest(x, stats.truncnorm(low, high).cdf).pvalue > 1e-4


def test_no_serial_correlation():
    x = gr.normal(gr.key(7), (N,)).double()
    for lag in (1, 2, 3, 4, 5, 8, 64):
        assert abs((x[:-lag] * x[lag:]).mean()) < 5 / N**0.5
    keys = gr.split(gr.key(7), 64)
    rows = gr.normal(keys, (64, 4096)).double()
    correlation = torch.corrcoef(rows).fill_diagonal_(0)
    assert correlation.abs().max() < 6 / 4096**0.5
