"""A real consortium: certificates, keys, the signed app, and Flower's processes at the server and at each site."""
