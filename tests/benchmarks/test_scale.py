import json
from pathlib import Path

import pytest

from benchmarks import costs, rates, scale
from benchmarks.costs import SITES, Site, Stage, audio_flops, num_parameters, stages

ROOT = Path(__file__).parents[2]


def stage(hours: float, name: str) -> Stage:
    return next(stage for stage in stages(hours) if stage.name == name)


def test_the_page_shows_what_the_model_says() -> None:
    page = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
    assert scale.update(page) == page, "run `python -m benchmarks.scale --update docs/scale.md`"
    shown = {name for _, name, _ in scale.MARK.findall(page)}
    sizes = ("960", "60000", "1000000")
    assert shown == {
        *scale.TABLES,
        *(f"{kind}_{size}" for kind in ("stages", "bottlenecks") for size in sizes),
    }


def test_operations_are_those_counted_by_hand() -> None:
    # A second of audio is 50 frames: a layer is 4 d² + 2 d f products and attention over all frames; 2 operations each.
    frames = ((16000 * 12) - 400) // 320 + 1
    layer = 2 * frames * (4 * 768**2 + 2 * 768 * 3072 + 2 * frames * 768) / 12
    assert audio_flops("base", 9) - audio_flops("base", 8) == pytest.approx(layer)
    assert audio_flops("base") == pytest.approx(
        14e9, rel=0.1
    )  # as others count: conv stack 4.9, positional 0.5, layers 8.5
    assert audio_flops("base", seconds=15.6) > audio_flops("base", seconds=5)  # attention


def test_training_costs_its_recipes_steps_whatever_the_corpus_and_one_pass_at_least() -> None:
    heard = 400_000 * 7200
    large = stage(60_000, "HuBERT LARGE")
    assert large.flops == pytest.approx(3 * heard * audio_flops("large", seconds=15.6))
    assert large.gpu_hours(costs.H100, 0.2) == pytest.approx(large.flops / (0.2 * 989e12) / 3600)
    assert large.reads == pytest.approx(heard * 61.7e6 / 3600)
    assert stage(120_000, "HuBERT LARGE").flops == large.flops
    assert stage(1_000_000, "HuBERT LARGE").flops / large.flops == pytest.approx(3.6e9 / heard)
    # A checkpoint is weights and two moments in float32, one every 2,500 steps.
    assert stage(960, "HuBERT BASE, iteration 2").writes == pytest.approx(
        400_000 / 2500 * 3 * 4 * num_parameters("base")
    )
    assert 94e6 < num_parameters("base") < 96e6 and 315e6 < num_parameters("large") < 318e6


def test_labels_are_two_bytes_a_frame_and_what_grows_with_the_corpus_grows_with_it() -> None:
    table = costs.Rates().row["label_table_bytes"]
    assert stage(960, "labels, layer 6").writes == pytest.approx(960 * 3600 * 50 * 2 + 960 * 300 * table)
    small, large = stages(60_000), stages(600_000)
    for few, many in zip(small, large, strict=True):
        assert few.name == many.name
        if few.name.startswith(("index", "labels", "pack")):
            for key in ("reads", "writes", "opens", "memory", "flops", "core_seconds", "serial_seconds"):
                assert getattr(many, key) == pytest.approx(10 * getattr(few, key)), (few.name, key)
    draw = stage(960, "k-means, MFCC")  # 100 of 960 hours, of which four times as many are decoded
    assert draw.scratch == 100 * 180_000 * 39 * 4 and draw.reads == pytest.approx(400 * 61.7e6)
    assert next(s for s in stages(50) if s.name == "k-means, MFCC").scratch == 50 * 180_000 * 39 * 4


