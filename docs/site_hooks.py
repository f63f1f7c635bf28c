"""What mkdocs does beside its own: pictures of benchmarks lie outside docs/, where they are made, and are shown from there."""

import re
from pathlib import Path

from mkdocs.structure.files import File

RESULTS = Path("benchmarks/results")


def on_files(files, *, config):
    """Add the pictures of benchmarks to what is built."""
    root = Path(config.config_file_path).parent
    for picture in sorted((root / RESULTS).glob("*.png")):
        files.append(File.generated(config, (RESULTS / picture.name).as_posix(), abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, *, page, **_):
    """Point to them from where they are in the site: `../benchmarks/results/a.png` in docs/a.md leads out of docs/."""
    above = "../" * page.file.src_uri.count("/")
    return re.sub(rf"\]\({re.escape(above)}\.\./{RESULTS.as_posix()}/", f"]({above}{RESULTS.as_posix()}/", markdown)
