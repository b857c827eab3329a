"""Speed and memory of Graft, compared with other tools."""
