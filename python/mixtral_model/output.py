"""CSV files and plots of a command, in the directory that --output names (None: no files)."""
import csv
from pathlib import Path


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
