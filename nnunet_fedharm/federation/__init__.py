"""The Flower side: client app, server app, round loop, weight codec, launcher."""
