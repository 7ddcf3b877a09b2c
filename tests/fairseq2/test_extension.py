"""Our models as fairseq2's: asset cards of runs, its own loading, sharding and recomputing, and an extension
that hinders nothing."""

import os
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fairseq2 import init_fairseq2
from fairseq2.assets import AssetCard, AssetCardError
from fairseq2.error import NotSupportedError
from fairseq2.models import ModelFamily, load_model
from fairseq2.models.hub import ModelHub
from fairseq2.runtime.dependency import DependencyContainer, get_dependency_resolver
from torch import Tensor, nn

from pretrain.ctc.model import CTCBatch, Recognizer
from pretrain.ctc.vocabulary import Vocabulary
from pretrain.data.packing import pack_padded
from pretrain.fairseq2 import extension
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import Encoder
from pretrain.objectives.hubert import Hubert, HubertConfig
from pretrain.objectives.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from pretrain.training.checkpoint import save_checkpoint
from pretrain.weights.families import ARCHS, FAMILIES
from tests.parity.peers import scatter
from tests.pretrain.conftest import run_two_processes
from units.corpus.patterns import Pattern
from units.corpus.vocabulary import Vocabulary as Units
from units.lm.fairseq2 import FAMILY as UNIT_LM
from units.lm.fairseq2 import register as register_units
from units.lm.language_model import LanguageModel
from units.lm.model import Decoder, DecoderConfig
from wordless.cli import main

ROOT = Path(__file__).parent.parent.parent
WAVEFORM: dict[str, Any] = {
    "dim": 32,
    "num_layers": 2,
    "num_heads": 2,
    "ffn_dim": 48,
    "conv_dim": 16,
    "pos_kernel": 8,
    "pos_groups": 2,
}
ENCODER = EncoderConfig(**WAVEFORM)
VOCABULARY = Vocabulary(["|", "a", "b"])


def register(container: DependencyContainer) -> None:
    extension.register(container)
    register_units(container)


@pytest.fixture(autouse=True)
def _with_our_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """Started anew, with both extensions, whether or not they are installed here."""
    monkeypatch.setattr("fairseq2.runtime.dependency._resolver", None)
    init_fairseq2(extras=register)


def save_run(folder: Path, model: nn.Module, kind: str = "encoder", **extra: Any) -> Path:
    """A run with the weights of `model`, with moments of AdamW as training leaves them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    config = extra.pop("config")
    save_checkpoint(folder, 7, model, optimizer, {"kind": kind, "config": config, "extra": extra})
    return folder


FILTERBANK = EncoderConfig(architecture="tiny")
UNITS, DECODER = (
    Units(num_units=5, num_levels=2),
    DecoderConfig(dim=16, num_heads=2, num_kv_heads=1, ffn_dim=24, num_layers=2),
)


def build(family: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model that fairseq2 can only have as one of `family`, and the meta data of its run."""
    torch.manual_seed(0)
    own, filterbank = {"encoder": ENCODER.resolved()}, {"encoder": FILTERBANK.resolved()}
    match family:
        case "wordless_hubert":
            return Hubert(ENCODER, HubertConfig(), 9), {
                "config": {**own, "hubert": HubertConfig().resolved()}
            }
        case "wordless_wav2vec2":
            return Wav2Vec2(FILTERBANK, Wav2Vec2Config()), {
                "config": {**filterbank, "wav2vec2": Wav2Vec2Config().resolved()}
            }
        case "wordless_encoder":
            return nn.ModuleDict({"encoder": Encoder(FILTERBANK)}), {"config": filterbank}
        case "wordless_recognizer":
            tree = {"text": {"case": "upper"}, "ctc": {"final_dropout": 0.2}}
            meta = {
                "config_encoder": ENCODER.resolved(),
                "vocabulary": VOCABULARY.to_meta(),
                "codebook": None,
            }
            return Recognizer(ENCODER, VOCABULARY, layers="weighted"), {
                "kind": "recognizer",
                "config": tree,
                **meta,
            }
    meta = {"decoder": DECODER.resolved(), "vocabulary": UNITS.model_dump(mode="json"), "pattern": "delay"}
    return LanguageModel(Decoder(DECODER, Pattern("delay", UNITS.sizes).vocabularies)), {
        "kind": "unit-lm",
        "config": {},
        **meta,
    }


