"""A check of a wheel that is to be published: `python .ci/check_wheel.py WHEEL`.

Its metadata must have URLs, and no link of its readme may be relative, since an index shows the readme on its own page.
"""

import re
import sys
import zipfile


def main(wheel: str) -> None:
    """Print the wheel's URLs, or exit with an error."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    urls = re.findall(r"^Project-URL: (.+)$", metadata, re.MULTILINE)
    if not urls:
        sys.exit("the wheel has no URLs: set YUAN_GRPC_HOME_URL to the address of the repository and build it again")
    if relative := re.findall(r"\]\((?!https://|#)[^)]*\)", metadata):
        sys.exit(f"the readme has relative links: {', '.join(relative)}")
    print("\n".join(urls))


if __name__ == "__main__":
    main(sys.argv[1])
