"""What is saved does not depend on the torch that saved it. tools/check_abi.sh runs versions.py on two torch versions."""

import json
import struct

import numpy as np
import torch
import versions

from genkern import checkpoint, models


def plain(path):
    """{name: array} and the metadata of a safetensors file: a length, a JSON header, raw numbers. No torch, no pickle."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    types = {"F32": np.float32, "F64": np.float64, "I64": np.int64, "U8": np.uint8}
    metadata = header.pop("__metadata__", {})
    arrays = {}
    for name, entry in header.items():
        begin, end = (8 + size + at for at in entry["data_offsets"])
        arrays[name] = np.frombuffer(data[begin:end], types[entry["dtype"]]).reshape(entry["shape"])
    return arrays, metadata


def test_files_are_json_and_raw_numbers(tmp_path):
    versions.main(tmp_path, "this")
    folder = tmp_path / "this"
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} == {".json", ".safetensors"}
    stored, (arrays, _) = json.loads((folder / "model" / "config.json").read_text()), plain(folder / "model" / "model.safetensors")
    model = models.load(folder / "model")
    assert stored["class"] == "VAE" and stored["config"]["latent"] == 5
    assert arrays.keys() == model.state_dict().keys()
    for name, x in model.state_dict().items():
        np.testing.assert_array_equal(arrays[name], x.numpy())
    arrays, metadata = plain(folder / "run" / "last.safetensors")
    tensors, state = checkpoint.load(folder / "run" / "last.safetensors")
    assert json.loads(metadata["state"]) == state and arrays.keys() == tensors.keys()
    assert all(np.array_equal(arrays[name], x.numpy()) for name, x in tensors.items())


def test_another_loads_and_goes_on(tmp_path, capsys):
    """The script, here between two runs of one version."""
    threads = torch.get_num_threads()
    try:
        versions.main(tmp_path, "one")
        versions.main(tmp_path, "two")
    finally:
        torch.set_num_threads(threads)
    assert "what one saved" in capsys.readouterr().out
