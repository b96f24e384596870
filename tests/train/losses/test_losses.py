from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress import plugins
from compress.errors import UsageError
from compress.train.losses import Taps

NAMES = plugins.names("losses")
LABELS = torch.arange(60) % 5


def taps(seed: int, needs: str, *, channels: int = 6, batch: int = 8, grad: bool = False) -> Taps:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_(grad)

    features: dict[str, tuple[Tensor, ...]] = {
        "logits": (),
        "embedding": (random(batch, channels),),
        "last": (random(batch, channels, 4, 4),),
        "stages": (random(batch, channels, 8, 8), random(batch, channels, 4, 4)),
        "necks": (random(batch, channels, 8, 8), random(batch, channels, 4, 4)),
    }
    index = torch.arange(batch)
    return Taps(random(batch, 5), features[needs], index)


def needs_of(name: str) -> str:
    return getattr(plugins.plugin_class("losses", name), "needs", "logits")


def loss_of(name: str, student: Taps, teacher: Taps, **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss = plugins.create("losses", {name: options})
        if hasattr(loss, "prepare"):
            loss.prepare(student, teacher, LABELS)
    return loss


def both(name: str, **kwargs: Any) -> tuple[Taps, Taps]:
    return taps(1, needs_of(name), **kwargs), taps(2, needs_of(name), channels=10)


def value(name: str, student: Taps, teacher: Taps, **options: Any) -> Tensor:
    loss = loss_of(name, student, teacher, **options)
    torch.manual_seed(7)  # masks and negatives
    return loss(student, teacher, student.index % 5)


def detached(part: Taps) -> Taps:
    return Taps(part.logits.detach(), tuple(f.detach() for f in part.features), part.index)


# -- contract: holds for every file in the folder ------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_is_a_finite_scalar_whose_gradient_reaches_the_student(name: str):
    student, teacher = both(name, grad=True)
    teacher = detached(teacher)
    out = value(name, student, teacher)
    assert out.shape == ()
    assert torch.isfinite(out)
    out.backward()
    watched = student.features or (student.logits,)
    for tensor in watched:
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()
        assert tensor.grad.abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_is_finite_under_half_precision_autocast_and_for_large_inputs(name: str):
    student, teacher = both(name)
    student = Taps(
        30 * student.logits.half(), tuple(10 * f.half() for f in student.features), student.index
    )
    teacher = Taps(
        30 * teacher.logits.half(), tuple(10 * f.half() for f in teacher.features), teacher.index
    )
    loss = loss_of(name, *both(name))
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype):
            assert torch.isfinite(loss(student, teacher, student.index % 5))


@pytest.mark.parametrize("name", NAMES)
def test_is_a_mean_over_images_unless_relational(name: str):
    if getattr(plugins.plugin_class("losses", name), "relational", False):
        pytest.skip("compares images with each other")
    student, teacher = both(name)
    loss = loss_of(name, student, teacher, **({"mask": 0.0} if name == "mgd" else {}))
    target = student.index % 5

    def twice(part: Taps) -> Taps:
        features = tuple(torch.cat([f, f]) for f in part.features)
        return Taps(torch.cat([part.logits] * 2), features, torch.cat([part.index] * 2))

    once = loss(student, teacher, target)
    doubled = loss(twice(student), twice(teacher), torch.cat([target, target]))
    torch.testing.assert_close(once, doubled)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "nkd"])
def test_is_least_when_student_and_teacher_agree_unless_it_has_adapters(name: str):
    student = taps(1, needs_of(name), grad=True)
    teacher = detached(student)
    loss = loss_of(name, student, teacher)
    if isinstance(loss, nn.Module):
        pytest.skip("maps the student's features first")
    out = loss(student, teacher, student.index % 5)
    assert abs(float(out.detach())) < 1e-5
    out.backward()
    for tensor in student.features or (student.logits,):
        assert tensor.grad.abs().max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_adapters_learn_to_lower_the_loss(name: str):
    student, teacher = both(name)
    loss = loss_of(name, student, teacher)
    if not isinstance(loss, nn.Module):
        pytest.skip("has no adapters")
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
    seen = []
    for _ in range(60):
        optimizer.zero_grad()
        torch.manual_seed(0)
        out = loss(student, teacher, student.index % 5)
        out.backward()
        optimizer.step()
        seen.append(float(out.detach()))
    assert seen[-1] < seen[0]


