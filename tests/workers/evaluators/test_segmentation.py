"""Segmentation against plain transformers and counting, one image at a time."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, SegformerForSemanticSegmentation

from optimizer.errors import InvalidCheckpoint, InvalidData, InvalidInput
from optimizer.spec import DataSpec
from tests.workers.evaluators.cases import FIELD, Row, as_png, build, mask, open_model, png
from tests.workers.models import tiny_segformer
from workers.data import load_rows
from workers.evaluators.base import Scores

NAME = "segmentation"
SIZES = [(7 + 3 * n, 19 - 2 * n) for n in range(5)]
ROWS: list[Row] = [{"image": png(n, size), "mask": mask(n, size)} for n, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def segformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_segformer(tmp_path_factory.mktemp("segformer"))


def predicted(checkpoint: Path, rows: Sequence[Row]) -> list[np.ndarray]:
    """What transformers' own pipeline of processor, model and post-processing finds in each image."""
    processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")  # type: ignore[no-untyped-call]
    model = SegformerForSemanticSegmentation.from_pretrained(checkpoint)
    out = []
    for row in rows:
        image = Image.open(io.BytesIO(row["image"]))
        with torch.no_grad():
            found = model(**processor(images=image, return_tensors="pt"))
        size = (image.size[1], image.size[0])
        out += processor.post_process_semantic_segmentation(found, target_sizes=[size])
    return [one.numpy() for one in out]


def truths(rows: Sequence[Row]) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(row["mask"]))) for row in rows]


def evaluate(checkpoint: Path, rows: Sequence[Row] = ROWS, **options: Any) -> Scores:
    return build(NAME, checkpoint, rows, **options).evaluate(open_model(NAME, checkpoint))


@pytest.mark.parametrize("background", [None, 0])
def test_equals_counting(background: int | None, segformer: Path) -> None:
    scores = evaluate(segformer, background=background)
    classes = [number for number in range(3) if number != background]
    all_shared, all_united = np.zeros(3), np.zeros(3)
    for n, (true, found) in enumerate(zip(truths(ROWS), predicted(segformer, ROWS), strict=True)):
        kept = true != 255
        shared, sizes = np.zeros(3), np.zeros(3)
        for number in classes:
            shared[number] = ((true == number) & (found == number) & kept).sum()
            sizes[number] = ((true == number) & kept).sum() + ((found == number) & kept).sum()
        occurs = sizes > 0
        assert scores["dice"].values[n] == pytest.approx((2 * shared / np.maximum(sizes, 1))[occurs].mean(), abs=1e-6)
        iou = (shared / np.maximum(sizes - shared, 1))[occurs].mean()
        assert scores["iou"].values[n] == pytest.approx(iou, abs=1e-6)
        assert scores["pixel_accuracy"].values[n] == pytest.approx((true == found)[kept].mean(), abs=1e-6)
        all_shared, all_united = all_shared + shared, all_united + sizes - shared
    assert scores["mean_iou"].mean() == pytest.approx((all_shared[classes] / all_united[classes]).mean(), abs=1e-6)
    right = sum(int((t == f)[t != 255].sum()) for t, f in zip(truths(ROWS), predicted(segformer, ROWS), strict=True))
    pixels = sum(int((true != 255).sum()) for true in truths(ROWS))
    assert scores["pixel_accuracy"].mean() == pytest.approx(right / pixels, abs=1e-6)


