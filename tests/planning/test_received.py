"""A server is not trusted with code or paths: what plans from the network may not say."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from nnunet_fedharm.errors import PlanError
from nnunet_fedharm.federation.answers import answer
from nnunet_fedharm.federation.messages import STORE_PLANS, pack
from nnunet_fedharm.planning.received import check_received_dataset, check_received_plans

LAYERS = {
    "conv_op": "torch.nn.modules.conv.Conv2d",
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
    "dropout_op": None,
    "nonlin": "torch.nn.LeakyReLU",
}
PLANS: dict[str, Any] = {
    "plans_name": "nnUNetFedHarmPlans",
    "configurations": {
        "2d": {
            "data_identifier": "nnUNetPlans_2d",
            "architecture": {
                "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
                "arch_kwargs": {"n_stages": 2, **LAYERS},
                "_kw_requires_import": list(LAYERS),
            },
            "fedharm": {"kind": "none"},
        },
        "2d_small": {"inherits_from": "2d", "batch_size": 2},
    },
}


def changed(*path: str, value: Any) -> dict[str, Any]:
    plans = deepcopy(PLANS)
    part = plans if path[0] == "plans_name" else plans["configurations"]["2d"]
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return plans


def test_plans_as_nnunet_makes_them_pass() -> None:
    check_received_plans(PLANS, source="the server")
    encoder = changed(
        "architecture",
        "network_class_name",
        value="dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
    )
    check_received_plans(encoder, source="the server")


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("plans_name",), "../../dataset", "plans name '../../dataset' is not usable"),
        (("plans_name",), "dataset", "would overwrite dataset.json"),
        (("data_identifier",), "/etc", "put the preprocessed cases of 2d into '/etc'"),
        (("data_identifier",), "..", "into '..'"),
        (("data_identifier",), 3, "into 3"),
        (("architecture", "network_class_name"), "subprocess.Popen", "name the network 'subprocess.Popen' for 2d"),
        (
            ("architecture", "network_class_name"),
            "dynamic_network_architectures.architectures.unet.torch.hub.Load",
            "name the network",
        ),
        (("architecture", "network_class_name"), None, "name the network None"),
        (("architecture", "arch_kwargs", "conv_op"), "os.system", "name 'os.system' as conv_op of 2d"),
        (("architecture", "arch_kwargs", "conv_op"), "torch.nn.modules.module.os.System", "as conv_op"),
        (("architecture", "arch_kwargs"), [], "no readable architecture for 2d"),
        (("architecture",), "Popen", "no readable architecture for 2d"),
        (("fedharm", "start_from"), "/data/model.pth", "start 2d from '/data/model.pth', a file of this machine"),
    ],
)
def test_code_and_files_of_the_senders_choice_are_refused(path: tuple[str, ...], value: Any, sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence) as refusal:
        check_received_plans(changed(*path, value=value), source="the server")
    assert "\n" not in str(refusal.value)


def test_plans_without_configurations_are_refused() -> None:
    for configurations in (None, [], {"2d": []}):
        with pytest.raises(PlanError, match="have no configurations"):
            check_received_plans({**PLANS, "configurations": configurations}, source="the server")


def test_a_file_ending_stays_in_its_folder() -> None:
    for dataset in ({}, {"file_ending": ".nii.gz"}, {"file_ending": ".png"}):
        check_received_dataset(dataset, source="the server")
    for ending in ("/../../secret.nii.gz", "nii", "", 3):
        with pytest.raises(PlanError, match="of the server has the file ending"):
            check_received_dataset({"file_ending": ending}, source="the server")


def test_a_site_answers_them_with_the_sentence_and_writes_nothing(tmp_path: Path) -> None:
    request = {
        "run_id": "0" * 12 + "-" + "0" * 6,
        "dataset_name": "Dataset001_Blobs",
        "plans": changed("architecture", "network_class_name", value="subprocess.Popen"),
        "dataset_json": {},
        "fingerprint": {},
    }
    reply = answer("query.plans", pack(STORE_PLANS, request), {"site": "A", "site-root": str(tmp_path)}, {})
    config = reply.config_records["config"]
    assert (config["status"], config["kind"]) == ("error", "PlanError")
    assert "Sites build only networks of dynamic_network_architectures" in str(config["text"])
    assert not list(tmp_path.rglob("*.json"))
