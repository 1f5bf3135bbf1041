"""Trajectory matching, against a student's whole training in one graph, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmn_replay.data.augment import draw_augmentation
from hmn_replay.errors import ConfigError
from hmn_replay.objectives.trajectories import trajectory_matching
from hmn_replay.training.networks import build_network

pytestmark = pytest.mark.usefixtures("untouched_random_state")


class Scene(NamedTuple):
    """What trajectory_matching takes, in its order."""

    network: nn.Module
    start: dict[str, Tensor]
    target: dict[str, Tensor]
    images: Tensor
    labels: Tensor
    batches: list[Tensor]
    rate: Tensor


def make_scene(network: nn.Module | None = None, num_images: int = 7, seed: int = 0) -> Scene:
    """Make a scene in which image 0 comes twice, the last one never, and batches differ in size."""
    if network is None:
        statistics: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
        network = build_network("convnet", (3, 8, 8), 3, width=4, depth=2, **statistics)
    network.double()
    generator = torch.Generator().manual_seed(seed)

    def near(value: Tensor) -> Tensor:
        noise = torch.randn(value.shape, generator=generator, dtype=torch.double)
        return value.detach() + 0.1 * noise

    start = {name: near(value) for name, value in network.named_parameters()}
    return Scene(
        network,
        start,
        {name: near(value) for name, value in start.items()},
        torch.rand(num_images, 3, 8, 8, generator=generator, dtype=torch.double),
        torch.randint(3, (num_images,), generator=generator),
        [torch.tensor([0, 3]), torch.tensor([4, 2, 1]), torch.tensor([5, 0])],
        torch.tensor(0.3, dtype=torch.double),
    )


def written_out(
    scene: Scene, augmentations: list[Callable[[Tensor], Tensor]] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and both gradients, with the student's training in one graph."""
    images = scene.images.clone().requires_grad_()
    rate = scene.rate.clone().requires_grad_()
    parameters = {name: value.clone().requires_grad_() for name, value in scene.start.items()}
    for step, batch in enumerate(scene.batches):
        chosen = torch.stack([images[i] for i in batch.tolist()])
        if augmentations is not None:
            chosen = augmentations[step](chosen)
        logits = torch.func.functional_call(copy.deepcopy(scene.network), parameters, (chosen,))
        labels = scene.labels[batch]
        loss = (logits.logsumexp(dim=1) - logits[torch.arange(len(batch)), labels]).mean()
        gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        parameters = {
            name: value - rate * gradient
            for (name, value), gradient in zip(parameters.items(), gradients, strict=True)
        }
    missed, moved = torch.zeros(()).double(), torch.zeros(()).double()
    for name, value in parameters.items():
        missed = missed + ((value - scene.target[name]) ** 2).sum()
        moved = moved + ((scene.start[name] - scene.target[name]) ** 2).sum()
    loss = missed / moved
    of_images, of_rate = torch.autograd.grad(loss, [images, rate])
    return loss.detach(), of_images, of_rate


