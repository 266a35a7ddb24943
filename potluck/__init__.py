"""The `potluck` command: all verbs in one place."""
