from pathlib import Path

import pytest

import quantize.features
from benchmarks.windows import main
from tests.quantize.conftest import write_corpus, write_run


def test_the_table_has_what_windows_change_in_every_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quantize.features, "WINDOW_FRAMES", 150)
    paths = [str(write_run(tmp_path / "run")), str(write_corpus(tmp_path))]
    monkeypatch.setattr("sys.argv", ["windows", *paths, "--seconds", "8"])
    main()
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]
    ]
    assert [row[0] for row in table] == ["0", "1", "2"]
    # the first layer's input has the statistics of the whole
    assert float(table[0][1]) < 1e-5 and table[0][2] == "0.0 %"
    assert all(float(row[1]) < float(row[3]) for row in table)
    monkeypatch.setattr("sys.argv", ["windows", *paths, "--seconds", "80"])
    with pytest.raises(ValueError, match="s too short; give fewer seconds"):
        main()