def test_a_stage_takes_as_long_as_the_resource_it_waits_for() -> None:
    site = Site("two nodes", costs.H100, 4, 2, 10, 1e12, 1e9, opens=100)
    work = Stage(
        "work",
        reads=3.6e12,
        writes=3.6e12,
        opens=360_000,
        flops=989e12 * 3600,
        core_seconds=72_000,
        serial_seconds=1800,
    )
    expected = {"cores": 1.0, "one thread": 0.5, "network": 2.0, "GPU": 0.5, "opening files": 1.0}
    assert work.wall_hours(site, mfu=0.5, files=True) == pytest.approx(expected)
    alone = Stage("alone", flops=989e12 * 3600, core_seconds=72_000, spread=False).wall_hours(site, mfu=0.5)
    assert alone["cores"] == pytest.approx(2.0) and alone["GPU"] == pytest.approx(
        2.0
    )  # one node, and one of its GPUs
    laboratory = Site("processors", None, 0, 2, 10, 1e12, 1e9)
    assert Stage("x", flops=1e9 * 72_000, cpu_flops=1e9).wall_hours(laboratory, 0.2)[
        "cores"
    ] == pytest.approx(1.0)
    held = Stage("x", memory=1e9, trains=True)
    assert (
        held.node_memory(SITES[0]),
        held.node_memory(laboratory),
        Stage("x", memory=1e9).node_memory(SITES[0]),
    ) == (
        8e9,
        1e9,
        1e9,
    )


def test_what_does_not_fit_a_node_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "memory in a node" not in scale.bottlenecks(960, 0.2)
    monkeypatch.setattr(scale, "SITES", [SITES[0]._replace(memory=1e9)])
    assert "**" in scale.summary([60_000], 0.2) and "of memory in a node**" in scale.bottlenecks(60_000, 0.2)


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "–"),
        (990, "990 B"),
        (59_232e6, "59.2 GB"),
        (999.9e9, "1 TB"),
        (345.6e6, "346 MB"),
        (1.2e15, "1.2 PB"),
    ],
)
def test_bytes_are_shown_with_three_digits(number: float, shown: str) -> None:
    assert scale.size(number) == shown


def test_times_are_shown_in_the_unit_that_people_would_use() -> None:
    assert [scale.duration(hours) for hours in (0.01, 0.5, 7.5, 100, 5000)] == [
        "36 s",
        "30 min",
        "7.5 h",
        "4.17 d",
        "208 d",
    ]


def test_the_command_prints_tables_or_json_and_refuses_nonsense(capsys: pytest.CaptureFixture[str]) -> None:
    assert scale.main(["--hours", "100"]) == 0
    assert "HuBERT BASE, iteration 1" in capsys.readouterr().out
    assert scale.main(["--hours", "100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["100"][0]["name"] == "index (decodes)" and found["100"][0]["reads"] == pytest.approx(6.17e9)
    assert scale.main(["--hours", "0"]) == scale.main(["--mfu", "20"]) == 2
    assert "--mfu 20" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no such result"):
        costs.read_result("gone.json")


def test_the_probes_do_what_they_are_said_to_measure(tmp_path: Path) -> None:
    drawn, heard = tmp_path / "drawn", tmp_path / "heard"
    written = rates.write_rows(drawn, 50)
    assert written["bytes"] > 0 and written["label_table_bytes"] > 0
    for probe in (
        rates.plan_epoch,
        rates.start_hubert,
        rates.draw_sample,
        rates.finish_labels,
        rates.pack_labels,
        rates.open_units,
    ):
        probe(drawn)
    rates.write_audio(heard, 20, 0.5)
    for kind in ("wav", "flac", "tar"):
        rates.index_audio(heard, kind, "header")
    rates.index_audio(heard, "flac", "decode")
    rates.index_rows(heard, 20)
    made = [json.loads(path.read_text()) for path in heard.glob("out-*/meta.json")]
    assert [meta["num_utterances"] for meta in made] == [20] * 5
    for probe in (rates.encode_mfcc, rates.collate_hubert, rates.pack_labels, rates.hash_files):
        probe(heard)


def test_a_rate_is_the_slope_between_two_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "run", lambda _, count: (5 + 2 * count, 5 + count, 1e6 + 100 * count))
    found = rates.slope(rates.hash_files, (10,), (110,), 100, rounds=3)
    assert found == pytest.approx({"seconds": 2, "own_seconds": 1, "bytes": 100})
