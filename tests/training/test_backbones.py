"""Frozen backbones, the features that they make of images, and heads on them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hmn_replay
from hmn_replay import FeatureClassifier, FrozenBackbone, LabelledImages, extract_features
from hmn_replay.errors import ConfigError, DataError, MissingExtraError

needs_timm = pytest.mark.skipif(find_spec("timm") is None, reason="needs the extra timm")
SHAPE = (3, 8, 8)


class Moody(nn.Module):
    """Gives maps that depend on batch statistics and dropout in training, and not in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(
                nn.Conv2d(3, 5, 3, 2, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(0.5)
            )

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.body(images)
        return found


def test_features_are_those_of_the_network_in_evaluation_mode(
    make_set: Callable[..., LabelledImages], untouched_random_state: None
) -> None:
    data, network = make_set(num_images=11), Moody()
    network.body[0].weight.requires_grad_(False)
    wanted = Moody().eval()(data.floats()).detach()
    maps = extract_features(network, data, maps=True, batch_size=4)
    torch.testing.assert_close(maps.images, wanted)
    assert maps.labels.equal(data.labels) and maps.image_shape == (5, 4, 4)
    vectors = extract_features(network, data)
    torch.testing.assert_close(vectors.images, wanted.mean(dim=(2, 3), keepdim=True))
    # It is as it was.
    assert all(module.training for module in network.modules())
    learns = [parameter.requires_grad for parameter in network.parameters()]
    assert learns == [False, True, True, True]
    doubled = extract_features(network, data, transform=lambda images: 2 * images)
    torch.testing.assert_close(
        doubled.images,
        Moody().eval()(2 * data.floats()).detach().mean(dim=(2, 3), keepdim=True),
    )


def test_the_default_dtype_does_not_matter(make_set: Callable[..., LabelledImages]) -> None:
    data, network = make_set(num_images=4), Moody()
    expected = extract_features(network, data)
    torch.set_default_dtype(torch.float64)
    try:
        found = extract_features(network, data)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.images.dtype == torch.float32 and found.images.equal(expected.images)


def test_a_trained_network_is_a_backbone_up_to_its_last_block(
    make_set: Callable[..., LabelledImages],
) -> None:
    data = make_set()
    network = hmn_replay.build_network("convnet", SHAPE, 3, width=6, mean=(0.5, 0.4, 0.3))
    backbone = FrozenBackbone(network, SHAPE, maps=True)
    assert backbone.image_shape == SHAPE and backbone.feature_shape == (6, 2, 2)
    torch.testing.assert_close(backbone(data.floats()), network.features(data.floats())[-1])
    assert FrozenBackbone(network, SHAPE).feature_shape == (6, 1, 1)
    assert not backbone.train().training and not network.training
    assert not backbone(data.floats().requires_grad_()).requires_grad


def test_only_the_head_of_a_classifier_learns_and_features_enter_behind_the_backbone(
    make_set: Callable[..., LabelledImages],
) -> None:
    data, backbone = make_set(), FrozenBackbone(Moody(), SHAPE)
    model = FeatureClassifier(backbone, hmn_replay.linear_head(backbone.feature_shape, 3)).train()
    features = extract_features(backbone, data)
    torch.testing.assert_close(model(data.floats()), model(features.images))
    learned = [name for name, own in model.named_parameters() if own.requires_grad]
    assert learned == ["head.1.weight", "head.1.bias"] and not backbone.network.training
    with pytest.raises(DataError, match=r"images of \(3, 8, 8\) or features of \(5, 1, 1\), got"):
        model(torch.zeros(2, 3, 9, 9))


def test_what_is_no_backbone_is_refused(make_set: Callable[..., LabelledImages]) -> None:
    tokens = nn.Sequential(nn.Flatten(2))
    with pytest.raises(ConfigError, match=r"features \(N, C\) or \(N, C, H, W\), got \(1, 3, 64\)"):
        FrozenBackbone(tokens, SHAPE)
    with pytest.raises(ConfigError, match=r"features have the shape .* of images"):
        FrozenBackbone(nn.Identity(), SHAPE, maps=True)
    data = make_set()
    with pytest.raises(DataError, match="got features already"):
        extract_features(Moody(), extract_features(Moody(), data))
    with pytest.raises(ConfigError, match="batch_size is a whole number of 1 or more; got 0"):
        extract_features(Moody(), data, batch_size=0)


@needs_timm
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_timms_networks_give_what_their_last_layer_sees(name: str) -> None:
    backbone = hmn_replay.load_backbone(f"timm:{name}", (3, 32, 32), seed=1)
    network: Any = backbone.network
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    vectors = backbone(images)
    assert vectors.shape == (2, *backbone.feature_shape) and backbone.feature_shape[1:] == (1, 1)
    model = network.body.model
    # The weights' own normalisation.
    config = model.pretrained_cfg
    assert network.mean.flatten().tolist() == pytest.approx(list(config["mean"]))
    normal = (images - network.mean) / network.std
    logits = model.get_classifier()(vectors.flatten(1))
    torch.testing.assert_close(logits, model(normal))
    grey = hmn_replay.load_backbone(f"timm:{name}", (1, 32, 32), std=[0.25])
    assert grey.network.std.flatten().tolist() == [0.25]  # type: ignore[operator]


@needs_timm
def test_weights_are_those_that_timm_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    made: list[dict[str, Any]] = []
    build = timm.create_model

    def create(name: str, **options: Any) -> nn.Module:
        made.append(options)
        network: nn.Module = build(name, **{**options, "pretrained": False})
        return network

    monkeypatch.setattr(timm, "create_model", create)
    backbone = hmn_replay.load_backbone("timm-pretrained:test_resnet", (3, 32, 32), maps=True)
    assert made[0]["pretrained"] is True and backbone.feature_shape[1] >= 1


def test_without_timm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'hmn-replay\[timm\]'"):
        hmn_replay.load_backbone("timm-pretrained:resnet18", (3, 32, 32))


def test_a_network_that_gives_no_features_stays_as_it_was() -> None:
    network = nn.Sequential(nn.Flatten(0), nn.Linear(192, 2))
    with pytest.raises(ConfigError, match="expected a backbone"):
        FrozenBackbone(network, SHAPE)
    assert network.training and all(each.requires_grad for each in network.parameters())
    frozen = FrozenBackbone(nn.Flatten(), SHAPE)
    assert not frozen.network.training
