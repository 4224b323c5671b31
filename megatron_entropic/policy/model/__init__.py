"""One rank's part of the model, from config.json to filled parameters."""