def differentiate(
    scene: Scene, augmentations: list[Callable[[Tensor], Tensor]] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, and its gradients to the decoded images and to the learning rate."""
    images, rate = scene.images.clone().requires_grad_(), scene.rate.clone().requires_grad_()
    loss = trajectory_matching(*scene._replace(images=images, rate=rate), augmentations)
    of_images, of_rate = torch.autograd.grad(loss, [images, rate])
    return loss.detach(), of_images, of_rate


def some_augmentations(number: int) -> list[Callable[[Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(3)
    names = ("color", "crop", "cutout", "rotate")
    return [draw_augmentation(names, (8, 8), generator) for _ in range(number)]


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, two in zip(actual, expected, strict=True):
        assert one.shape == two.shape
        assert float((one - two).norm()) <= 1e-9 * float(two.norm())
        assert float(two.norm()) > 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_it_equals_a_training_in_one_graph(seed: int) -> None:
    scene = make_scene(seed=seed)
    assert_same(differentiate(scene), written_out(scene))


def test_it_goes_through_augmentations_of_each_step() -> None:
    scene, augmentations = make_scene(), some_augmentations(3)
    found = differentiate(scene, augmentations)
    assert_same(found, written_out(scene, augmentations))
    assert not torch.allclose(found[1], differentiate(scene)[1])


def test_it_goes_through_batch_normalisation() -> None:
    with torch.random.fork_rng():
        network = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 3)
        )
    scene = make_scene(network)
    state = copy.deepcopy(network.state_dict())
    assert_same(differentiate(scene), written_out(scene))
    assert all(value.equal(state[name]) for name, value in network.state_dict().items())
    network.eval()
    assert_same(differentiate(scene), written_out(scene))


class Dropping(nn.Module):
    """Drops by a layer and by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(192, 12), nn.Linear(12, 3)
        self.drop = nn.Dropout(0.3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.drop(self.hidden(images.flatten(1)).tanh())
        logits: Tensor = self.head(F.dropout(hidden, 0.3))
        return logits


def test_it_goes_through_the_same_dropout_twice() -> None:
    found = []
    for function in (differentiate, written_out):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(5)
            scene = make_scene(Dropping())
            found.append((function(scene), torch.rand(2)))
    (actual, next_drawn), (expected, wanted_next) = found
    assert_same(actual, expected)
    assert next_drawn.equal(wanted_next)


def test_both_gradients_are_the_slopes_of_the_loss() -> None:
    scene = make_scene()
    _, of_images, of_rate = differentiate(scene)
    generator = torch.Generator().manual_seed(7)
    for _ in range(3):
        step = 1e-6 * torch.randn(scene.images.shape, generator=generator, dtype=torch.double)
        up, down = (
            trajectory_matching(*scene._replace(images=scene.images + sign * step))
            for sign in (1, -1)
        )
        assert float(up - down) / 2 == pytest.approx(float((of_images * step).sum()), rel=1e-5)
    up, down = (trajectory_matching(*scene._replace(rate=scene.rate + e)) for e in (1e-6, -1e-6))
    assert float(up - down) / 2e-6 == pytest.approx(float(of_rate), rel=1e-6)


def test_an_image_that_no_batch_has_gets_no_gradient() -> None:
    _, gradient, _ = differentiate(make_scene())
    assert gradient.flatten(1).any(dim=1).tolist() == [True] * 6 + [False]


def test_a_student_of_the_experts_own_batches_is_matched_perfectly() -> None:
    scene = make_scene()
    expert = copy.deepcopy(scene.network)
    expert.load_state_dict({**expert.state_dict(), **scene.start})
    optimizer = torch.optim.SGD(expert.parameters(), lr=float(scene.rate))
    for batch in scene.batches:
        optimizer.zero_grad()
        F.cross_entropy(expert(scene.images[batch]), scene.labels[batch]).backward()
        optimizer.step()
    target = {name: value.detach() for name, value in expert.named_parameters()}
    loss, of_images, of_rate = differentiate(scene._replace(target=target))
    assert float(loss) < 1e-25
    assert float(of_images.abs().max()) < 1e-10
    assert abs(float(of_rate)) < 1e-10


def test_without_a_step_the_loss_is_1() -> None:
    loss, of_images, of_rate = differentiate(make_scene()._replace(batches=[]))
    assert (float(loss), float(of_rate)) == (1.0, 0.0)
    assert not of_images.any()


def test_where_neither_has_moved_nothing_is_to_learn() -> None:
    scene = make_scene()
    found = differentiate(scene._replace(target=scene.start, batches=[]))
    assert all(not value.any() for value in found)


def test_the_rate_may_be_a_number() -> None:
    scene = make_scene()
    images = scene.images.clone().requires_grad_()
    loss = trajectory_matching(*scene._replace(images=images)[:-1], float(scene.rate))
    (gradient,) = torch.autograd.grad(loss, images)
    assert_same((loss.detach(), gradient), differentiate(scene)[:2])


@pytest.mark.parametrize("training", [False, True])
def test_all_that_comes_in_is_left_as_it_was(training: bool) -> None:
    scene = make_scene()
    scene.network.train(training)
    scene.network.requires_grad_(False)
    scene.network.get_parameter("body.head.1.bias").requires_grad_()
    before = copy.deepcopy(scene)
    for value in (scene.images, scene.rate, *scene.start.values()):
        value.requires_grad_()
    with torch.no_grad():
        without = trajectory_matching(*scene)
        assert not torch.is_grad_enabled()
    assert not without.requires_grad
    loss = trajectory_matching(*scene)
    assert loss.equal(without)
    torch.autograd.grad(loss, [scene.images, scene.rate])
    assert all(value.grad is None for value in (scene.images, scene.rate, *scene.start.values()))
    assert all(module.training == training for module in scene.network.modules())
    for name, value in scene.network.named_parameters():
        assert value.grad is None
        assert value.requires_grad == (name == "body.head.1.bias")
        assert value.equal(before.network.get_parameter(name))
        assert scene.start[name].equal(before.start[name])
        assert scene.target[name].equal(before.target[name])
    assert scene.images.equal(before.images)


class Kept:
    """A tensor that a graph keeps, counted as long as it does."""

    now, most = 0, 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        Kept.now += 1
        Kept.most = max(Kept.most, Kept.now)

    def __del__(self) -> None:
        Kept.now -= 1


def most_kept(scene: Scene, function: Callable[[Scene], Any]) -> int:
    """Return how many tensors the graphs keep at once, at most."""
    Kept.most = Kept.now = 0
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        function(scene)
    assert Kept.now == 0
    return Kept.most


def test_no_more_than_one_steps_graph_is_kept() -> None:
    scenes = [make_scene()._replace(batches=[torch.arange(3)] * number) for number in (1, 2, 8)]
    one, two, eight = (most_kept(scene, differentiate) for scene in scenes)
    assert one == two == eight > 0
    assert most_kept(scenes[2], written_out) > 5 * eight


def test_bfloat16_is_near_float32() -> None:
    scene = make_scene()
    single = scene._replace(
        network=scene.network.float(),
        start={name: value.float() for name, value in scene.start.items()},
        target={name: value.float() for name, value in scene.target.items()},
        images=scene.images.float(),
        rate=scene.rate.float(),
    )
    exact = differentiate(single)
    with torch.autocast("cpu", torch.bfloat16):
        rough = differentiate(single)
    assert float(rough[0]) == pytest.approx(float(exact[0]), rel=0.05)
    assert rough[1].dtype == torch.float32
    assert float(F.cosine_similarity(rough[1].flatten(), exact[1].flatten(), dim=0)) > 0.9
    assert float(rough[2]) == pytest.approx(float(exact[2]), rel=0.2)


def wrong_shape(scene: Scene) -> Any:
    return scene._replace(target={**scene.target, "body.head.1.bias": torch.zeros(4)})


def lacking(scene: Scene) -> Any:
    return scene._replace(
        start={name: value for name, value in scene.start.items() if name != "body.stages.1.0.bias"}
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (wrong_shape, "target must hold the parameters of Network.*'body.head.1.bias'"),
        (lacking, "start must hold the parameters of Network.*'body.stages.1.0.bias'"),
    ],
)
def test_other_parameters_are_refused(spoil: Callable[[Scene], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trajectory_matching(*spoil(make_scene()))


def test_augmentations_of_another_number_are_refused() -> None:
    with pytest.raises(ConfigError, match="one augmentation a batch, or none; got 2 for 3"):
        trajectory_matching(*make_scene(), some_augmentations(2))
