"""At which layouts a model fits."""

import pytest

from shoal.devices import cpu
from shoal.doctor import model_fit
from shoal.doctor.model_fit import ModelFacts
from shoal.wire.doctor import LayoutFit


def test_a_small_model_fits_everywhere() -> None:
    facts = model_fit.gather("bundled", {})
    first = facts.layouts[0]
    assert (first.tensor_parallel_size, first.pipeline_parallel_size) == (1, 1)
    assert all(each.fits and each.weight_bytes and each.kv_tokens for each in facts.layouts)
    cores = len(cpu.discover().cores)
    assert [each.replicas for each in facts.layouts] == [
        cores // (each.tensor_parallel_size * each.pipeline_parallel_size) for each in facts.layouts
    ]
    assert {"config.json", "set of weights", "tokenizer"} <= set(facts.digests)
    (finding,) = model_fit.check(facts)
    assert (finding.kind, finding.level) == ("model-fit", "ok")
    assert "fits at tp 1 x pp 1" in finding.text


def test_a_model_that_fits_nowhere() -> None:
    facts = model_fit.gather("bundled", {"device_memory": 1 << 20})
    (finding,) = model_fit.check(facts)
    assert (finding.kind, finding.level) == ("model-fit", "failure")
    assert "fits on this host in no layout" in finding.text
    assert "too small for rank 0" in finding.text


def test_a_model_that_fits_only_when_it_is_shared_out() -> None:
    layouts = (
        LayoutFit(tensor_parallel_size=1, pipeline_parallel_size=1, fits=False, reason="too small for rank 0"),
        LayoutFit(tensor_parallel_size=2, pipeline_parallel_size=1, fits=True, weight_bytes=1, kv_tokens=None),
    )
    (finding,) = model_fit.check(ModelFacts("model", layouts))
    assert (finding.level, finding.mend) == ("warning", "shoal serve MODEL -tp 2 -pp 1")
    assert finding.text == "model fits at tp 2 x pp 1, not at tp 1 x pp 1: too small for rank 0"


@pytest.mark.parametrize("model", ["/no/such/folder", "bundled:none"])
def test_a_model_that_is_missing(model: str) -> None:
    (finding,) = model_fit.check(model_fit.gather(model, {}))
    assert (finding.kind, finding.level) == ("model", "failure")
    assert model in finding.text
