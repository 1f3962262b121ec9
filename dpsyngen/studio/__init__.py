"""The command `studio`: from images to a signed bundle in the browser (docs/studio.md); no logic of its own."""
