"""The Flower ClientApp: hands each message to the site's warm worker, or to `answers` in this process.

In a deployment Flower starts a process for every message; this module is all that such a process imports: no torch, no nnU-Net.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from nnunet_fedharm.errors import FedHarmError
from nnunet_fedharm.federation.messages import error_reply
from nnunet_fedharm.federation.site import locate_site
from nnunet_fedharm.federation.warm.client import ask, warm_minutes

app = ClientApp()

QUERIES = (
    "preflight",
    "summarize",
    "prepare",
    "plans",
    "finish",
    "report_hello",
    "report_measure",
    "report_counts",
    "report_moments",
    "report_classify",
    "report_keep",
    "secure_setup",
    "secure_share",
    "secure_mask",
    "secure_unmask",
)
"""Every query of `answers.HANDLERS`; named here so that nothing heavy is imported for their names."""


@app.train()
def train(message: Message, context: Context) -> Message:
    """Local epochs of one round."""
    return answer(message, context)


@app.train("secure")
def train_secure(message: Message, context: Context) -> Message:
    """Local epochs of one round whose update goes into a secure sum."""
    return answer(message, context)


def _register(action: str) -> None:
    @app.query(action)
    def handler(message: Message, context: Context) -> Message:
        return answer(message, context)


for _action in QUERIES:
    _register(_action)


def answer(message: Message, context: Context) -> Message:
    """The reply to any message: by the site's warm worker where it keeps one, else worked out in this process."""
    kind, configs = message.metadata.message_type, (context.node_config, context.run_config)
    minutes = warm_minutes(context.node_config)
    try:
        site = locate_site(*configs)
    except FedHarmError as error:
        return Message(error_reply(type(error).__name__, str(error)), reply_to=message)
    if minutes > 0:
        content = ask(site, kind, message.content, configs, run_id=context.run_id, minutes=minutes)
    else:
        from nnunet_fedharm.federation import answers

        content = answers.answer(kind, message.content, *configs)
    return Message(content, reply_to=message)
