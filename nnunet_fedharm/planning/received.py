"""Plans that came over the network may say sizes and numbers, and neither what code runs here nor which files are touched.

nnU-Net trusts its plans: it imports `architecture.network_class_name` and the classes in `arch_kwargs` by any path
(`get_network_from_plans`), calls them, and makes folders of `plans_name` and `data_identifier`. That is right for one's own
plans. A site's plans come from the server, which is not trusted with code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nnunet_fedharm.errors import PlanError
from nnunet_fedharm.planning.section import SECTION, check_plans_name, is_file_name

_NETWORK = re.compile(r"dynamic_network_architectures\.architectures\.[a-z_]+\.[A-Z][A-Za-z0-9]*")
"""Where nnU-Net's planners take their networks from."""
_LAYER = re.compile(r"torch\.nn\.(modules\.[a-z]+\.)?[A-Z][A-Za-z0-9]*")
_ENDING = re.compile(r"(\.[A-Za-z0-9]+)+")


def check_received(values: Mapping[str, Any], *, source: str) -> None:
    """Both checks below of a message's values, as far as they are in it.

    Raises:
        PlanError: what they name, and what is allowed.
    """
    if "plans" in values:
        check_received_plans(values["plans"], source=source)
    if "dataset_json" in values:
        check_received_dataset(values["dataset_json"], source=source)


def check_received_plans(plans: Mapping[str, Any], *, source: str) -> None:
    """Refuse plans that would run code or touch files of the sender's choice.

    Args:
        source: of the plans, for the message.

    Raises:
        PlanError: what they name, and what is allowed.
    """
    check_plans_name(str(plans.get("plans_name", "")))
    configurations = plans.get("configurations")
    if not isinstance(configurations, Mapping) or not all(isinstance(one, Mapping) for one in configurations.values()):
        raise PlanError(f"The plans of {source} have no configurations. Let the server plan anew.")
    for name, configuration in configurations.items():
        folder = configuration.get("data_identifier", name)
        if not isinstance(folder, str) or not is_file_name(folder):
            raise PlanError(
                f"The plans of {source} put the preprocessed cases of {name} into {folder!r}; use letters, digits, '.', '_' "
                "and '-'."
            )
        _check_architecture(configuration.get("architecture"), name, source)
        section = configuration.get(SECTION)
        if isinstance(section, Mapping) and section.get("start_from"):
            raise PlanError(
                f"The plans of {source} start {name} from {section['start_from']!r}, a file of this machine. A federation starts "
                "from weights that the server sends (start-from in its run config)."
            )


def check_received_dataset(dataset_json: Mapping[str, Any], *, source: str) -> None:
    """Refuse a dataset.json whose file ending would lead out of the folder of the images.

    Raises:
        PlanError: the ending.
    """
    ending = dataset_json.get("file_ending")
    if ending is not None and not _matches(_ENDING, ending):
        raise PlanError(f"The dataset.json of {source} has the file ending {ending!r}; write one like .nii.gz.")


def _check_architecture(architecture: Any, configuration: str, source: str) -> None:
    if architecture is None:
        return  # inherited from another configuration
    if not isinstance(architecture, Mapping):
        raise PlanError(f"The plans of {source} have no readable architecture for {configuration}.")
    network = architecture.get("network_class_name")
    if not _matches(_NETWORK, network):
        raise PlanError(
            f"The plans of {source} name the network {network!r} for {configuration}. Sites build only networks of "
            "dynamic_network_architectures.architectures, as nnU-Net's planners do."
        )
    values, imported = architecture.get("arch_kwargs"), architecture.get("_kw_requires_import")
    if not isinstance(values, Mapping) or not isinstance(imported, list | tuple):
        raise PlanError(f"The plans of {source} have no readable architecture for {configuration}.")
    for key in imported:
        layer = values.get(key)
        if layer is not None and not _matches(_LAYER, layer):
            raise PlanError(
                f"The plans of {source} name {layer!r} as {key} of {configuration}. Sites build only layers of torch.nn."
            )


def _matches(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None
