"""Taking a generator elsewhere: the code and the card that a release carries, and other formats of it."""
