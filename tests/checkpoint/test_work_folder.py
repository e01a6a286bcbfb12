"""State that a failed run leaves on disk."""

import pytest

from reallm.checkpoint import check_output, open_work_folder, work_folder
from reallm.errors import ArtifactError


@pytest.mark.parametrize("error", [KeyError, RuntimeError, KeyboardInterrupt, OSError])
def test_a_run_that_fails_without_results_does_not_block_the_next(tmp_path, error):
    out = tmp_path / "out"
    with pytest.raises((error, ArtifactError)), open_work_folder(work_folder(out), {"plan": {}}):
        raise error
    assert not work_folder(out).exists()
    check_output(out)


def test_results_of_a_run_that_fails_are_left_for_resume(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyError), open_work_folder(work_folder(out), {"plan": {}}):
        (work_folder(out) / "matrix.safetensors").write_bytes(b"")
        raise KeyError
    with pytest.raises(ArtifactError, match="add --resume"):
        check_output(out)
    # A second failure leaves the folder: it existed before this run.
    with (
        pytest.raises(KeyError),
        open_work_folder(work_folder(out), {"source": None, "plan": {}, "seed": 0, "device": "cpu"}),
    ):
        raise KeyError
    assert (work_folder(out) / "matrix.safetensors").exists()
