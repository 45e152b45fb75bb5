"""The text forms of images and repositories, as skopeo spells them."""

from __future__ import annotations

import pytest

from kaito_flows.errors import ImageError
from kaito_flows.oci.reference import ImageName

DIGEST = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("oci:/folder:tag", ImageName("/folder", reference="tag")),
        (f"oci:/folder@{DIGEST}", ImageName("/folder", reference=DIGEST)),
        ("oci:/folder", ImageName("/folder")),
        ("oci:relative/folder:a.b-c_d", ImageName("relative/folder", reference="a.b-c_d")),
        ("oci:/jane@corp.example:tag", ImageName("/jane@corp.example", reference="tag")),
        ("docker://a.example/b/c:tag", ImageName("", "a.example", "b/c", "tag")),
        (f"docker://a.example/b@{DIGEST}", ImageName("", "a.example", "b", DIGEST)),
        (f"docker://a.example/b:tag@{DIGEST}", ImageName("", "a.example", "b", DIGEST)),
        ("docker://a.example/b", ImageName("", "a.example", "b")),
        ("docker://localhost:5000/b:tag", ImageName("", "localhost:5000", "b", "tag")),
        ("docker://[::1]:5000/b:tag", ImageName("", "[::1]:5000", "b", "tag")),
        ("docker://busybox:1", ImageName("", "docker.io", "library/busybox", "1")),
    ],
)
def test_a_text_is_read_in_parts(text: str, expected: ImageName) -> None:
    assert ImageName.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "oci:", "a.example/b:c", "docker://", "docker://A.example/B:c", "docker://a.example/b@sha256:12"]
)
def test_what_is_no_image_is_refused_with_what_to_write(text: str) -> None:
    with pytest.raises(ImageError, match=r"not an image.*(write |lowercase)"):
        ImageName.parse(text)


@pytest.mark.parametrize("text", ["oci:/folder", "docker://a.example/b"])
def test_an_image_needs_a_tag_or_a_digest(text: str) -> None:
    with pytest.raises(ImageError, match="no tag and no digest"):
        ImageName.parse_image(text)
