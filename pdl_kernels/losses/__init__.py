"""What a user calls: the losses as functions and as modules, and the checks of what they are given."""
