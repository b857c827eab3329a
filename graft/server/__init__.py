"""The engine over HTTP and in a terminal."""
