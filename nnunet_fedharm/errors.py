"""Every error a user can meet. A message says what is wrong, where (site, case, file), and what to do next."""


class FedHarmError(Exception):
    """Base of all errors raised on purpose; the command line prints the message alone, without a traceback."""


class SetupError(FedHarmError):
    """The machine is not ready: a package, a path, an environment variable, a Flower daemon."""


class DataError(FedHarmError):
    """Raw data cannot be used; the message names site, case and file."""


class PlanError(FedHarmError):
    """Plans, configuration or the `fedharm` section are missing or contradict each other."""


class SiteMismatchError(FedHarmError):
    """A site disagrees with the others (channels, labels, endings, versions); the message names it and why."""


class ShapeError(FedHarmError):
    """Arrays whose shapes do not fit together; the message lists them."""


class CheckpointError(FedHarmError):
    """A checkpoint cannot be read or written, or belongs to another trainer."""


class FederationError(FedHarmError):
    """A federated run cannot start or go on."""


class PrivacyError(FedHarmError):
    """A release would pass its budget, cannot be accounted for, or would show one site's part of a sum."""
