"""Sites: the registry of cases and scanners, checks of raw data, and the split into one nnU-Net root per site."""
