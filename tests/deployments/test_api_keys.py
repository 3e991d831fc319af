"""Keys as they are or as digests, given or in a file."""

import pytest

from deployments.api_keys import Keys, read_keys
from deployments.errors import Unauthorized


def test_the_digest_itself_is_no_key():
    digest = "2c70e12b7a0646f92279f427c7b38e7334d8e5389cff167a1dc30e73f826b683"
    keys = Keys([digest])
    assert keys.tenant("Bearer key")
    with pytest.raises(Unauthorized):
        keys.tenant(f"Bearer {digest}")


def test_keys_come_from_a_file_too(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\nsecret-one\n\n  secret-two \n")
    assert read_keys(str(file)) == ["secret-one", "secret-two"]
    assert read_keys("") == []


@pytest.mark.parametrize(
    ("content", "sentence"), [(None, "cannot be read"), ("# none\n", "holds no key")]
)
def test_a_key_file_without_keys_never_opens_the_service(tmp_path, content, sentence):
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=sentence):
        read_keys(str(file))
