import pytest

from shoal.comm.select import Member, choose_backend
from shoal.errors import CommError

HERE = [Member("a", 1), Member("a", 2)]
TWO_HOSTS = [Member("a", 1), Member("b", 2)]
NOT_BUILT = [Member("a", 1), Member("a", 2, unable="_shared_memory is not built")]


def test_what_auto_takes() -> None:
    assert choose_backend("auto", "cpu", HERE) == ("shm", "2 ranks on one host")
    assert choose_backend("auto", "cpu", TWO_HOSTS) == ("gloo", "the 2 ranks are on 2 hosts")
    assert choose_backend("auto", "cpu", NOT_BUILT) == ("gloo", "rank 1: _shared_memory is not built")
    assert choose_backend("auto", "cuda", []) == ("nccl", "the tensors are on GPUs")


def test_what_is_asked_for_is_taken_or_refused() -> None:
    assert choose_backend("gloo", "cpu", []) == ("gloo", "it was asked for")
    assert choose_backend("shm", "cpu", HERE) == ("shm", "it was asked for")
    for members, why in [(TWO_HOSTS, "the 2 ranks are on 2 hosts"), (NOT_BUILT, "rank 1: _shared_memory is not")]:
        with pytest.raises(CommError, match=f"--comm-backend shm: {why}"):
            choose_backend("shm", "cpu", members)
    with pytest.raises(CommError, match="--comm-backend gloo: tensors on GPUs need nccl"):
        choose_backend("gloo", "cuda", [])