def make_run(folder: Path, family: str) -> tuple[Path, Any]:
    """A run, and its model in eval mode."""
    model, meta = build(family)
    return save_run(folder / family, scatter(model), **meta), model.eval()


def card_of(run: Path, folder: Path, **fields: Any) -> AssetCard:
    """The card that `wordless export --format fairseq2` writes of a run, as fairseq2 reads it."""
    assert main(["export", str(run), str(folder), "--format", "fairseq2"]) == 0
    metadata: dict[str, object] = yaml.safe_load((folder / "card.yaml").read_text())
    return AssetCard(str(metadata.pop("name")), {**metadata, "__base_path__": folder, **fields})


WAVES, SAMPLES = torch.randn(2, 4000, generator=torch.Generator().manual_seed(1)), torch.tensor([4000, 2500])


@pytest.mark.parametrize("family", [*FAMILIES, UNIT_LM])
@pytest.mark.parametrize("checkpoint", ["exported", "run", "file"])
def test_fairseq2_loads_a_run_by_its_card_bit_for_bit(tmp_path: Path, family: str, checkpoint: str) -> None:
    run, expected = make_run(tmp_path, family)
    places = {
        "exported": {},
        "run": {"checkpoint": str(run)},
        "file": {"checkpoint": str(run / "step_00000007" / "model.safetensors")},
    }
    card = card_of(run, tmp_path / "card", **places[checkpoint])
    assert card.metadata["model_family"] == family
    loaded = load_model(card).eval()
    ours = expected.state_dict()
    assert loaded.state_dict().keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in loaded.state_dict().items())
    if family == UNIT_LM:
        tokens, positions = torch.randint(5, (2, 6, 2)), torch.arange(6).expand(2, -1)
        assert torch.equal(loaded.decoder(tokens, positions), expected.decoder(tokens, positions))
        return
    encoder, own = loaded.encoder, expected.encoder
    assert isinstance(encoder, Encoder) and isinstance(own, Encoder)
    assert torch.equal(encoder(WAVES, SAMPLES), own(WAVES, SAMPLES))
    for layer, other in zip(
        encoder.extract_all(WAVES, SAMPLES), own.extract_all(WAVES, SAMPLES), strict=True
    ):
        assert torch.equal(layer, other)


def test_any_run_can_be_loaded_as_an_encoder_alone(tmp_path: Path) -> None:
    run, hubert = make_run(tmp_path, "wordless_hubert")
    card = AssetCard(
        "mine",
        {"model_family": "wordless_encoder", "model_config": {"encoder": WAVEFORM}, "checkpoint": str(run)},
    )
    loaded = load_model(card).eval()
    assert all(name.startswith("encoder.") for name in loaded.state_dict())
    assert torch.equal(loaded(WAVES, SAMPLES), hubert.encoder(WAVES, SAMPLES))  # type: ignore[operator]


def test_a_loaded_recognizer_writes_what_ours_writes(tmp_path: Path) -> None:
    run, ours = make_run(tmp_path, "wordless_recognizer")
    loaded = load_model(card_of(run, tmp_path / "card")).eval()
    assert isinstance(loaded, Recognizer) and isinstance(ours, Recognizer)
    assert loaded.vocabulary == VOCABULARY and loaded.final_dropout == 0.2
    batch = CTCBatch.untranscribed(*pack_padded(WAVES, SAMPLES))
    assert torch.equal(loaded.logits(batch), ours.logits(batch))


def test_weights_can_be_loaded_in_half_precision(tmp_path: Path) -> None:
    run, ours = make_run(tmp_path, "wordless_hubert")
    loaded = load_model(card_of(run, tmp_path / "card"), dtype=torch.bfloat16).eval()
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    features = loaded.encoder(WAVES.bfloat16(), SAMPLES).float()  # type: ignore[operator]
    # bfloat16 has 8 bits: a relative 2^-8 per product, over two layers and a front end of seven
    assert (features - ours.encoder(WAVES, SAMPLES)).abs().mean() < 0.05  # type: ignore[operator]


