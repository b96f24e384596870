"""Detectors of torchvision as networks that return boxes before NMS, as YOLO heads do."""

from __future__ import annotations

import copy
import math
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import ModelError

SMALLEST_PROPOSAL = -1.0  # the score of proposals that NMS took out
SMALLEST_SIDE = 0.01  # pixels; boxes of Faster R-CNN below it are left out


def before_nms(model: nn.Module) -> nn.Module | None:
    """Return a network with the parts, hooks and names of ``model`` that returns (B, 4 + K, A).

    It takes a batch, (B, C, H, W) of any values. Rows are the centre and size of each box in pixels
    of the input, and the score of each class; NMS within each class is left to who reads them.
    None if ``model`` is none of torchvision's SSD, RetinaNet, FCOS and Faster R-CNN, whose own
    outputs are lists of boxes after NMS.
    """
    forward = _read_kinds().get(type(model))
    if forward is None:
        return None
    made: Any = copy.copy(model)
    made.forward = types.MethodType(forward, made)  # a copy of it is bound to the copy
    found: nn.Module = made
    return found


def _read_kinds() -> dict[type[nn.Module], Callable[[Any, Tensor], Tensor]]:
    """Return the forward before NMS for each class of detectors that has one."""
    detection: Any = sys.modules.get("torchvision.models.detection")
    if detection is None:
        return {}
    return {
        detection.ssd.SSD: _one_stage,
        detection.RetinaNet: _one_stage,
        detection.FCOS: _one_stage,
        detection.FasterRCNN: _two_stages,
    }


def on_batch(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> nn.Module:
    """Return what is to be traced or compared: ``before_nms`` where it is called with a batch."""
    is_batch = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].ndim == 4
    return (before_nms(model) if is_batch else None) or model


def check_detector(kind: type, where: str) -> None:
    """Check that ``kind``, a class of networks, is no detector that returns lists after NMS.

    Mask R-CNN and Keypoint R-CNN are told by their class, before one is built or has run.

    Raises:
        ModelError: it is; its lengths depend on the images, and no file can hold such a network.
    """
    forwards = {each.forward for each in _read_kinds()}
    if kind not in _read_kinds() and getattr(kind, "forward", None) in forwards:
        raise _after_nms("what it finds", where)


def check_rows(output: Any, where: str) -> None:
    """Check that what a network returned for a batch is no list of what was found in each image.

    Raises:
        ModelError: it is, as for ``check_detector``.
    """
    if isinstance(output, list) and output and all(isinstance(each, Mapping) for each in output):
        raise _after_nms(", ".join(map(str, output[0])), where)


def _after_nms(what: str, where: str) -> ModelError:
    return ModelError(
        f"returns {what} in each image after NMS",
        where=where,
        expected="one tensor for a batch, (B, 4 + classes, places), or torchvision's SSD, "
        "SSDlite, RetinaNet, FCOS or Faster R-CNN, whose rows before NMS are read",
        fix="Instance masks and key points are not read: take the detector without them, such "
        "as fasterrcnn_resnet50_fpn in place of maskrcnn_resnet50_fpn",
    )


def has_background(model: nn.Module) -> bool:
    """Return whether the first class of a detector of torchvision stands for no object."""
    detection: Any = sys.modules.get("torchvision.models.detection")
    return detection is not None and isinstance(model, detection.ssd.SSD | detection.FasterRCNN)


def size_inside(model: Any, images: Tensor) -> tuple[int, int] | None:
    """Return height and width that a detector of torchvision resizes images to inside.

    None where it takes them, (B, C, H, W), as they are, and for anything else.
    """
    if type(model) not in _read_kinds():
        return None
    size = _size_inside(model.transform, images)
    return None if size == tuple(images.shape[-2:]) else size


def _one_stage(network: Any, images: Tensor) -> Tensor:
    """The forward of SSD, RetinaNet or FCOS."""
    taken, size, maps = _features(network, images)
    anchors = _anchors(network.anchor_generator, taken, maps, size)
    answers = network.head(list(maps.values()))
    codes, logits = answers["bbox_regression"], answers["cls_logits"]
    if "bbox_ctrness" in answers:
        boxes = network.box_coder.decode(codes, anchors)
        scores = (logits.sigmoid() * answers["bbox_ctrness"].sigmoid()).sqrt()
    else:
        boxes = _decoded(network.box_coder, codes, anchors)
        scores = logits.softmax(2)[..., 1:] if has_background(network) else logits.sigmoid()
    return _rows(boxes, scores, images, size)


