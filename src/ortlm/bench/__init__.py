"""What a built model costs on this machine: time, memory, and the shares of what the machine can do."""