@pytest.mark.parametrize("name", NAMES)
def test_documentation_names_its_source(name: str):
    text = plugins.documentation("losses", name)
    assert "Source:" in text
    assert "https://" in text
    weight = plugins.plugin_class("losses", name).weight
    assert weight > 0


# -- logits: closed cases and independent formulas ---------------------------------------------


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def numpy_pair() -> tuple[Taps, Taps, np.ndarray, np.ndarray, np.ndarray]:
    student, teacher = both("kd")
    target = (student.index % 5).numpy()
    return student, teacher, student.logits.numpy(), teacher.logits.numpy(), target


def test_kd_equals_the_divergence_written_out():
    student, teacher, s, t, _ = numpy_pair()
    p, q = softmax(t / 3), softmax(s / 3)
    expected = 9 * (p * np.log(p / q)).sum(1).mean()
    assert float(value("kd", student, teacher, temperature=3.0)) == pytest.approx(
        expected, rel=1e-5
    )


def test_kd_at_high_temperature_is_half_the_squared_difference_of_centred_logits():
    student, teacher, s, t, _ = numpy_pair()
    s, t = s - s.mean(1, keepdims=True), t - t.mean(1, keepdims=True)
    expected = ((s - t) ** 2).sum(1).mean() / (2 * 5)
    out = value("kd", student, teacher, temperature=200.0)
    assert float(out) == pytest.approx(expected, rel=0.02)


def test_dkd_with_the_weights_of_its_identity_is_kd():
    # KL = KL(binary) + (1 - p_target) KL(others), per image
    student, teacher, s, t, target = numpy_pair()
    rows = np.arange(len(target))
    p, q = softmax(t / 4), softmax(s / 4)
    binary = p[rows, target] * np.log(p[rows, target] / q[rows, target])
    rest_p, rest_q = 1 - p[rows, target], 1 - q[rows, target]
    binary += rest_p * np.log(rest_p / rest_q)
    keep = np.ones_like(p, dtype=bool)
    keep[rows, target] = False
    others_p = p[keep].reshape(len(p), -1) / rest_p[:, None]
    others_q = q[keep].reshape(len(q), -1) / rest_q[:, None]
    others = (others_p * np.log(others_p / others_q)).sum(1)
    whole = (p * np.log(p / q)).sum(1)
    np.testing.assert_allclose(binary + rest_p * others, whole, rtol=1e-4)  # the identity itself
    alone = float(value("dkd", student, teacher, alpha=1.0, beta=0.0))
    assert alone == pytest.approx(16 * binary.mean(), rel=1e-4)
    alone = float(value("dkd", student, teacher, alpha=0.0, beta=1.0))
    assert alone == pytest.approx(16 * others.mean(), rel=1e-4)


def test_dist_equals_correlations_by_numpy():
    student, teacher, s, t, _ = numpy_pair()
    p, q = softmax(t), softmax(s)
    within = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    between = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    out = value("dist", student, teacher, beta=2.0, gamma=0.5)
    assert float(out) == pytest.approx(2 * within + 0.5 * between, rel=1e-4)


def test_nkd_equals_its_formula_image_by_image():
    student, teacher, s, t, target = numpy_pair()
    total = 0.0
    for row, label in enumerate(target):
        p, q = softmax(t[row : row + 1])[0], softmax(s[row : row + 1])[0]
        total -= p[label] * math.log(q[label])
        others = [k for k in range(5) if k != label]
        p2, q2 = softmax(t[row : row + 1, others] / 2)[0], softmax(s[row : row + 1, others] / 2)[0]
        total -= 1.5 * 4 * float((p2 * np.log(q2)).sum())
    out = value("nkd", student, teacher, gamma=1.5, temperature=2.0)
    assert float(out) == pytest.approx(total / len(target), rel=1e-5)


