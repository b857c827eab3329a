"""Speed and memory of Graft beside other tools."""
