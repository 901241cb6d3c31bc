"""`tlc predict`: a MODEL on files, folders, DATA or a CACHE; rows that a cache holds are not computed again."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from transfercache import config
from transfercache.backbones.available import auto_engine
from transfercache.cache.provenance import makers_of
from transfercache.cache.reader import is_cache, open_cache
from transfercache.cache.slots import RowKey, row_keys
from transfercache.cache.store import find
from transfercache.commands.inputs import (
    cache_root,
    changed_words,
    check_counts,
    check_on_bad,
    known_files,
    log_bad,
    log_skipped,
)
from transfercache.commands.predictions import OTHER_KIND, Prediction, Predictions, collect
from transfercache.environment import installed_versions
from transfercache.errors import CacheError, ResourceError, UsageError
from transfercache.extract.loop import EmbeddedBatch, Embedder, PendingView
from transfercache.extract.parity import trusted_neighbours
from transfercache.extract.plan import wanted_rows
from transfercache.images.manifest import hash_files
from transfercache.images.sources import read_images
from transfercache.models.head_file import Model, check_canaries, load_model
from transfercache.spec import ExtractSpec
from transfercache.stopwatch import Stopwatch

if TYPE_CHECKING:
    from transfercache.backbones.choice import Choice, Engine

logger = logging.getLogger(__name__)

Features = npt.NDArray[np.float32]  # float32 [V, D], one image's in V views; [D] before they are stacked

# The eval transform and its mirror image, the first two of any cache that has views.
_TTA_VIEWS = 2

# More files than these come from a pattern, and would make the next command unreadable.
_INPUTS_NAMED = 3


def predict(
    model: str | Path,
    inputs: str | Path | Sequence[str | Path],
    *,
    weights: str | None = None,
    top: int = config.TOP,
    tta: bool = False,
    device: config.Device = config.DEVICE,
    engine: config.Engine = config.ENGINE,
    batch_size: int | None = None,
    workers: int | None = None,
    cache_dir: Path | str | None = None,
    on_bad: config.OnBad = config.ON_BAD,
    out: Path | str | None = None,
) -> Predictions:
    """Label images with a MODEL: `load` and `LoadedModel.predict` in one, whose parameters these are.

    A bad image is listed with its reason; with `on_bad="fail"` it is also logged, as the command line ends with 3.
    """
    check_on_bad(on_bad)
    result = load(model, weights=weights, device=device, engine=engine).predict(
        inputs, top=top, tta=tta, batch_size=batch_size, workers=workers, cache_dir=cache_dir, out=out
    )
    log_bad(result.bad, result.n_images, on_bad=on_bad)
    return result


def load(
    model: str | Path,
    *,
    weights: str | None = None,
    device: config.Device = config.DEVICE,
    engine: config.Engine = config.ENGINE,
) -> LoadedModel:
    """Read a MODEL that `train_head` or `finetune` wrote; its backbone is loaded when images are first embedded.

    `weights` says where the backbone's weights are, where they have moved. Raises ModelError.
    """
    path = Path(model)
    return LoadedModel(path, load_model(path), weights, device, engine)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A MODEL ready to predict; keep it to load the backbone once for many calls."""

    path: Path
    model: Model
    weights: str | None
    device: config.Device
    engine_name: config.Engine

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes that it tells apart."""
        return self.model.head.class_names

    @cached_property
    def engine(self) -> Engine:
        """The backbone on its device, in the model's own precision, checked against the model's canary logits."""
        from transfercache.models.network import checked_engine, load_backbone_of

        backbone = load_backbone_of(self.model, self.path, weights=self.weights)
        return checked_engine(self.model, self.path, backbone, choice=self._choice)

    @cached_property
    def _choice(self) -> Choice:
        # Torch takes seconds to import, and none of it is needed where a cache has every row.
        from transfercache.backbones.choice import choose_engine

        compute = self.model.head.spec.compute
        try:
            return choose_engine(self.engine_name, device=self.device, compute=compute)
        except ResourceError as error:
            if compute == "fp32":
                raise
            raise ResourceError(
                f"{self.path}: computes in {compute} ({error}); predict where that is, or tlc export it, which is fp32"
            ) from error

    def predict(
        self,
        inputs: str | Path | Sequence[str | Path],
        *,
        top: int = config.TOP,
        tta: bool = False,
        batch_size: int | None = None,
        workers: int | None = None,
        cache_dir: Path | str | None = None,
        out: Path | str | None = None,
    ) -> Predictions:
        """Label images in the order given (folders: sorted), with the `top` classes of each.

        `inputs` is one CACHE (its rows are read: no image, no torch), one DATA (rows that a cache under `cache_dir`
        holds are reused), or any files and folders; of a folder, every image below it is read. With `tta` an image's
        probabilities are the mean of its own and of its mirror image's (views 0 and 1). With `out` the
        predictions are streamed to that file, and the result keeps a few: .jsonl has all that `to_json` gives, .csv
        has the columns path, label, probability and reason, then label_2, probability_2 and so on up to `top`. An
        older `out` is replaced when all is done. Raises ModelError, CacheError (of another spec than the model's),
        DataError, WeightsError, ResourceError, and UsageError for an `out` of another ending, or no inputs.
        """
        words = [str(item) for item in ([inputs] if isinstance(inputs, (str, Path)) else inputs)]
        check_counts(top=top, batch_size=batch_size, workers=workers)
        if not words:
            raise UsageError("inputs []: nothing to predict; give images, folders, DATA or a CACHE")
        n_views = _TTA_VIEWS if tta else 1
        if len(words) == 1 and is_cache(Path(words[0])):
            rows = self._cache_rows(Path(words[0]), n_views=n_views)
        else:
            root = cache_root(cache_dir)
            rows = self._image_rows(words, root, n_views=n_views, batch_size=batch_size, workers=workers)
        with closing(rows):
            images = (self._prediction(path, outcome, top) for path, outcome in rows)
            target = None if out is None else Path(out)
            kept, n_images, bad = collect(images, out=target, n_top=min(top, len(self.class_names)))
        options = changed_words(weights=(self.weights, None), top=(top, config.TOP), cache_dir=(cache_dir, None))
        options += ("--tta",) if tta else ()
        return Predictions(kept, n_images, bad, target, self._next_command(words, target, options))

    def _next_command(self, words: Sequence[str], out: Path | None, options: tuple[str, ...]) -> tuple[str, ...]:
        """Return the words that write the same predictions to a file, or to one of the other kind."""
        if len(words) > _INPUTS_NAMED:  # the folders behind a */*.jpg
            words = list(dict.fromkeys(word if Path(word).is_dir() else str(Path(word).parent) for word in words))
        other = Path("predictions.csv") if out is None else out.with_suffix(OTHER_KIND[out.suffix])
        return ("tlc", "predict", str(self.path), *words, *options, "--out", str(other))

    def _prediction(self, path: str, outcome: Features | str, top: int) -> Prediction:
        if isinstance(outcome, str):
            return Prediction(path, None, None, (), outcome)
        row = self.model.head.probabilities(outcome).mean(axis=0)  # float64 [C]
        best = tuple((self.class_names[c], float(row[c])) for c in np.argsort(-row, kind="stable")[:top])
        return Prediction(path, best[0][0], best[0][1], best)

    def _cache_rows(self, folder: Path, *, n_views: int) -> Generator[tuple[str, Features | str], None, None]:
        head = self.model.head
        if self.model.is_finetuned:
            raise CacheError(f"{folder}: {self.path} is fine-tuned and has a backbone of its own; give it the images")
        cache = open_cache(folder)
        if cache.spec != head.spec:
            difference = _difference(cache.spec, head.spec)
            raise CacheError(f"{folder}: not of the spec that {self.path} was trained on ({difference})")
        rows = cache.rows
        if rows.n_views < n_views:
            raise UsageError(
                f"--tta: {folder} has one view an image; run its extract-features with --views 2, or give the images"
            )
        check_canaries(self.path, self.model, cache.canaries)
        table = cache.stored_table()
        table = table.subset(table.view < n_views)  # an image's views, one after the other
        features = iter(table.features.reshape(-1, n_views, head.dim))
        for i in np.flatnonzero(rows.view == 0).tolist():
            yield rows.path[i], rows.reason[i] or next(features)

    def _image_rows(
        self, words: Sequence[str], cache_dir: Path, *, n_views: int, batch_size: int | None, workers: int | None
    ) -> Generator[tuple[str, Features | str], None, None]:
        manifest = read_images(words)
        log_skipped(manifest)
        spec, folder = self.model.head.spec, None
        if not self.model.is_finetuned:
            folder = find(cache_dir, data_name=manifest.name, data_root=manifest.root, spec=spec)
        manifest = hash_files(manifest, known=known_files(folder))
        # Without torch no GPU is seen: a wrong guess at `auto` costs a check of eight rows.
        engine = auto_engine(self.device) if self.engine_name == "auto" else self.engine_name
        makers = makers_of(engine, installed_versions())
        embedder = Embedder(manifest, spec, lambda: self.engine, workers, Stopwatch(), makers)
        held = {} if self.model.is_finetuned else self._held(cache_dir, embedder, n_views=n_views)
        readable = np.flatnonzero(manifest.is_readable()).tolist()
        missing = [(row, view) for row in readable for view in range(n_views) if (row, view) not in held]
        rows = {row for row, _ in missing}
        size = batch_size or (self._choice.batch_size if missing else config.EXTRACT_BATCH_SIZE)
        with closing(embed_images(embedder, missing, batch_size=size)) as computed:
            for row, path in enumerate(manifest.paths):
                fresh = next(computed)[1] if row in rows else manifest.unreadable.get(row, [])
                if isinstance(fresh, str):
                    yield path, fresh
                else:
                    yield path, np.stack([*(held[row, v] for v in range(n_views) if (row, v) in held), *fresh])

    def _held(self, cache_dir: Path, embedder: Embedder, *, n_views: int) -> dict[tuple[int, int], Features]:
        """Return {(manifest row, view): float32 [D]} for the images whose bytes some cache of the spec has seen."""
        digests, dim = embedder.manifest.digests, self.model.head.dim
        features: dict[RowKey, Features] = {}
        wanted = wanted_rows(embedder.manifest, n_views=n_views)
        for cache, _ in trusted_neighbours(cache_dir, embedder, wanted, dim=dim):
            try:
                features.update(zip(cache.keys, cache.slots.take(cache.keys), strict=True))
            except CacheError as error:
                logger.warning("computed instead of taken from there: %s", error)
        views = [row_keys(digests, np.full(len(digests), view, dtype=np.uint8)) for view in range(n_views)]
        return {
            (row, view): features[key]
            for view, keys in enumerate(views)
            for row, key in enumerate(keys)
            if key in features
        }


def embed_images(
    embedder: Embedder, views: Sequence[tuple[int, int]], *, batch_size: int
) -> Generator[tuple[int, list[Features] | str], None, None]:
    """Yield each row of `views` (row and view, in order) with its embeddings [D], or the reason why it has none.

    An image one of whose views has none has none at all.
    """
    pending = [PendingView(slot, row, view) for slot, (row, view) in enumerate(views)]
    with closing(embedder.embed(pending, batch_size=min(batch_size, max(len(views), 1)))) as batches:
        for row, group in groupby(_outcomes(batches), key=itemgetter(0)):
            outcomes = [outcome for _, outcome in group]
            reasons = [outcome for outcome in outcomes if isinstance(outcome, str)]
            yield row, reasons[0] if reasons else [outcome for outcome in outcomes if not isinstance(outcome, str)]


def _outcomes(batches: Iterable[EmbeddedBatch]) -> Iterator[tuple[int, Features | str]]:
    for batch in batches:
        outcomes: list[tuple[int, Features | str]] = [*batch.bad.items()]
        outcomes += ((view.row, features) for view, features in zip(batch.views, batch.features, strict=True))
        # Sorting leaves the views of a row in their order.
        yield from sorted(outcomes, key=itemgetter(0))


def _difference(cache: ExtractSpec, head: ExtractSpec) -> str:
    ours, theirs = cache.to_json(), head.to_json()
    return ", ".join(f"{name} {ours[name]} against {theirs[name]}" for name in ours if ours[name] != theirs[name])
