"""Everything is declared in pyproject.toml, but for the description on a package index.

An index shows no file of the repository: there the README has no pictures, and links to other pages are just names.
"""

import re
from pathlib import Path

from setuptools import setup

text = Path(__file__).with_name("README.md").read_text()
text = re.sub(r"^!\[[^]]*\]\((?!https:).*\)\n\n\*[^*]*\*\n+", "", text, flags=re.MULTILINE)  # with its caption
text = re.sub(r"\[([^]]*)\]\((?!https:)[^)]*\)", r"\1", text)
setup(long_description=text, long_description_content_type="text/markdown")
