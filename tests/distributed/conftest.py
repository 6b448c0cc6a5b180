"""What the tests of several ranks share."""

import pytest

from tests.distributed.kill_matrix import straight


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """A folder of runs, and the final cores of two ranks on one host that nothing disturbed.

    That run has a tracker (test_trackers.py); the runs that are compared with it have none.
    """
    folder = tmp_path_factory.mktemp("jobs")
    return folder, straight(folder, logging={"trackers": ["tensorboard"]})
