"""The functions behind the commands; pipelines/cli.py gives them their names."""