def _two_stages(network: Any, images: Tensor) -> Tensor:
    """The forward of Faster R-CNN: its first stage has an NMS, which stays; each class a box."""
    from torchvision.ops import clip_boxes_to_image

    taken, size, maps = _features(network, images)
    proposals, is_kept = _proposals(network.rpn, taken, maps, size)  # (B, P, 4), (B, P)
    pooled = _pooled(network.roi_heads.box_roi_pool, maps, proposals, size)
    logits, codes = network.roi_heads.box_predictor(network.roi_heads.box_head(pooled))
    boxes = network.roi_heads.box_coder.decode_single(codes, proposals.flatten(0, 1))
    classes, count = logits.shape[1] - 1, proposals.shape[1]
    boxes = clip_boxes_to_image(boxes.reshape(-1, count, classes + 1, 4)[:, :, 1:], size)
    is_seen = ((boxes[..., 2:] - boxes[..., :2]) >= SMALLEST_SIDE).all(3)
    scores = logits.softmax(1)[:, 1:].reshape(-1, count, classes) * is_kept[..., None] * is_seen
    own = scores[..., None] * torch.eye(classes, dtype=scores.dtype, device=scores.device)
    places = boxes.flatten(1, 2), own.flatten(1, 2)  # one for each proposal and class
    return _rows(*places, images, size)


def _features(network: Any, images: Tensor) -> tuple[Tensor, tuple[int, int], Mapping[str, Tensor]]:
    """Return the batch as the network's transform makes it, its size before padding, and maps."""
    transform = network.transform
    taken = transform.normalize(images)
    size = _size_inside(transform, taken)
    if size != taken.shape[-2:]:
        taken = F.interpolate(taken, size, mode="bilinear", align_corners=False)
    right, bottom = (-side % transform.size_divisible for side in (size[1], size[0]))
    taken = F.pad(taken, (0, right, 0, bottom))
    features = network.backbone(taken)
    return taken, size, features if isinstance(features, Mapping) else {"0": features}


def _size_inside(transform: Any, images: Tensor) -> tuple[int, int]:
    if transform.fixed_size is not None:
        return transform.fixed_size[1], transform.fixed_size[0]
    height, width = images.shape[-2:]
    scale = min(
        transform.min_size[-1] / min(height, width), transform.max_size / max(height, width)
    )
    return int(height * scale), int(width * scale)


