"""`tlc predict`: a MODEL on files, folders, DATA or a CACHE; rows that a cache holds are not computed again."""

from __future__ import annotations

import csv
import json
import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from transfercache import config
from transfercache.backbones.available import auto_engine
from transfercache.cache.provenance import makers_of
from transfercache.cache.reader import is_cache, open_cache
from transfercache.cache.slots import RowKey, row_keys
from transfercache.cache.store import find
from transfercache.commands.inputs import BadImage, cache_root, known_files, log_bad, log_skipped
from transfercache.environment import installed_versions
from transfercache.errors import CacheError, UsageError
from transfercache.extract.loop import Embedder, PendingView
from transfercache.extract.parity import trusted_neighbours
from transfercache.extract.plan import wanted_rows
from transfercache.files import replacing
from transfercache.images.manifest import hash_files
from transfercache.images.named import NAMED
from transfercache.images.sources import read_paths, read_source
from transfercache.models.head_file import Model, check_canaries, load_model
from transfercache.spec import ExtractSpec
from transfercache.stopwatch import Stopwatch

if TYPE_CHECKING:
    from rich.console import RenderableType

    from transfercache.backbones.choice import Choice, Engine

logger = logging.getLogger(__name__)

Features = npt.NDArray[np.float32]  # float32 [D], one image's

# On a terminal; --json and --out give all of them.
_ROWS_SHOWN = 20

# More files than these come from a pattern, and would make the next command unreadable.
_INPUTS_NAMED = 3

_OTHER_KIND = {".csv": ".jsonl", ".jsonl": ".csv"}


