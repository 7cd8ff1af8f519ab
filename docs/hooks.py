"""MkDocs hook. Pages link to files of the checkout outside of `docs`, which a site has not got.

Plots under `bench/results` become files of the site; any other such link becomes its text.
"""

import pathlib
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)#\s]+)[^)]*\)")


def on_files(files, config):
    for plot in sorted((ROOT / "bench" / "results").glob("*/*.svg")):
        files.append(File.generated(config, plot.relative_to(ROOT).as_posix(), abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown, page, config, files):
    def inside(link):
        image, text, path = link.groups()
        return f"{image}[{text}]({path})" if path.endswith(".svg") else text

    return OUTSIDE.sub(inside, markdown)
