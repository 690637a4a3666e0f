"""How arrays and work are spread over devices and processes."""
