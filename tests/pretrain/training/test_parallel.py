import pytest
import torch

from pretrain.training.parallel import World, resolve_device


def test_auto_is_a_gpu_where_there_is_one() -> None:
    assert resolve_device("auto") == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["foo", "", "cuda:99", "meta", "cpu:7"])
def test_a_device_that_is_not_here_is_refused_with_its_key_and_what_there_is(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^training\.device: '{name}' is not here; torch .* has cpu"):
        World.join(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_is_refused_where_there_is_none() -> None:
    with pytest.raises(ValueError, match=r"^device: 'cuda' is not here; torch .* has cpu"):
        resolve_device("cuda")


def test_gpus_are_known_with_and_without_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda")
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(
        ValueError, match="device: 'cuda:2' is not here; torch .* has cpu, cuda, cuda:0, cuda:1"
    ):
        resolve_device("cuda:2")
