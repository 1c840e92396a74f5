import sys

import pytest
import torch

# Tests are small: a second thread would only wait for the first, and longer still on a busy machine.
torch.set_num_threads(1)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch finds none")


@pytest.fixture(autouse=True)
def _no_curves(request):
    """Drawing a run's curves takes longer than training it: a test that looks at them is marked `curves`."""
    # A MonkeyPatch of its own: the test's would be set up, and so undone, around the fixtures of every file.
    with pytest.MonkeyPatch.context() as patch:
        run = sys.modules.get("fused_rlhf.trainers.run")
        if run is not None and request.node.get_closest_marker("curves") is None:
            patch.setattr(run.curves, "figure", lambda rows, names: None)
        yield


@pytest.fixture
def group():
    """A group of processes of this one alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
