"""Standard parts put to work in a domain such as medicine, biology, code, audio or documents."""