def test_architectures_are_ours_and_a_card_changes_single_keys() -> None:
    families = get_dependency_resolver()
    for name, family in FAMILIES.items():
        found = families.resolve(ModelFamily, key=name)
        assert found.get_archs() == set(ARCHS)
        assert issubclass(found.kls, family.model)
    hubert = families.resolve(ModelFamily, key="wordless_hubert")
    card = AssetCard(
        "mine",
        {
            "model_family": "wordless_hubert",
            "model_arch": "large",
            "model_config": {"encoder": {"layer_drop": 0.25}},
        },
    )
    config = hubert.get_model_config(card)
    assert EncoderConfig(**config.parsed()["encoder"]) == EncoderConfig(architecture="large", layer_drop=0.25)
    assert config.num_classes == 500
    other = AssetCard(
        "mine", {"model_family": "wordless_hubert", "model_config": {"encoder": {"architecture": "xlarge"}}}
    )
    assert EncoderConfig(**hubert.get_model_config(other).parsed()["encoder"]) == EncoderConfig(
        architecture="xlarge"
    )


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("wordless_hubert", {"encoder": {"dimm": 32}}, "did you mean 'dim'"),
        ("wordless_hubert", {"num_classes": 0}, "num_classes"),
        ("wordless_wav2vec2", {"wav2vec2": {"num_entries": "many"}}, "model_config.wav2vec2: num_entries"),
        ("wordless_recognizer", {"vocabulary": {"symbols": "ab"}}, "vocabulary.symbols"),
        ("wordless_recognizer", {"vocabulary": {"spelling": "runes"}}, "vocabulary.spelling"),
        ("wordless_recognizer", {"text": {"case": "title"}}, "model_config.text: case"),
        ("wordless_unit_lm", {"pattern": "spiral"}, "model_config.pattern"),
        ("wordless_unit_lm", {"decoder": {"num_heads": 3}}, "model_config.decoder"),
    ],
)
def test_a_wrong_config_in_a_card_is_an_error_that_names_the_key(
    family: str, config: dict[str, Any], message: str
) -> None:
    found = get_dependency_resolver().resolve(ModelFamily, key=family)
    with pytest.raises(AssetCardError, match="model_config field of the mine asset card") as caught:
        found.get_model_config(AssetCard("mine", {"model_family": family, "model_config": config}))
    assert message in str(caught.value.__cause__)


