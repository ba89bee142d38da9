"""mkdocs hooks: pages from outside docs/, links between all pages, Sphinx's roles in docstrings."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]

#: Files of the checkout, and the pages that they become.
PAGES = {
    'README.md': 'index.md',
    'CONTRIBUTING.md': 'contributing.md',
    'CHANGELOG.md': 'changelog.md',
    'configs/groupmamba/README.md': 'models/groupmamba.md',
    'configs/groupmamba/ablations/README.md': 'models/groupmamba-ablations.md',
    'configs/mask_rcnn/README.md': 'models/mask_rcnn.md',
    'configs/upernet/README.md': 'models/upernet.md',
    'configs/demo/README.md': 'models/demo.md',
}
SOURCES = {page: source for source, page in PAGES.items()}

_LINK = re.compile(r'(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)')
_ROLE = re.compile(r':(?:func|class|meth|mod|data|attr):(?=<code>)')


def on_files(files, config):
    """Add the pages from outside docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding='utf-8')
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links to where files of the checkout are on the site; others become plain text."""
    here = page.file.src_uri
    source = SOURCES.get(here, f'docs/{here}')

    def rewrite(link):
        picture, text, target = link.groups()
        if target.startswith(('http://', 'https://', '#')):
            return link[0]
        path, _, anchor = target.partition('#')
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if (ROOT / path / 'README.md').is_file():
            path += '/README.md'
        found = PAGES.get(path, path.removeprefix('docs/') if path.startswith('docs/') else None)
        if found is None:
            return text
        found = posixpath.relpath(found, posixpath.dirname(here) or '.')
        return f'{picture}[{text}]({found}{"#" + anchor if anchor else ""})'

    return _LINK.sub(rewrite, markdown)


def on_page_content(html, page, config, files):
    """Take Sphinx's roles, which docstrings have before names, off the names."""
    return _ROLE.sub('', html)
