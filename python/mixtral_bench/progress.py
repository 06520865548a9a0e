"""A progress bar where tqdm is installed: a machine with torch alone measures without one."""


class _NoBar:
    n = total = 0

    def __enter__(self): return self

    def __exit__(self, *_): ...

    def set_description(self, text: str) -> None: ...

    def update(self, count: int = 1) -> None: ...

    def close(self) -> None: ...


def progress_bar(**options):
    """tqdm's bar with these options, or one that shows nothing."""
    try:
        from tqdm import tqdm
    except ImportError:
        return _NoBar()
    return tqdm(dynamic_ncols=True, leave=False, **options)
