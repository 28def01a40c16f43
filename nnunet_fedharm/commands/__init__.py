"""One module per `nnunet-fedharm` command: `add_arguments(parser)` and `run(args) -> int`."""
