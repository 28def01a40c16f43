"""A process per site and run that lives on between messages, so that a round does not pay the start of torch and nnU-Net."""
