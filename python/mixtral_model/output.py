"""What commands show and write: progress, and CSV files and plots in the directory that --output names (None: no files)."""
import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def progress(text: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar, and what moves it: f(done, total)."""
    from mixtral_bench.progress import progress_bar
    with progress_bar(desc=text, unit=f" {unit}") as bar:
        def move(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
        yield move


def make_directory(output: str | None) -> Path | None:
    """Made before anything is computed, so that a path that cannot be one ends the command early."""
    if output is None:
        return None
    Path(output).mkdir(parents=True, exist_ok=True)
    return Path(output)


def write_csv(path: Path, header: list[str], rows: list[tuple]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)  # None is an empty cell
    print(f"table: {path}")


def plots_are_possible() -> bool:
    """Whether matplotlib is installed; prints a line if it is not."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        print("matplotlib is not installed: no plot (pip install 'mixtral_ext[bench]')")
        return False
    return True


def new_figure(width: float, height: float):
    """A matplotlib Figure, sizes in inches."""
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
    print(f"plot: {path}")
