"""The adapter as PEFT sees it: type, configuration, tuner, state, files."""
