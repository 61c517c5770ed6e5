"""The environment variables that ranks on other hosts get too."""

import os

import pytest

from shoal import env

SHARED = {
    "NCCL_DEBUG": "WARN",
    "GLOO_DEBUG": "1",
    "HF_HUB_OFFLINE": "1",
    "SHOAL_LOG_LEVEL": "debug",
    "VLLM_SOMETHING": "2",
    "TORCH_NCCL_BLOCKING_WAIT": "1",
}
OWN = {
    "HF_TOKEN": "hf_1",
    "HUGGING_FACE_HUB_TOKEN": "hf_2",
    "SHOAL_API_KEY": "secret",
    "SHOAL_CLUSTER_KEY": "secret",
    "SHOAL_CLUSTER_KEY_FILE": "/secret",
    "VLLM_API_KEY": "secret",
    "SHOAL_HOST_IP": "10.0.0.1",
    "VLLM_HOST_IP": "10.0.0.1",
    "NCCL_SOCKET_IFNAME": "eth0",
    "GLOO_SOCKET_IFNAME": "eth0",
    "SHOAL_DP_RANK": "1",
    "SHOAL_NODE_RANK": "1",  # an option
    "VLLM_PP_LAYER_PARTITION": "2,2",  # vLLM's name of an option
    "CUDA_VISIBLE_DEVICES": "0",
    "LANG": "C",
}


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("NCCL_", "GLOO_", "HF_", "SHOAL_", "VLLM_", "TORCH_")):
            monkeypatch.delenv(name)
    for name, value in {**SHARED, **OWN}.items():
        monkeypatch.setenv(name, value)


def test_secrets_and_what_belongs_to_one_host_stay_there() -> None:
    assert env.shared_variables(["node_rank", "pipeline_layer_partition"]) == SHARED


def test_what_is_set_on_a_host_keeps_its_value() -> None:
    assert env.not_set_here({"NCCL_DEBUG": "INFO", "NCCL_ALGO": "Ring"}) == {"NCCL_ALGO": "Ring"}
