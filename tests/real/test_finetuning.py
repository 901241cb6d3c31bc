"""Fine-tuning the tutorial's network from cached activations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from transfercache.commands.finetune import finetune
from transfercache.commands.predict import predict

pytestmark = pytest.mark.real


def test_partial__learns_ants_from_bees_and_its_model_says_the_same_of_the_files(
    real_photos: Path, real_weights: Path, tmp_path: Path
) -> None:
    result = finetune(
        real_photos,
        weights=str(real_weights),
        unfreeze="layer4",
        cached=True,
        epochs=2,
        device="cpu",
        cache_dir=tmp_path / "cache",
        out=tmp_path / "model",
    )
    assert result.reported is not None
    assert (result.reported.split, result.reported.n, result.n_train) == ("val", 153, 244)
    assert result.backbone_passes == 2 * 244 + 153
    assert result.reported.accuracy >= 0.9
    images = predict(result.model, [real_photos / "val"], weights=str(real_weights)).images
    is_right = [image.label == Path(image.path).parts[-2] for image in images]
    # The reported figures are of float16 activations, those here of the whole network in float32.
    assert np.sum(is_right) == pytest.approx(result.reported.accuracy * 153, abs=1)