def test_a_damaged_run_and_weights_of_another_model_are_errors(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, "wordless_hubert")
    card = card_of(run, tmp_path / "card", checkpoint=str(run))
    other = AssetCard(
        "mine", {**card.metadata, "model_config": {**card.metadata["model_config"], "num_classes": 10}}
    )  # type: ignore[dict-item]
    with pytest.raises(AssetCardError) as caught:
        load_model(other)
    assert "`class_embeddings` has a shape of (9, 256)" in str(caught.value.__cause__.__cause__)  # type: ignore[union-attr]
    weights = run / "step_00000007" / "model.safetensors"
    with open(weights, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    with pytest.raises(AssetCardError) as caught:
        load_model(card)
    assert "holds no checkpoint" in str(caught.value.__cause__)


def test_layers_are_recomputed_in_backward_and_give_the_same_gradients(tmp_path: Path) -> None:
    _, ours = make_run(tmp_path, "wordless_hubert")
    family = get_dependency_resolver().resolve(ModelFamily, key="wordless_hubert")
    config = FAMILIES["wordless_hubert"].config(encoder=WAVEFORM, num_classes=9)  # type: ignore[call-arg]
    hub: ModelHub[Any, Any] = ModelHub(family, None)  # type: ignore[arg-type]  # cards are not asked for
    other = hub.create_new_model(config)
    other.load_state_dict(ours.state_dict())
    other = family.apply_layerwise_ac(other, 1).eval()

    def gradients(model: Any) -> dict[str, Tensor]:
        model.zero_grad()
        model.encoder(WAVES, SAMPLES).square().sum().backward()
        return {
            name.replace("_checkpoint_wrapped_module.", ""): p.grad
            for name, p in model.named_parameters()
            if p.grad is not None
        }

    found, expected = gradients(other), gradients(ours)
    assert len(found) > 20 and found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert any("_checkpoint_wrapped_module" in name for name, _ in other.named_parameters())


def test_sharding_wraps_each_layer_and_refuses_the_stack() -> None:
    family = get_dependency_resolver().resolve(ModelFamily, key="wordless_encoder")
    model = FAMILIES["wordless_encoder"].config(encoder=WAVEFORM).build()
    wrapped: list[nn.Module] = []

    def wrap(module: nn.Module, reshard_after_forward: bool | None = None) -> nn.Module:
        wrapped.append(module)
        return module

    layers = [*model.encoder.layers]  # type: ignore[union-attr, arg-type]
    assert family.apply_fsdp(model, "layer", wrap) is model
    assert wrapped == layers
    with pytest.raises(NotSupportedError, match='sharded by "layer"'):
        family.apply_fsdp(model, "stack", wrap)


@pytest.mark.slow
def test_two_processes_load_shard_and_recompute_a_run(tmp_path: Path) -> None:
    """fairseq2's own FSDP2 and activation checkpointing, with the gradients of one process."""
    run, _ = make_run(tmp_path, "wordless_hubert")
    with run_two_processes(
        ROOT / "tests/fairseq2/sharding_worker.py", run, logs=tmp_path / "logs", timeout=200
    ):
        pass


def test_the_extension_never_breaks_fairseq2(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A TypeError of an extension would end fairseq2's start; a room of ours may lack a library."""

    def missing(container: Any) -> None:
        raise TypeError("no such argument")

    monkeypatch.setattr(extension, "_register_families", missing)
    container = DependencyContainer()
    extension.register(container)
    assert not [*container.iter_keys(ModelFamily)]
    assert "wordless: its model families are not registered (TypeError: no such argument)" in caplog.text


@pytest.mark.parametrize(
    "order", [(extension.register, register_units), (register_units, extension.register)]
)
def test_the_order_of_the_entry_points_and_registering_twice_do_not_matter(order: Any) -> None:
    container = DependencyContainer()
    for each in (*order, *order):
        each(container)
    assert sorted(map(str, container.iter_keys(ModelFamily))) == sorted([*FAMILIES, UNIT_LM])


PROGRAM = """
import sys, torch
from fairseq2.models import load_model
model = load_model("my_hubert").eval()
print(type(model).__module__, model.encoder(torch.zeros(1, 800), torch.tensor([800])).shape[2])
print([name for name in ("faiss", "quantize", "submitit", "typer", "matplotlib") if name in sys.modules])
"""


@pytest.mark.slow
def test_fairseq2_itself_loads_a_run_by_name_through_the_entry_point(tmp_path: Path) -> None:
    """In a process of its own, as a user of fairseq2 has it: no import of ours, the card on
    FAIRSEQ2_ASSET_DIR."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][
        "fairseq2.extension"
    ]
    for target in declared.values():
        module, _, name = target.partition(":")
        assert callable(getattr(import_module(module), name))
    search = [str(ROOT)]
    # not installed here
    if not {entry.value for entry in entry_points(group="fairseq2.extension")} >= set(declared.values()):
        info = tmp_path / "site" / "wordless_from_source-0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: wordless-from-source\nVersion: 0\n")
        lines = [f"{name} = {target}" for name, target in declared.items()]
        (info / "entry_points.txt").write_text("\n".join(["[fairseq2.extension]", *lines]))
        search.append(str(info.parent))
    run, _ = make_run(tmp_path, "wordless_hubert")
    cards = tmp_path / "cards"
    card_of(run, cards / "my_hubert")
    environment = {**os.environ, "FAIRSEQ2_ASSET_DIR": str(cards), "PYTHONPATH": os.pathsep.join(search)}
    environment["FAIRSEQ2_EXTENSION_TRACE"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["pretrain.objectives.hubert 32", "[]"]