@dataclass(frozen=True)
class Prediction:
    """One image: its most probable class, or why it has none."""

    path: str
    label: str | None
    probability: float | None
    top: tuple[tuple[str, float], ...]  # (class, probability), most probable first
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the object of this image in the JSON list of `tlc predict`."""
        if self.label is None:
            return {"path": self.path, "label": None, "reason": self.reason}
        top = [{"label": label, "probability": probability} for label, probability in self.top]
        return {"path": self.path, "label": self.label, "probability": self.probability, "top": top}


@dataclass(frozen=True)
class Predictions:
    """All images in the order given; with `out` they are in that file, and here only the first few."""

    images: tuple[Prediction, ...]
    n_images: int
    bad: tuple[BadImage, ...]
    out: Path | None
    next_command: tuple[str, ...]  # the words of the command a person would run next

    def to_json(self) -> Any:
        """Return a list of all images; with `out`, {out, images, bad} instead, as the file has them."""
        if self.out is None:
            return [image.to_json() for image in self.images]
        return {"out": str(self.out), "images": self.n_images, "bad": [item.to_json() for item in self.bad]}

    def render(self) -> RenderableType:
        """Return the same for a terminal."""
        from transfercache.report.predictions import render_predictions

        best = [(image.path, *image.top[0]) for image in self.images[:_ROWS_SHOWN] if image.top]
        return render_predictions(best, n_images=self.n_images - len(self.bad), out=self.out)


def predict(
    model: str | Path,
    inputs: str | Path | Sequence[str | Path],
    *,
    weights: str | None = None,
    top: int = config.TOP,
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
    result = load(model, weights=weights, device=device, engine=engine).predict(
        inputs, top=top, batch_size=batch_size, workers=workers, cache_dir=cache_dir, out=out
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
        from transfercache.models.network import load_engine

        return load_engine(self.model, self.path, weights=self.weights, choice=self._choice)

    @cached_property
    def _choice(self) -> Choice:
        # Torch takes seconds to import, and none of it is needed where a cache has every row.
        from transfercache.backbones.choice import choose_engine

        return choose_engine(self.engine_name, device=self.device, compute=self.model.head.spec.compute)

    def predict(
        self,
        inputs: str | Path | Sequence[str | Path],
        *,
        top: int = config.TOP,
        batch_size: int | None = None,
        workers: int | None = None,
        cache_dir: Path | str | None = None,
        out: Path | str | None = None,
    ) -> Predictions:
        """Label images in the order given (folders: sorted), with the `top` classes of each.

        `inputs` is one CACHE (its rows are read: no image, no torch), one DATA (rows that a cache under `cache_dir`
        holds are reused), or any files and folders; of a folder, every image below it is read. With `out` the
        predictions are streamed to that file, and the result keeps a few: .jsonl has all that `to_json` gives, .csv
        has the columns path, label, probability and reason, then label_2, probability_2 and so on up to `top`. An
        older `out` is replaced when all is done. Raises ModelError, CacheError (of another spec than the model's),
        DataError, WeightsError, ResourceError, and UsageError for an `out` of another ending.
        """
        words = [str(item) for item in ([inputs] if isinstance(inputs, (str, Path)) else inputs)]
        if len(words) == 1 and is_cache(Path(words[0])):
            rows = self._cache_rows(Path(words[0]))
        else:
            rows = self._image_rows(words, cache_root(cache_dir), batch_size=batch_size, workers=workers)
        with closing(rows):
            images = (self._prediction(path, outcome, top) for path, outcome in rows)
            target = None if out is None else Path(out)
            kept, n_images, bad = _collect(images, out=target, n_top=min(top, len(self.class_names)))
        return Predictions(kept, n_images, bad, target, self._next_command(words, target))

    def _next_command(self, words: Sequence[str], out: Path | None) -> tuple[str, ...]:
        """Return the words that write the same predictions to a file, or to one of the other kind."""
        named = words if len(words) <= _INPUTS_NAMED else [str(Path(words[0]).parent)]  # the folder behind a *.jpg
        moved = () if self.weights is None else ("--weights", self.weights)
        other = Path("predictions.csv") if out is None else out.with_suffix(_OTHER_KIND[out.suffix])
        return ("tlc", "predict", str(self.path), *named, *moved, "--out", str(other))

    def _prediction(self, path: str, outcome: Features | str, top: int) -> Prediction:
        if isinstance(outcome, str):
            return Prediction(path, None, None, (), outcome)
        row = self.model.head.probabilities(outcome[None])[0]  # float64 [C]
        best = tuple((self.class_names[c], float(row[c])) for c in np.argsort(-row, kind="stable")[:top])
        return Prediction(path, best[0][0], best[0][1], best)

    def _cache_rows(self, folder: Path) -> Generator[tuple[str, Features | str], None, None]:
        head = self.model.head
        if self.model.is_finetuned:
            raise CacheError(f"{folder}: {self.path} is fine-tuned and has a backbone of its own; give it the images")
        cache = open_cache(folder)
        if cache.spec != head.spec:
            difference = _difference(cache.spec, head.spec)
            raise CacheError(f"{folder}: not of the spec that {self.path} was trained on ({difference})")
        check_canaries(self.path, self.model, cache.canaries)
        table = cache.table()
        features = iter(table.features[table.view == 0])
        rows = cache.rows
        for i in np.flatnonzero(rows.view == 0).tolist():
            yield rows.path[i], rows.reason[i] or next(features)

    def _image_rows(
        self, words: Sequence[str], cache_dir: Path, *, batch_size: int | None, workers: int | None
    ) -> Generator[tuple[str, Features | str], None, None]:
        scanned_ns = time.time_ns()
        manifest = read_source(words[0]) if len(words) == 1 and _is_listed(words[0]) else read_paths(words)
        log_skipped(manifest)
        spec, folder = self.model.head.spec, None
        if not self.model.is_finetuned:
            folder = find(cache_dir, data_name=manifest.name, data_root=manifest.root, spec=spec)
        manifest = hash_files(manifest, known=known_files(folder), scanned_ns=scanned_ns)
        embedder = Embedder(manifest, spec, lambda: self.engine, workers, Stopwatch())
        known: dict[int, Features | str] = dict(manifest.unreadable)
        if not self.model.is_finetuned:
            # Without torch no GPU is seen: a wrong guess at `auto` costs a check of eight rows.
            engine = auto_engine(self.device) if self.engine_name == "auto" else self.engine_name
            makers = makers_of(engine, installed_versions())
            known |= _cached_features(cache_dir, embedder, dim=self.model.head.dim, makers=makers)
        missing = [row for row in range(manifest.n_rows) if row not in known]
        size = batch_size or (self._choice.batch_size if missing else config.EXTRACT_BATCH_SIZE)
        with closing(_computed(embedder, missing, batch_size=size)) as computed:
            for row, path in enumerate(manifest.paths):
                yield path, known[row] if row in known else next(computed)


def _computed(embedder: Embedder, rows: Sequence[int], *, batch_size: int) -> Generator[Features | str, None, None]:
    """Yield the embedding, or the reason why there is none, of `rows` in order."""
    if rows:
        pending = [PendingView(slot, row) for slot, row in enumerate(rows)]
        with closing(embedder.embed(pending, batch_size=min(batch_size, len(rows)))) as batches:
            for batch in batches:
                outcomes: dict[int, Features | str] = dict(batch.bad)
                outcomes |= {view.row: batch.features[i] for i, view in enumerate(batch.views)}
                for row in sorted(outcomes):
                    yield outcomes[row]


def _difference(cache: ExtractSpec, head: ExtractSpec) -> str:
    ours, theirs = cache.to_json(), head.to_json()
    return ", ".join(f"{name} {ours[name]} against {theirs[name]}" for name in ours if ours[name] != theirs[name])


def _is_listed(word: str) -> bool:
    """Whether this is a CSV file or a name; of a folder all images are read, and any other file is an image."""
    return (word in NAMED or word.lower().endswith(".csv")) and not Path(word).expanduser().is_dir()


def _cached_features(
    cache_dir: Path, embedder: Embedder, *, dim: int, makers: Mapping[str, str]
) -> dict[int, Features]:
    """Return {manifest row: its embedding} for the images whose bytes some cache of the spec has seen."""
    manifest = embedder.manifest
    wanted = wanted_rows(manifest, n_views=1)
    features: dict[RowKey, Features] = {}
    for cache, _ in trusted_neighbours(cache_dir, embedder, wanted, dim=dim, makers=makers):
        try:
            features.update(zip(cache.keys, cache.slots.take(cache.keys), strict=True))
        except CacheError as error:
            logger.warning("computed instead of taken from there: %s", error)
    keys = row_keys(manifest.digests, np.zeros(manifest.n_rows, dtype=np.uint8))
    return {row: features[key] for row, key in enumerate(keys) if key in features}


def _collect(
    stream: Iterator[Prediction], *, out: Path | None, n_top: int
) -> tuple[tuple[Prediction, ...], int, tuple[BadImage, ...]]:
    """Return the predictions to keep, how many there were, and the bad images; all are written to `out`."""
    kept: list[Prediction] = []
    bad: list[BadImage] = []
    n_images = 0
    with _writing(out, n_top) as write:
        for image in stream:
            n_images += 1
            write(image)
            if image.reason is not None:
                bad.append(BadImage(image.path, image.reason))
            if out is None or n_images <= _ROWS_SHOWN:
                kept.append(image)
    return tuple(kept), n_images, tuple(bad)


@contextmanager
def _writing(out: Path | None, n_top: int) -> Iterator[Callable[[Prediction], None]]:
    """Give a function that writes one prediction to `out`, a line each; .csv (with `n_top` classes) or .jsonl."""
    if out is None:
        yield lambda _: None
        return
    if out.suffix not in _OTHER_KIND:
        raise UsageError(f"--out {out}: name a .csv or a .jsonl file")
    with (
        replacing(out) as temporary,
        open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        if out.suffix == ".jsonl":
            yield lambda image: print(json.dumps(image.to_json()), file=file)
            return
        more = [name for rank in range(2, n_top + 1) for name in (f"label_{rank}", f"probability_{rank}")]
        names = ["path", "label", "probability", "reason", *more]
        rows = csv.DictWriter(file, names, restval="")
        rows.writeheader()
        yield lambda image: rows.writerow(dict(zip(names, _values(image), strict=False)))


def _values(image: Prediction) -> Iterator[str | float | None]:
    """Yield the values of a .csv in the order of its columns; a bad image has the first four."""
    yield from (image.path, image.label, image.probability, image.reason)
    for label, probability in image.top[1:]:
        yield label
        yield probability
