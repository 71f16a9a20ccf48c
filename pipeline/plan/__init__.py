"""What a config will do and need, told before anything is started; `command` prints it, and refuses by it."""