def _rows(boxes: Tensor, scores: Tensor, images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return (B, 4 + K, A) of boxes (B, A, 4), in pixels inside, and scores (B, A, K)."""
    from torchvision.ops import clip_boxes_to_image

    height, width = images.shape[-2:]
    back = boxes.new_tensor([width / size[1], height / size[0]]).repeat(2)
    low, high = (clip_boxes_to_image(boxes, size) * back).split(2, 2)
    return torch.cat([(low + high) / 2, high - low, scores], 2).transpose(1, 2)


def _anchors(
    generator: Any, images: Tensor, maps: Mapping[str, Tensor], size: tuple[int, int]
) -> Tensor:
    """Return the anchors of one image, (A, 4)."""
    from torchvision.models.detection.image_list import ImageList

    cells = getattr(generator, "cell_anchors", None)
    if cells is None:
        found: Tensor = generator(ImageList(images[:1], [size]), list(maps.values()))[0]
        return found
    every = zip(cells, maps.values(), strict=True)  # its own forward would change its state
    return torch.cat([_grid(cell, each, images.shape[-2:]) for cell, each in every])


def _proposals(
    rpn: Any, images: Tensor, maps: Mapping[str, Tensor], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return so many boxes for each image, and which of them the first stage's NMS kept."""
    from torchvision.models.detection.rpn import concat_box_prediction_layers
    from torchvision.ops import clip_boxes_to_image, nms

    per_level, deltas = rpn.head(list(maps.values()))
    counts = [level[0].numel() for level in per_level]
    logits, codes = concat_box_prediction_layers(per_level, deltas)
    anchors = _anchors(rpn.anchor_generator, images, maps, size)
    every = sum(counts)
    boxes = _decoded(rpn.box_coder, codes.reshape(-1, every, 4), anchors)
    best, levels, start = [], [], 0
    for number, (level, found) in enumerate(
        zip(logits.reshape(-1, every).split(counts, 1), counts, strict=True)
    ):
        top = level.topk(min(rpn.pre_nms_top_n(), found), 1).indices
        best.append(top + start)
        levels += [number] * top.shape[1]
        start += found
    chosen = torch.cat(best, 1)  # (B, N)
    boxes = clip_boxes_to_image(_rows_at(boxes, chosen), size)
    scores = logits.reshape(-1, every).gather(1, chosen).sigmoid()
    sides = boxes[..., 2:] - boxes[..., :2]
    scores = torch.where((sides >= rpn.min_size).all(2), scores, SMALLEST_PROPOSAL)
    image = torch.arange(boxes.shape[0], device=boxes.device)[:, None] * len(counts)
    apart = (image + torch.tensor(levels, device=boxes.device)) * (max(size) + 1.0)
    kept = nms((boxes + apart[..., None]).flatten(0, 1), scores.flatten(), rpn.nms_thresh)
    is_kept = torch.zeros_like(scores).flatten().scatter(0, kept, 1.0).reshape(scores.shape)
    scores = torch.where(is_kept > 0, scores, SMALLEST_PROPOSAL)
    found = scores.topk(min(rpn.post_nms_top_n(), scores.shape[1]), 1)
    is_kept = (found.values >= rpn.score_thresh).to(boxes)
    # Those that NMS took out are equal in score: which of them stand here is any runtime's choice.
    return _rows_at(boxes, found.indices) * is_kept[..., None], is_kept


def _pooled(
    pool: Any, maps: Mapping[str, Tensor], proposals: Tensor, size: tuple[int, int]
) -> Tensor:
    """Return the features of each proposal from the map of its size, (B * P, C, h, w)."""
    from torchvision.ops import poolers, roi_align

    used = [value for name, value in maps.items() if name in pool.featmap_names]
    steps = [round(math.log2(size[0] / each.shape[2])) for each in used]
    mapper = poolers.initLevelMapper(
        steps[0], steps[-1], pool.canonical_scale, pool.canonical_level
    )
    flat = proposals.flatten(0, 1)
    image = torch.arange(proposals.shape[0], device=flat.device, dtype=flat.dtype)
    rois = torch.cat([image[:, None].expand(proposals.shape[:2]).reshape(-1, 1), flat], 1)
    level = mapper([flat])[:, None, None, None]
    found = [
        roi_align(each, rois, pool.output_size, 0.5**step, pool.sampling_ratio)
        for each, step in zip(used, steps, strict=True)
    ]
    out: Tensor = found[0]
    for number, each in enumerate(found[1:], 1):
        out = torch.where(level == number, each, out)
    return out


def _grid(cells: Tensor, features: Tensor, size: Sequence[int]) -> Tensor:
    """Return anchors (H * W * N, 4) for a map of images of a ``size``: ``cells`` at each place."""
    steps = [side // count for side, count in zip(size, features.shape[-2:], strict=True)]
    y, x = (
        torch.arange(count, device=features.device, dtype=features.dtype) * step
        for count, step in zip(features.shape[-2:], steps, strict=True)
    )
    shifts = torch.stack([*torch.meshgrid(x, y, indexing="xy")] * 2, 2)  # (H, W, 4)
    return (shifts.reshape(-1, 1, 4) + cells.to(features)).reshape(-1, 4)


def _decoded(coder: Any, codes: Tensor, anchors: Tensor) -> Tensor:
    """Return boxes (B, A, 4) as x1, y1, x2, y2 from codes (B, A, 4) and anchors (A, 4)."""
    every = anchors.expand(codes.shape[0], -1, -1).reshape(-1, 4)
    boxes: Tensor = coder.decode_single(codes.reshape(-1, 4), every)
    return boxes.reshape(codes.shape)


def _rows_at(boxes: Tensor, index: Tensor) -> Tensor:
    """Return the boxes (B, N, 4) of each image at ``index`` (B, M): (B, M, 4)."""
    return boxes.gather(1, index[..., None].expand(-1, -1, 4))
