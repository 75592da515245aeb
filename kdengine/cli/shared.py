# SPDX-License-Identifier: Apache-2.0
"""What several commands do."""

from pathlib import Path


def check_folder(command: str, folder: Path) -> None:
    """Refuse what is no folder; it is to be that of a run."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"{command}: {folder} {what}; expected the folder of a run")


def export_latest(run: str, out: str) -> str:
    """Export the latest checkpoint of a run; returns the folder."""
    from kdengine.checkpoint import export_run

    export_run(Path(run), Path(out))
    return out


def print_table(table: object) -> None:
    """Print a table, or several."""
    from rich.console import Console

    # tables fit; a path is not cut
    Console().print(table, crop=False)
