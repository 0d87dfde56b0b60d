"""The command line as a newcomer meets it."""

import json

import pytest

from genkern import core
from genkern.cli import main


def test_info_has_a_row_per_op_and_a_machine_form(capsys):
    assert main(["info"]) == 0
    table = capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    for name, op in core.OPS.items():
        assert name in table
        assert report["active"]["cpu"][name]["backend"] == op.default("cpu")[0]


def test_a_typo_gets_a_suggestion(capsys):
    assert main(["inof"]) == 2
    assert "did you mean 'info'?" in capsys.readouterr().err
    assert main(["banana"]) == 2
    assert "the commands are info, build, verify, bench" in capsys.readouterr().err


def test_help_lists_the_commands(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 60
    assert all(f"  {name} " in out for name in ("info", "build", "verify", "bench"))


def test_bench_names_an_unknown_op(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "gausian_kl"])
    assert "no op 'gausian_kl'" in capsys.readouterr().err


def test_verify_passes_here_and_fails_on_a_wrong_kernel(capsys, monkeypatch):
    if core.OPS["gaussian_kl"].available("cpu")["cpu"] is not None:
        pytest.skip("no CPU kernels here")
    op = core.OPS["gaussian_kl"]
    monkeypatch.setattr(core, "OPS", {"gaussian_kl": op})
    assert main(["verify", "--device", "cpu"]) == 0
    right = op._forward["cpu"]
    monkeypatch.setitem(op._forward, "cpu", lambda *args: right(*args) + 1e-2)
    assert main(["verify", "--device", "cpu"]) == 1
    assert "is off by" in capsys.readouterr().out
