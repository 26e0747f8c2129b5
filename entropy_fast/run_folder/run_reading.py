"""What a run left: a result, ledgers, kept training steps, a validation; whatever of these is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from entropy_fast.errors import RunFolderError
from entropy_fast.run_folder.bundle_reading import BUNDLE_NAME, bundle_document
from entropy_fast.run_folder.json_reading import from_json
from entropy_fast.run_folder.result_files import DOCUMENT
from entropy_fast.run_folder.result_reading import SavedResult, read_result
from entropy_fast.run_folder.validation_files import VALIDATION, read_validation
from entropy_fast.truth import EntropyLedger, Validation

__all__ = ["KeptStep", "OnlineForecast", "SavedRun", "read_run"]

LEDGERS = "ledger*.parquet"


@dataclasses.dataclass(frozen=True)
class OnlineForecast:
    """The number that was found while training; NaN where a part was not asked for.

    Attributes:
        delta_h1: of the whole change, in ``unit``.
        std_error: of that, for this very update.
        forecast: of the whole change, or of its direct part where that alone was asked for.
        unit: of all of them.
        learning_rate: of the step.
        split: values of ``direct``, ``visitation`` and ``total``; empty where there are no parts.
    """

    delta_h1: float
    std_error: float
    forecast: float
    unit: str
    learning_rate: float
    split: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class KeptStep:
    """A training step that was kept, as its ``manifest.json`` describes it; its other files are not looked at.

    Attributes:
        folder: of the bundle.
        step: number of the training step.
        online: the forecast of that time; None where there was none.
        probed: whether the folder holds a result, of a probe that repeated the forecast.
    """

    folder: Path
    step: int
    online: OnlineForecast | None
    probed: bool


@dataclasses.dataclass(frozen=True, eq=False)
class SavedRun:
    """What there is of one run.

    Attributes:
        path: that was read.
        result: of a probe; None where there is none.
        ledgers: forecasts and realised changes over training steps, in the order of their names.
        steps: kept training steps in the folder or in folders in it, by number.
        validations: by run, what steps really did; empty where nobody looked.
    """

    path: Path
    result: SavedResult | None
    ledgers: tuple[EntropyLedger, ...]
    steps: tuple[KeptStep, ...]
    validations: Mapping[str, Validation]


def read_run(path: Path) -> SavedRun:
    """Read a run's folder, or a ledger's file.

    Args:
        path: a folder with any of ``result.json``, ``ledger*.parquet``, ``validation.json``, and kept steps as itself or in
            it; or the Parquet file of a ledger.

    Raises:
        RunFolderError: there is nothing of a run.
        ResultError, LedgerError, BundleError: a file is damaged.
    """
    if path.is_file():
        return SavedRun(path, None, (EntropyLedger(path),), (), {})
    if not path.is_dir():
        raise RunFolderError(f"run {path} does not exist.", fix="check the path.")
    result = read_result(path) if (path / DOCUMENT).exists() else None
    ledgers = tuple(EntropyLedger(found) for found in sorted(path.glob(LEDGERS)))
    bundles = sorted({found.parent for pattern in (BUNDLE_NAME, f"*/{BUNDLE_NAME}") for found in path.glob(pattern)})
    steps = tuple(sorted(map(_kept, bundles), key=lambda kept: kept.step))
    validations = read_validation(path / VALIDATION) if (path / VALIDATION).exists() else {}
    if result is None and not (ledgers or steps or validations):
        raise RunFolderError(
            f"{path} holds no {DOCUMENT}, no {LEDGERS}, no kept step and no {VALIDATION}: there is nothing to report.",
            fix=f"run `entropy-fast probe {path}` first, or pass the folder that its --out named.",
        )
    return SavedRun(path, result, ledgers, steps, validations)


def _kept(folder: Path) -> KeptStep:
    document = bundle_document(folder)
    where = str(folder / BUNDLE_NAME)
    online = document["online"]
    forecast = None if online is None else from_json(OnlineForecast, online, f"{where}: online")
    return KeptStep(folder, int(document["step"]), forecast, (folder / DOCUMENT).exists())
