"""Configuration: what can be set (`schema`), and how it is read (`load`)."""
