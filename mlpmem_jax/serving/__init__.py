"""A finished run as a server: the protocol of OpenAI completions over HTTP."""
