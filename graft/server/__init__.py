"""The HTTP server: the engine behind the interfaces of OpenAI, vLLM and llama.cpp, and a page."""
