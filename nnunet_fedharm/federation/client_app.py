"""The Flower ClientApp: hands each message to `answers`.

In a deployment Flower starts a process for every message; this module is all that it imports by itself, no torch, no nnU-Net.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

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
    """The reply to any message."""
    from nnunet_fedharm.federation import answers

    content = answers.answer(message.metadata.message_type, message.content, context.node_config, context.run_config)
    return Message(content, reply_to=message)
