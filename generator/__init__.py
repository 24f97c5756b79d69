"""Makes batches to run the pipeline on: `python -m generator --help`. NAME.py here makes those of the dataset NAME."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def datasets() -> list[str]:
    """The names of the datasets that there is a generator for."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if path.stem != "files")


def generator_of(dataset: str) -> Callable[..., int]:
    """The function generate_NAME of a dataset: (path, *, rows, updated_at, seed=0, progress=None) -> bytes.

    :raises ValueError: there is none.
    """
    if dataset not in datasets():
        raise ValueError(f"no generator/{dataset}.py makes {dataset}: there are {', '.join(datasets())}")
    generate: Any = getattr(import_module(f"generator.{dataset}"), f"generate_{dataset}")
    return generate  # type: ignore[no-any-return]