@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "nkd"])
def test_standardized_logits_make_scale_and_shift_irrelevant(name: str):
    student, teacher, *_ = numpy_pair()
    scaled = Taps(3.5 * student.logits + 2.0, (), student.index)
    plain = value(name, student, teacher, standardize=True)
    torch.testing.assert_close(plain, value(name, scaled, teacher, standardize=True))
    assert not torch.isclose(value(name, student, teacher), value(name, scaled, teacher))


@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "nkd"])
def test_a_temperature_of_zero_is_refused(name: str):
    with pytest.raises(UsageError, match=r"temperature 0.0 must be above 0"):
        plugins.create("losses", {name: {"temperature": 0}})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vid", {"floor": 0.0}, "variance 5.0 must be above floor 0.0 above 0"),
        ("mgd", {"mask": 1.0}, r"mask 1.0 must be in \[0, 1\)"),
        ("crd", {"negatives": 0}, "must be above 0"),
    ],
)
def test_impossible_options_are_refused(name: str, options: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        plugins.create("losses", {name: options})


# -- features ------------------------------------------------------------------------------------


def features_of(*arrays: Any) -> Taps:
    tensors = tuple(torch.as_tensor(np.asarray(a), dtype=torch.float32) for a in arrays)
    batch = len(tensors[0])
    return Taps(torch.zeros(batch, 5), tensors, torch.arange(batch))


def random_array(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def test_attention_equals_its_formula_by_numpy():
    a, b = random_array(1, 4, 3, 5, 5), random_array(2, 4, 7, 5, 5)

    def attend(x: np.ndarray) -> np.ndarray:
        strength = (x**2).mean(1).reshape(len(x), -1)
        return strength / np.linalg.norm(strength, axis=1, keepdims=True)

    expected = ((attend(a) - attend(b)) ** 2).mean()
    out = value("attention", features_of(a), features_of(b))
    assert float(out) == pytest.approx(expected, rel=1e-4)


def test_attention_ignores_how_many_channels_say_the_same():
    a, b = random_array(1, 4, 3, 5, 5), random_array(2, 4, 7, 5, 5)
    out = value("attention", features_of(a), features_of(b))
    wider = value("attention", features_of(np.tile(a, (1, 4, 1, 1))), features_of(b))
    torch.testing.assert_close(out, wider)


def test_sp_equals_its_formula_by_numpy_and_ignores_rotations_of_channels():
    a, b = random_array(1, 4, 3, 2, 2), random_array(2, 4, 7, 2, 2)

    def alike(x: np.ndarray) -> np.ndarray:
        gram = x.reshape(len(x), -1) @ x.reshape(len(x), -1).T
        return gram / np.linalg.norm(gram, axis=1, keepdims=True)

    expected = ((alike(a) - alike(b)) ** 2).sum() / 16
    assert float(value("sp", features_of(a), features_of(b))) == pytest.approx(expected, rel=1e-4)
    turned = a[:, [2, 0, 1]] * np.array([1, -1, 1])[:, None, None]
    assert float(value("sp", features_of(turned), features_of(b))) == pytest.approx(expected, 1e-4)


def test_rkd_equals_sums_over_pairs_and_triples():
    a, b = random_array(1, 5, 3), random_array(2, 5, 4)

    def huber(x: float) -> float:
        return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5

    def distances(x: np.ndarray) -> np.ndarray:
        d = np.linalg.norm(x[:, None] - x[None], axis=2)
        return d / d[~np.eye(len(x), dtype=bool)].mean()

    def angle(x: np.ndarray, i: int, j: int, k: int) -> float:
        u, v = x[j] - x[i], x[k] - x[i]
        lengths = np.linalg.norm(u) * np.linalg.norm(v)
        return float(u @ v / lengths) if lengths else 0.0

    pairs = np.mean([huber(x) for x in (distances(a) - distances(b)).flatten()])
    triples = np.mean(
        [
            huber(angle(a, i, j, k) - angle(b, i, j, k))
            for i, j, k in itertools.product(range(5), repeat=3)
        ]
    )
    out = value("rkd", features_of(a), features_of(b), distance=2.0, angle=3.0)
    assert float(out) == pytest.approx(2 * pairs + 3 * triples, rel=1e-4)


def test_rkd_ignores_scale_shift_and_rotation():
    a = random_array(1, 6, 4)
    rotation, _ = np.linalg.qr(random_array(3, 4, 4))
    moved = 2.5 * a @ rotation + 1.0
    assert float(value("rkd", features_of(a), features_of(moved))) == pytest.approx(0, abs=1e-5)


def test_pkt_equals_its_formula_by_numpy():
    a, b = random_array(1, 5, 3), random_array(2, 5, 4)

    def probabilities(x: np.ndarray) -> np.ndarray:
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        close = (x @ x.T + 1) / 2
        return close / close.sum(1, keepdims=True)

    q, p = probabilities(a), probabilities(b)
    expected = (p * np.log((p + 1e-7) / (q + 1e-7))).mean()
    assert float(value("pkt", features_of(a), features_of(b))) == pytest.approx(expected, rel=1e-3)


def test_hint_is_the_squared_difference_once_the_map_is_the_identity():
    a, b = random_array(1, 4, 3, 5, 5), random_array(2, 4, 3, 5, 5)
    student, teacher = features_of(a), features_of(b)
    loss = loss_of("hint", student, teacher)
    with torch.no_grad():
        loss.maps[0].weight.copy_(torch.eye(3)[:, :, None, None])
        loss.maps[0].bias.zero_()
    expected = ((a - b) ** 2).mean()
    assert loss(student, teacher, student.index).item() == pytest.approx(expected, rel=1e-5)


def test_hint_brings_features_of_different_size_to_the_smaller_one():
    student, teacher = (
        features_of(random_array(1, 2, 3, 8, 8)),
        features_of(random_array(2, 2, 4, 4, 4)),
    )
    loss = loss_of("hint", student, teacher)
    mapped = F.adaptive_avg_pool2d(loss.maps[0](student.features[0]), 4)
    expected = (mapped - teacher.features[0]).square().mean()
    torch.testing.assert_close(loss(student, teacher, student.index), expected)


def test_vid_is_the_gaussian_likelihood_of_torch():
    student, teacher = (
        features_of(random_array(1, 4, 3, 5, 5)),
        features_of(random_array(2, 4, 6, 5, 5)),
    )
    loss = loss_of("vid", student, teacher, variance=2.0)
    mean = loss.means[0](student.features[0])
    expected = nn.GaussianNLLLoss()(mean, teacher.features[0], torch.full_like(mean, 2.0))
    torch.testing.assert_close(loss(student, teacher, student.index), expected)


def test_mgd_without_a_mask_generates_from_the_whole_feature():
    student, teacher = (
        features_of(random_array(1, 4, 3, 5, 5)),
        features_of(random_array(2, 4, 6, 5, 5)),
    )
    loss = loss_of("mgd", student, teacher, mask=0.0)
    out = loss.generators[0](loss.maps[0](student.features[0]))
    expected = (out - teacher.features[0]).square().sum() / 4
    torch.testing.assert_close(loss(student, teacher, student.index), expected)


def test_mgd_masks_the_wanted_share_of_places():
    student, teacher = features_of(np.ones((8, 2, 32, 32))), features_of(np.ones((8, 2, 32, 32)))
    loss = loss_of("mgd", student, teacher, mask=0.3)
    seen: list[Tensor] = []
    loss.generators[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    loss(student, teacher, student.index)
    blank = (seen[0] == 0).all(1).float().mean()
    assert abs(float(blank) - 0.3) < 0.02


def test_reviewkd_with_one_stage_is_a_map_and_a_pyramid_of_means():
    student, teacher = (
        features_of(random_array(1, 4, 3, 8, 8)),
        features_of(random_array(2, 4, 6, 8, 8)),
    )
    loss = loss_of("reviewkd", student, teacher)
    fusion = loss.fusions[0]
    mapped = fusion.leave(fusion.enter(student.features[0]))
    wanted = teacher.features[0]
    levels = [(mapped, wanted)]
    for size in (4, 2, 1):
        block = 8 // size
        levels.append(
            tuple(
                x.unfold(2, block, block).unfold(3, block, block).mean((4, 5))
                for x in (mapped, wanted)
            )
        )
    weights = [1, 1 / 2, 1 / 4, 1 / 8]
    expected = sum(
        w * (x - y).square().mean() for w, (x, y) in zip(weights, levels, strict=True)
    ) / sum(weights)
    torch.testing.assert_close(loss(student, teacher, student.index), expected)


def test_reviewkd_passes_what_deep_stages_know_to_shallow_ones():
    student, teacher = taps(1, "stages", grad=True), taps(2, "stages", channels=10)
    loss = loss_of("reviewkd", student, teacher)
    only_shallow = torch.autograd.grad(
        loss.fusions[1](student.features[0], loss.fusions[0].enter(student.features[1]), (8, 8))[
            0
        ].sum(),
        student.features[1],
    )[0]
    assert only_shallow.abs().sum() > 0


def test_crd_equals_its_formula_by_numpy():
    student, teacher = features_of(random_array(1, 6, 3)), features_of(random_array(2, 6, 4))
    loss = loss_of("crd", student, teacher, size=8, negatives=10)
    drawn = torch.randint(0, 60, (6, 11), generator=torch.Generator().manual_seed(3))
    drawn[:, 0] = torch.arange(6)
    loss._other_classes = lambda target: drawn[:, 1:]
    s = F.normalize(loss.student_map(student.features[0])).detach().numpy()
    t = F.normalize(loss.teacher_map(teacher.features[0])).detach().numpy()
    memories = loss.student_memory.numpy().copy(), loss.teacher_memory.numpy().copy()
    expected = 0.0
    for vectors, memory in ((s, memories[1]), (t, memories[0])):
        h = np.exp(np.einsum("bkd,bd->bk", memory[drawn.numpy()], vectors) / 0.07)
        h = h / (h.mean() * 60)
        noise = 10 / 60
        expected -= np.log(h[:, 0] / (h[:, 0] + noise)).mean()
        expected -= np.log(noise / (h[:, 1:] + noise)).sum(1).mean()
    out = loss(student, teacher, torch.arange(6) % 5)
    assert float(out) == pytest.approx(expected, rel=1e-4)
    loss.remember()
    moved = 0.5 * memories[0][:6] + 0.5 * s
    moved /= np.linalg.norm(moved, axis=1, keepdims=True)
    np.testing.assert_allclose(loss.student_memory[:6].numpy(), moved, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(loss.student_memory[6:].numpy(), memories[0][6:])


@pytest.mark.parametrize("size", [2, 64])  # products with gathered vectors, and with all
def test_crd_takes_either_way_to_the_products(size: int):
    student, teacher = features_of(random_array(1, 6, 3)), features_of(random_array(2, 6, 4))
    loss = loss_of("crd", student, teacher, size=size, negatives=5)
    x = F.normalize(torch.randn(6, size))
    drawn = torch.randint(0, 60, (6, 6))
    out = loss._contrast(x, loss.student_memory, drawn, 0)
    products = torch.stack([loss.student_memory[row] @ v for row, v in zip(drawn, x, strict=True)])
    h = (products / 0.07).exp()
    h = h / (h.mean() * 60)
    expected = -(h[:, 0] / (h[:, 0] + 5 / 60)).log().mean()
    expected -= (5 / 60 / (h[:, 1:] + 5 / 60)).log().sum(1).mean()
    torch.testing.assert_close(out, expected)


def test_crd_draws_every_image_of_other_classes_equally_often_and_none_of_the_own():
    student, teacher = features_of(random_array(1, 6, 3)), features_of(random_array(2, 6, 4))
    loss = loss_of("crd", student, teacher, negatives=24_000)
    drawn = loss._other_classes(torch.tensor([2]))[0]
    counts = drawn.bincount(minlength=60)
    assert (counts[LABELS == 2] == 0).all()
    others = counts[LABELS != 2]
    assert others.min() > 400
    assert others.max() < 600
