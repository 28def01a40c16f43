"""What a site is: `sites.json`, the checks of its raw data, the split into one nnU-Net root per site."""
