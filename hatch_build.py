"""The metadata that depends on where the repository is hosted: the project's URLs, and the links of the readme.

YUAN_GRPC_HOME_URL is the address of the repository when a release is built. Without it, the metadata has no URLs, and
the links of the readme are those of the file.
"""

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_RELATIVE_IMAGE = re.compile(r"(!\[[^\]]*\]\()(?!https?://)([^)\s]+)\)")
_RELATIVE_LINK = re.compile(r"\]\((?!https?://|#)([^)\s]+)\)")


class CustomMetadataHook(MetadataHookInterface):
    """The hook that hatchling calls for the fields that pyproject.toml lists as dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the project's URLs and its readme."""
        text = Path(self.root, "README.md").read_text("utf-8")
        if home := os.environ.get("YUAN_GRPC_HOME_URL", "").removesuffix("/").removesuffix(".git"):
            release = f"{home}/blob/v{metadata['version']}"
            metadata["urls"] = {
                "Homepage": home,
                "Documentation": f"{release}/README.md",
                "Changelog": f"{release}/CHANGELOG.md",
                "Issues": f"{home}/issues",
            }
            text = _RELATIVE_IMAGE.sub(rf"\1{release}/\2?raw=true)", text)
            text = _RELATIVE_LINK.sub(rf"]({release}/\1)", text)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
