import json
import pickle

import pytest
import safetensors.torch
import torch

from genkern import checkpoint


class Nothing:
    ran = False

    def __reduce__(self):
        return (setattr, (Nothing, "ran", True))


def run(width=3):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.BatchNorm1d(width))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 2)).square().sum().backward()
    optimizer.step()
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {"model": model, "optimizers": {"loss": optimizer}, "ema": ema}


def saved(path, **parts):
    state = {"epoch": 3, "loss": 0.1 + 0.2}
    checkpoint.save(path, checkpoint.collect(**(parts or run())), state)
    return state


def test_everything_returns_bit_for_bit(tmp_path):
    file, parts = tmp_path / "last.safetensors", run()
    state = saved(file, **parts)
    tensors, got = checkpoint.load(file)
    assert got == state and [p.name for p in tmp_path.iterdir()] == ["last.safetensors"]
    fresh = run()
    for p in (*fresh["model"].parameters(), *fresh["ema"].values()):
        p.data.zero_()
    fresh["optimizers"]["loss"].state.clear()
    checkpoint.restore(file, tensors, **fresh)
    again, before = checkpoint.collect(**fresh), checkpoint.collect(**parts)
    assert again.keys() == before.keys()
    for name, x in before.items():
        assert again[name].dtype == x.dtype and torch.equal(again[name], x), name


def refused(file, words):
    with pytest.raises(ValueError, match=words) as caught:
        checkpoint.load(file)
    assert str(file) in str(caught.value)


def test_damaged_files_are_refused_by_name(tmp_path):
    file = tmp_path / "last.safetensors"
    saved(file)
    whole = file.read_bytes()
    for length in (0, 5, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        refused(file, "cannot be used")
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(0, len(whole), (100,), generator=generator).tolist():
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            refused(file, "cannot be used")
        except pytest.fail.Exception:  # a changed blank of the header's padding is no change
            assert checkpoint.load(file)[1] == {"epoch": 3, "loss": 0.1 + 0.2}
    file.write_bytes(whole + b"more")
    refused(file, "cannot be used")


def test_hostile_files_execute_nothing(tmp_path):
    file = tmp_path / "last.safetensors"
    file.write_bytes(pickle.dumps(Nothing()))
    refused(file, "cannot be used")
    torch.save({"x": Nothing()}, file)
    refused(file, "cannot be used")
    file.write_bytes((2**63).to_bytes(8, "little") + b"{}")  # a header that claims to be endless
    refused(file, "cannot be used")
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    refused(file, "cannot be used")
    safetensors.torch.save_file({"x": torch.zeros(1)}, file)
    refused(file, "its format is None")
    assert not Nothing.ran


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("model/0.weight"), "lacks 0.weight"),
        (lambda t: t.update({"model/9.weight": torch.zeros(1)}), "unexpected 9.weight"),
        (lambda t: t.update({"code/x": torch.zeros(1)}), "unexpected tensor code/x"),
        (lambda t: t.update({"ema/0.weight": torch.zeros(1)}), r"0.weight of torch.float32 \(1,\), expected torch.float32 \(3, 2\)"),
        (lambda t: t.update({"model/0.weight": t["model/0.weight"].double()}), "torch.float64"),
        (lambda t: t.update({"optimizer/loss/0/exp_avg": torch.zeros(7)}), r"\(7,\), expected \(3, 2\)"),
        (lambda t: t.update({"optimizer/loss/9/exp_avg": torch.zeros(7)}), "no parameter"),
        (lambda t: t.update({"optimizer/other/0/exp_avg": torch.zeros(7)}), "no parameter"),
        (lambda t: t.update({"optimizer/x": torch.zeros(7)}), "no parameter"),
    ],
)
def test_another_models_checkpoint_changes_nothing(tmp_path, change, words):
    parts = run()
    tensors = {name: x.clone() for name, x in checkpoint.collect(**parts).items()}
    before = {name: x.clone() for name, x in tensors.items()}
    change(tensors)
    with pytest.raises(ValueError, match=words):
        checkpoint.restore("file", tensors, **parts)
    assert all(torch.equal(x, before[name]) for name, x in checkpoint.collect(**parts).items())


def test_tied_weights_and_views_are_saved(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    saved(tmp_path / "x", model=model, optimizers={})
    checkpoint.restore("x", checkpoint.load(tmp_path / "x")[0], model, {})


def test_a_missing_file_and_a_number_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="last"):
        checkpoint.load(tmp_path / "last")
    with pytest.raises(ValueError):
        checkpoint.save(tmp_path / "last", {}, {"loss": float("nan")})
    assert not list(tmp_path.iterdir())