def test_the_loss_is_that_of_transformers(segformer: Path) -> None:
    scores = evaluate(segformer)
    processor = AutoImageProcessor.from_pretrained(segformer, backend="pil")  # type: ignore[no-untyped-call]
    model = SegformerForSemanticSegmentation.from_pretrained(segformer)
    for n, (row, true) in enumerate(zip(ROWS, truths(ROWS), strict=True)):
        pixels = processor(images=Image.open(io.BytesIO(row["image"])), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            loss = model(pixel_values=pixels, labels=torch.from_numpy(true.astype(np.int64))[None]).loss
        assert scores["loss"].values[n] == pytest.approx(float(loss), abs=1e-5)


def test_predictions_have_the_mean_of_the_loss(segformer: Path) -> None:
    model = open_model(NAME, segformer)
    evaluator = build(NAME, segformer, ROWS, batch_size=2)
    nats, draws, batches = 0.0, 0, 0
    with torch.no_grad():
        for one in evaluator.predictions(model):
            nats -= float(one.log_likelihoods.gather(1, one.observed[:, None]).sum())
            draws += len(one.observed)
            batches += one.last
    assert nats / draws == pytest.approx(evaluator.evaluate(model)["loss"].mean(), rel=1e-5)
    assert batches == 3


def test_where_nothing_is_and_nothing_is_found_all_is_right(segformer: Path) -> None:
    model = open_model(NAME, segformer)
    with torch.no_grad():
        head: Any = model.get_submodule("decode_head.classifier")
        head.weight.zero_()
        head.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    rows = [{"image": png(0), "mask": as_png(np.zeros((9, 11), dtype=np.uint8))}]
    scores = build(NAME, segformer, rows, background=0).evaluate(model)
    assert [scores[metric].values[0] for metric in ("dice", "iou", "mean_iou", "pixel_accuracy")] == [1.0] * 4


@pytest.mark.parametrize("kind", ["palette", "16 bit", "tiff", "one bit"])
def test_masks_are_read_as_numbers(kind: str, segformer: Path) -> None:
    classes = np.random.default_rng(0).integers(0, 2, (9, 11))
    image = Image.fromarray(classes.astype(np.uint8))
    if kind == "palette":
        image.putpalette([200, 0, 0, 0, 200, 0])
    if kind == "16 bit":
        image = Image.fromarray(classes.astype(np.uint16))
    if kind == "one bit":
        image = Image.fromarray((classes * 255).astype(np.uint8)).convert("1")
    out = io.BytesIO()
    image.save(out, "TIFF" if kind == "tiff" else "PNG")
    plain = evaluate(segformer, [{"image": png(0), "mask": as_png(classes.astype(np.uint8))}])
    found = evaluate(segformer, [{"image": png(0), "mask": out.getvalue()}])
    assert found["dice"].values == plain["dice"].values


def test_values_may_stand_for_classes(segformer: Path) -> None:
    classes = np.random.default_rng(0).integers(0, 3, (9, 11), dtype=np.uint8)
    table = np.array([0, 255, 7], dtype=np.uint8)
    plain = evaluate(segformer, [{"image": png(0), "mask": as_png(classes)}])
    rows = [{"image": png(0), "mask": as_png(table[classes])}]
    found = evaluate(segformer, rows, values=table.tolist(), ignore_index=None)
    assert found["loss"].values == plain["loss"].values
    with pytest.raises(InvalidData, match="the value 255 is none of the model's 3 classes"):
        build(NAME, segformer, rows, ignore_index=None)


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({"background": 3}, "background", "no class 3"),
        ({"values": [0, 1]}, "values", "has 3 classes, not 2"),
        ({"values": [0, 1, 1]}, "values", "stands for two classes"),
        ({"values": [0, 1, 255]}, "values", "or for one that is ignored"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(
    options: dict[str, Any], field: str, words: str, segformer: Path
) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        build(NAME, segformer, ROWS, **options)
    assert caught.value.field == f"{FIELD}.options.{field}"


@pytest.mark.parametrize("step", ["do_center_crop", "do_pad", "do_reduce_labels"])
def test_processors_under_whose_images_masks_would_not_lie_are_refused(step: str, tmp_path: Path) -> None:
    path = tiny_segformer(tmp_path)
    config = path / "preprocessor_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {step: True}))
    with pytest.raises(InvalidCheckpoint, match=step):
        build(NAME, path, ROWS)


def test_a_model_of_one_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match="one of several classes"):
        build(NAME, tiny_segformer(tmp_path, labels=1), ROWS)


def test_directories_of_images_and_masks(segformer: Path, tmp_path: Path) -> None:
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
        for n, row in enumerate(ROWS):
            (tmp_path / part / f"{n}.png").write_bytes(row[part.removesuffix("s")])
    rows = load_rows(DataSpec(path="-"), tmp_path, f"{FIELD}.data")
    assert rows.places == [f"images/{n}.png" for n in range(len(ROWS))]
    found = build(NAME, segformer, rows).evaluate(open_model(NAME, segformer))
    np.testing.assert_array_equal(found["dice"].values, evaluate(segformer)["dice"].values)
    (tmp_path / "masks" / "2.png").unlink()
    with pytest.raises(InvalidData, match=r"2\.png has no mask") as caught:
        load_rows(DataSpec(path="-"), tmp_path, f"{FIELD}.data")
    assert caught.value.field == f"{FIELD}.data.path"
